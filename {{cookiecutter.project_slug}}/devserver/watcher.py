"""The watcher of `flask dev`: prints what is saved, a line of JSON for each batch.

A process of its own, for the library that watches starts threads, and the process that
forks must have none. It ends when its standard input does.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from threading import Thread

from watchfiles import Change, DefaultFilter, watch

SUFFIXES = {".py", ".sql", ".html", ".jinja", ".j2"}
NAMES = {".env", ".flaskenv", "pyproject.toml"}


class Sources(DefaultFilter):
    """What an application consists of, without caches, environments and data."""

    ignore_dirs = (*DefaultFilter.ignore_dirs, "dist", "instance", "venv")

    def __call__(self, change: Change, path: str) -> bool:
        known = Path(path).suffix in SUFFIXES or Path(path).name in NAMES
        return known and super().__call__(change, path)


def batches(root: Path, began: float) -> Iterator[list[str]]:
    """Yield the files that are saved; at first those that were since `began`.

    That is a time in seconds, of before the first version was started: what is saved
    until the watching begins would be lost.
    """
    wanted = Sources()
    watching = False
    for changes in watch(
        root,
        watch_filter=None,  # or a busy log would keep it from yielding at all
        step=10,
        rust_timeout=500,
        yield_on_timeout=True,
        raise_interrupt=False,
    ):
        paths = {path for change, path in changes if wanted(change, path)}
        if not watching:
            found = _sources(root, wanted)
            paths |= {path for path in found if _is_newer(path, began)}
            watching = True
        if paths:
            yield sorted(os.path.relpath(path, root) for path in paths)


def _sources(root: Path, wanted: Sources) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in wanted.ignore_dirs]
        for name in names:
            path = os.path.join(folder, name)
            if wanted(Change.modified, path):
                yield path


def _is_newer(path: str, began: float) -> bool:
    with suppress(FileNotFoundError):
        return os.path.getmtime(path) > began
    return False


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    signal(SIGINT, SIG_IGN)  # it ends with the process that started it
    Thread(target=_end_with_input, daemon=True).start()
    for batch in batches(Path.cwd(), float(sys.argv[1])):
        print(json.dumps(batch), flush=True)
