"""The watcher of `flask dev`: prints what is saved, a line of JSON for each batch.

A process of its own, for the library that watches starts threads, and the process that
forks must have none. It ends when its standard input does; it hears no Ctrl-C.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

from watchfiles import Change, DefaultFilter, watch

SUFFIXES = {".py", ".sql", ".html", ".jinja", ".j2", ".css", ".js"}

# What the packages' versions or the environment come from.
SETTINGS = {".env", ".flaskenv", "pyproject.toml"}


class Sources(DefaultFilter):
    """What the application in `root` is, without caches, environments and data."""

    ignore_dirs = (*DefaultFilter.ignore_dirs, "dist", "instance", "venv")

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __call__(self, change: Change, path: str) -> bool:
        known = Path(path).suffix in SUFFIXES or Path(path).name in SETTINGS
        return known and self.reach(path)

    def reach(self, path: str) -> bool:
        """Say whether the path, a folder perhaps, is in none that is left out."""
        # What the folders above the root are called does not matter.
        return super().__call__(Change.modified, os.path.relpath(path, self.root))


def batches(root: Path, began: float) -> Iterator[list[str]]:
    """Yield the files that are saved; at first those that were since `began`.

    That is a time in seconds, of before the first version was started: what is saved
    until the watching begins would be lost.
    """
    wanted = Sources(root)
    watching = False
    for changes in watch(
        root,
        watch_filter=None,  # or a busy log would keep it from yielding at all
        step=10,
        ignore_permission_denied=True,
        rust_timeout=500,
        yield_on_timeout=True,
        raise_interrupt=False,
    ):
        paths = {path for change, path in changes if wanted(change, path)}
        for _, path in changes:  # of a folder that was renamed, only it is reported
            if wanted.reach(path):
                paths.update(_sources(path, wanted))
        if not watching:
            found = _sources(str(root), wanted)
            paths |= {path for path in found if _is_newer(path, began)}
            watching = True
        if paths:
            yield sorted(os.path.relpath(path, root) for path in paths)


def _sources(place: str, wanted: Sources) -> Iterator[str]:
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name not in wanted.ignore_dirs]
        for name in names:
            path = os.path.join(folder, name)
            if wanted(Change.modified, path):
                yield path


def _is_newer(path: str, began: float) -> bool:
    with suppress(OSError):
        return os.stat(path).st_ctime > began  # which a file has that was moved here
    return False


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    Thread(target=_end_with_input, daemon=True).start()
    for batch in batches(Path.cwd(), float(sys.argv[1])):
        print(json.dumps(batch), flush=True)
