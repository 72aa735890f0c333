"""Background jobs in the same PostgreSQL, for work that must not be lost.

A task is a function, and a job is one queued call of it. `flask worker` runs the jobs,
on as many machines as you want. No committed job is lost, but a job may run more than
once: write tasks that have the same effect when they run twice.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, update_wrapper
from importlib.util import find_spec
from inspect import Parameter, isasyncgenfunction, isgeneratorfunction, signature
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import procrastinate
from flask import Flask
from procrastinate import tasks
from procrastinate.contrib.psycopg2 import Psycopg2Connector
from procrastinate.exceptions import UniqueViolation
from psycopg2 import InterfaceError, OperationalError, ProgrammingError, errors
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS
from psycopg2.extras import RealDictCursor

from .db import DatabaseUnavailable, get_db, on_commit
from .migrate import add_folder

P = ParamSpec("P")
R = TypeVar("R")
Args = ParamSpec("Args")

logger = logging.getLogger(__name__)

# A job that lost its connection is retried after 4, 16, 64, 256 and 1024 seconds.
RETRY_ON_CONNECTION_LOSS = procrastinate.RetryStrategy(
    max_attempts=5,
    exponential_wait=4,
    retry_exceptions=[DatabaseUnavailable, InterfaceError, OperationalError],
)


class ContextConnector(Psycopg2Connector):
    """Run the engine's queries on the connection of the current context."""

    def execute_query(self, query: str, **arguments: Any) -> None:
        self.execute_query_all(query, **arguments)

    def execute_query_one(self, query: str, **arguments: Any) -> Any:
        return next(iter(self.execute_query_all(query, **arguments)), None)

    def execute_query_all(self, query: str, **arguments: Any) -> Any:
        jobs = arguments.get("jobs", [])
        with get_db().cursor(cursor_factory=RealDictCursor) as cursor:
            locks = [job.queueing_lock for job in jobs if job.queueing_lock]
            with _unique(cursor, locks):
                cursor.execute(query, self._wrap_json(arguments))
                rows = cursor.fetchall() if cursor.description else []
        for job, row in zip(jobs, rows, strict=False):
            parts = {"job_id": row["id"], "task": job.task_name}
            log = partial(logger.info, "Enqueued job %(job_id)d: %(task)s", parts)
            with suppress(ProgrammingError):  # It was started without a `with` block.
                on_commit(log)
        return rows

    # A coroutine, such as a view, may await the engine's `defer_async`.
    async def execute_query_async(self, query: str, **arguments: Any) -> None:
        self.execute_query_all(query, **arguments)

    async def execute_query_one_async(self, query: str, **arguments: Any) -> Any:
        return self.execute_query_one(query, **arguments)

    async def execute_query_all_async(self, query: str, **arguments: Any) -> Any:
        return self.execute_query_all(query, **arguments)


@contextmanager
def _unique(cursor: Any, locks: list[str]) -> Iterator[None]:
    """Keep the transaction usable if a job with one of the queueing locks waits."""
    conn = cursor.connection
    in_transaction = conn.info.transaction_status == TRANSACTION_STATUS_INTRANS
    savepoint = locks and (in_transaction or not conn.autocommit)
    if savepoint:
        cursor.execute("SAVEPOINT enqueue")
    try:
        yield
    except errors.UniqueViolation as error:
        if savepoint:
            cursor.execute("ROLLBACK TO enqueue")
        constraint, lock = error.diag.constraint_name, ", ".join(locks)
        raise UniqueViolation(constraint_name=constraint, queueing_lock=lock) from error
    if savepoint:
        cursor.execute("RELEASE enqueue")


# `create_app` must import other modules that have tasks.
TASKS = f"{__name__.partition('.')[0]}.tasks"
queue = procrastinate.App(
    connector=ContextConnector(),
    import_paths=[TASKS] if find_spec(TASKS) else [],
)


class Task(tasks.Task[P, R, Args]):
    """procrastinate's task, with a `delay` that also takes arguments by position."""

    def delay(self, *args: Args.args, **kwargs: Args.kwargs) -> int:
        """Enqueue a job in the transaction of `get_db()`, and return its id.

        Outside of a transaction, it is committed at once. The job keeps its arguments
        as JSON. Raises `TypeError` if the task does not accept them. If a job with the
        task's `queueing_lock` waits, raises `AlreadyEnqueued`; the transaction stays
        usable.
        """
        context = [None] if self.pass_context else []
        bound = signature(self.func).bind(*context, *args, **kwargs)
        names = list(bound.signature.parameters)[len(context) :]
        named: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        return self.configure().defer(**named)


@overload
def task(function: Callable[P, R], /) -> Task[P, R, P]: ...
@overload
def task(
    *, pass_context: Literal[True], **options: Any
) -> Callable[
    [Callable[Concatenate[procrastinate.JobContext, P], R]],
    Task[Concatenate[procrastinate.JobContext, P], R, P],
]: ...
@overload
def task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R, P]]: ...
def task(function: Any = None, /, **options: Any) -> Any:
    """Make a task of a function: `@task`, or `@task(retry=5, queue="slow")`.

    The options are those of https://procrastinate.readthedocs.io/en/stable/reference.html
    """
    if function is None:
        return partial(task, **options)
    if isgeneratorfunction(function) or isasyncgenfunction(function):
        message = f"Task {function.__qualname__} is a generator, which nobody runs"
        raise TypeError(f"{message}: write a plain function.")
    parameters = list(signature(function).parameters.values())
    for each in parameters[bool(options.get("pass_context")) :]:
        if each.kind in (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL):
            message = f"Task {function.__qualname__} has the parameter {each}"
            hint = "a job has named arguments only, so give each one a name."
            raise TypeError(f"{message}: {hint}")
    defaults: Any = {"queue": "default", "retry": RETRY_ON_CONNECTION_LOSS}
    made: Any = Task(function, blueprint=queue, **defaults | options)
    queue._register_task(made)
    return update_wrapper(made, function, updated=())


def init_app(app: Flask) -> None:
    """Let `flask migrate` apply the migrations of the queue."""
    package = Path(procrastinate.__file__).parent
    add_folder(app, package / "sql" / "migrations")
