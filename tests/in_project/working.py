"""Tasks for the tests of workers. Running a job twice has the effect of one run."""

import os
import signal
import time
from multiprocessing import get_context
from pydoc import locate
from typing import Any

from app import create_app as create_plain
from app.core import engine
from app.core.db import get_db
from app.core.jobs import task
from flask import Flask

# A killed worker's jobs run again sooner in tests that do without the room for delays.
if "STALLED_AFTER" in os.environ:
    setattr(engine, "STALLED_AFTER", float(os.environ["STALLED_AFTER"]))  # noqa: B010


def create_app(*args: Any) -> Flask:
    """Create the application. With Celery, its results may be stored elsewhere."""
    app = create_plain(*args)
    if backend := os.environ.get("RESULT_BACKEND"):
        celery: Any = app.extensions["celery"]
        celery.conf.result_backend = backend
        options = {"retry_policy": {"max_retries": 0}}
        celery.conf.result_backend_transport_options = options
    return app


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
    """Fail with an error of Python."""
    found: Any = locate(error)
    raise found("on purpose")


@task
def fork(number: int) -> None:
    """Start a process and terminate it at once, and record the effect."""
    # mypy knows this context only on systems that fork.
    process = getattr(get_context("fork"), "Process")(target=time.sleep, args=(60,))  # noqa: B009
    process.start()
    process.terminate()
    process.join()
    work(number, 0.0)


@task
def record_last_character(text: str) -> None:
    """Record the number of the last character."""
    work(ord(text[-1]), 0.0)


__all__ = [
    "create_app",
    "fail",
    "fail_with",
    "fork",
    "kill_worker",
    "record_last_character",
    "work",
]
