"""The keeper: stops the embedded PostgreSQL when those who asked for it have ended.

It watches processes instead of counting on their last words, so that a server ends
with one that was killed, too. `python -m devserver.keeper FOLDER` runs it.
"""

import select
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import psycopg2
from psycopg2.extensions import connection

from . import postgres

INTERVAL = 0.1  # seconds between two looks


def keep(folder: Path) -> None:
    """Stop the server in `folder` once no owner is left; owners come by NOTIFY."""
    with (
        closing(postgres.connect(folder, postgres.KEEPER)) as conn,
        conn.cursor() as cursor,
    ):
        cursor.execute("LISTEN owners")
        print("ready", flush=True)
        while True:
            # Who starts or joins says so before it lets go of the lock. What it said
            # may still be on its way, but not after a query of our own.
            with postgres.lock(folder):
                cursor.execute("SELECT 1")
                owners = list(_announced(conn))
                if not any(map(_is_running, owners)):
                    return postgres.stop(folder)
            _wait(conn, owners)


def _wait(conn: connection, owners: list[psutil.Process]) -> None:
    while any(map(_is_running, owners)):
        select.select([conn], [], [], INTERVAL)
        owners.extend(_announced(conn))


def _announced(conn: connection) -> Iterator[psutil.Process]:
    conn.poll()
    while conn.notifies:
        with suppress(psutil.NoSuchProcess):
            yield psutil.Process(int(conn.notifies.pop().payload))


def _is_running(process: psutil.Process) -> bool:
    # A process id that was given to another process since does not count, nor does
    # one that has ended and waits for its parent to notice.
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    with suppress(psycopg2.OperationalError):  # the server ended first
        keep(Path(sys.argv[1]))
