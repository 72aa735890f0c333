"""The keeper: stops the embedded PostgreSQL when those who asked for it have ended.

It watches processes instead of counting on their last words, so that the server ends
with one that was killed, too. `python -m devserver.keeper FOLDER` runs it.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from . import postgres

INTERVAL = 0.1  # seconds between two looks


def keep(folder: Path) -> None:
    """Stop the server in `folder` once none of its owners runs."""
    keeping = postgres.keeper_lock(folder)
    keeping.acquire()
    print("ready", flush=True)
    while keeping.is_locked:
        while _has_owner(folder):
            time.sleep(INTERVAL)
        with postgres.lock(folder):  # under which others become owners
            if not _has_owner(folder):
                postgres.stop(folder)
                keeping.release()  # here, or who is next takes this keeper for its own


def _has_owner(folder: Path) -> bool:
    return any([_is_running(file) for file in (folder / "owners").iterdir()])


def _is_running(owner: Path) -> bool:
    """Say whether the process still runs that the file `owner` is named after.

    One that began after the file was written was given the same id, and one that waits
    for its parent to notice its end has ended. Their files are removed.
    """
    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        process = psutil.Process(int(owner.name))
        began = process.create_time() < owner.stat().st_mtime + 1
        if began and process.status() != psutil.STATUS_ZOMBIE:
            return True
    owner.unlink(missing_ok=True)
    return False


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
