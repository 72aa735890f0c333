"""Work in the background, as jobs in the same PostgreSQL: for what must not be lost.

`flask worker` runs the jobs, on as many machines as wanted. A job that a killed worker
had begun is begun again within 20 s. If that worker had committed it but not yet noted
that it is done, it runs twice: write tasks for which twice is as good as once.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, overload

import procrastinate
import psycopg
from flask import Flask
from procrastinate.contrib.psycopg2 import Psycopg2Connector
from procrastinate.exceptions import ConnectorException
from psycopg2 import InterfaceError, OperationalError
from psycopg2.extras import RealDictCursor
from psycopg_pool import PoolTimeout

from .db import DatabaseUnavailable, get_db
from .log import request_id
from .migrate import add_folder

P = ParamSpec("P")
R = TypeVar("R")

REQUEST = "request-id"  # among a job's arguments, where no parameter is called so

# A job whose connection was lost is tried again after 1, 4, 16, 64 seconds.
AGAIN = procrastinate.RetryStrategy(
    max_attempts=5,
    exponential_wait=4,
    retry_exceptions=[DatabaseUnavailable, InterfaceError, OperationalError],
)


class ContextConnector(Psycopg2Connector):
    """Run what `delay` asks of the engine on the connection of the current context."""

    def execute_query(self, query: str, **arguments: Any) -> None:
        with get_db().cursor() as cursor:
            cursor.execute(query, self._wrap_json(arguments))

    def execute_query_one(self, query: str, **arguments: Any) -> Any:
        with get_db().cursor(cursor_factory=RealDictCursor) as cursor:
            cursor.execute(query, self._wrap_json(arguments))
            return cursor.fetchone()

    def execute_query_all(self, query: str, **arguments: Any) -> Any:
        with get_db().cursor(cursor_factory=RealDictCursor) as cursor:
            cursor.execute(query, self._wrap_json(arguments))
            return cursor.fetchall()


class Connector(procrastinate.PsycopgConnector):
    """Run what a worker asks of the engine on connections of its own."""

    def get_sync_connector(self) -> ContextConnector:
        return ContextConnector()

    async def listen_notify(self, *args: Any, **kwargs: Any) -> None:
        # It gives up where it cannot connect, and with it the worker would. Meanwhile
        # that looks for jobs every 5 s.
        while True:
            with suppress(ConnectorException, PoolTimeout, psycopg.Error):
                await super().listen_notify(*args, **kwargs)
            await asyncio.sleep(1.0)


# Tasks in other modules than tasks.py: name these here, too.
queue = procrastinate.App(
    connector=ContextConnector(),
    import_paths=[f"{__name__.partition('.')[0]}.tasks"],
)


class Task(Generic[P, R]):
    """A function that can be called as ever, or put off with `delay`.

    `job` is what procrastinate made of it, for a job with more to say about it, such as
    `job.configure(schedule_in={"hours": 1}, priority=5).defer(note_id=1)`.
    """

    def __init__(self, function: Callable[P, R], **options: Any) -> None:
        self.function = function
        self.job: Any = queue.task(**{"retry": AGAIN} | options)(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Put a job into the transaction of `get_db()`, to share its fate.

        Outside of one it is committed at once. It keeps the arguments as JSON. Raises
        `TypeError` when they do not fit, and what a query raises.
        """
        arguments = signature(self.function).bind(*args, **kwargs).arguments
        self.job.defer(**arguments, **{REQUEST: request_id.get()})


@overload
def task(function: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def task(function: Any = None, /, **options: Any) -> Any:
    """Make a task of a function: `@task`, or `@task(retry=5, queue="slow")`.

    The options are those of https://procrastinate.readthedocs.io/en/stable/reference.html
    """
    return Task(function, **options) if function else partial(task, **options)


def init_app(app: Flask) -> None:
    """Let `flask migrate` apply the migrations of the queue."""
    package = Path(procrastinate.__file__).parent
    add_folder(app, package / "sql" / "migrations")
