"""Tasks for the tests of workers. Running a job twice has the effect of one run."""

import builtins
import os
import signal
import time

from app import create_app
from app.core import engine
from app.core.db import get_db
from app.core.jobs import task

# A killed worker's jobs run again sooner in tests that do without the room for delays.
if "STALLED_AFTER" in os.environ:
    setattr(engine, "STALLED_AFTER", float(os.environ["STALLED_AFTER"]))  # noqa: B010

TABLES = """
CREATE TABLE effects (number int PRIMARY KEY);
CREATE TABLE runs (number int, process int, at timestamptz DEFAULT now());
"""


@task
def work(number: int, seconds: float) -> None:
    """Record the run, and the effect in a transaction of this many seconds."""
    with get_db().cursor() as cursor:
        cursor.execute(
            "INSERT INTO runs (number, process) VALUES (%s, %s)", [number, os.getpid()]
        )
    with get_db() as db, db.cursor() as cursor:
        insert = "INSERT INTO effects VALUES (%s) ON CONFLICT DO NOTHING"
        cursor.execute(insert, [number])
        time.sleep(seconds)


@task
def kill_worker(number: int) -> None:
    """Record the run, and kill the worker."""
    with get_db().cursor() as cursor:
        cursor.execute(
            "INSERT INTO runs (number, process) VALUES (%s, %s)", [number, os.getpid()]
        )
    os.kill(os.getpid(), signal.SIGKILL)


@task
def fail(thing: object) -> None:
    """Fail with any argument."""
    raise RuntimeError("on purpose")


@task
def fail_with(error: str) -> None:
    """Fail with a built-in error."""
    raise getattr(builtins, error)("on purpose")


__all__ = ["create_app", "fail", "fail_with", "kill_worker", "work"]
