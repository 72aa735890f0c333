"""Background jobs by Celery, on a broker such as Valkey, Redis or RabbitMQ.

A task is a function, and a job is one queued call of it. `flask worker` runs the jobs,
on as many machines as you want. A job is acknowledged when it has ended, so it may run
more than once. Write tasks that have the same effect when they run twice. A broker
cannot join a transaction: a process that dies right after the commit loses its jobs.
"""

import inspect
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from traceback import format_exception_only
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar, overload
from urllib.parse import urlsplit

from celery import Celery, shared_task, signals
from celery import Task as CeleryTask
from celery.app.log import Logging as CeleryLogging
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, WorkerLostError
from celery.result import AsyncResult
from celery.utils import uuid
from flask import Flask, current_app
from kombu.exceptions import KombuError
from kombu.transport import TRANSPORT_ALIASES
from kombu.utils.json import dumps, loads
from psycopg2 import InterfaceError, OperationalError
from psycopg2.errors import ReadOnlySqlTransaction
from psycopg2.extras import Json

from .config import Setting, Settings, number_setting
from .db import DatabaseUnavailable, get_db, on_commit
from .log import request_id
from .migrate import add_folder

P = ParamSpec("P")
R = TypeVar("R")

OTHER_FUNCTIONS = (
    inspect.isasyncgenfunction,
    inspect.iscoroutinefunction,
    inspect.isgeneratorfunction,
)

TASKS = f"{__name__.partition('.')[0]}.tasks"

logger = logging.getLogger(__name__)

URL_EXAMPLE = "redis://localhost:6379/0"
NUMBER = re.compile(r"/?\d*/?")  # of a database


def _is_broker(url: str) -> bool:
    parts = urlsplit(url)
    # Otherwise a part of the password is taken for the rest of the URL.
    is_whole = "@" not in parts.path + parts.query and not parts.fragment
    is_known = parts.scheme in {*TRANSPORT_ALIASES, "redis+socket"}
    has_number = parts.scheme not in ("redis", "rediss") or NUMBER.fullmatch(parts.path)
    return is_known and parts.port != 0 and is_whole and bool(has_number)


def _parse_url(raw: str) -> str:
    with suppress(ValueError):  # Its message may quote part of the password.
        if all(map(_is_broker, raw.split(";"))):  # Celery tries one after the other.
            return raw
    raise ValueError


SETTINGS: Settings = {
    "CELERY_BROKER_URL": Setting(
        _parse_url, f"write a URL like {URL_EXAMPLE}.", "", URL_EXAMPLE, secret=True
    ),
    "CELERY_VISIBILITY_TIMEOUT": number_setting(3600),  # seconds
}

CONNECTION_ERRORS = (
    DatabaseUnavailable,
    InterfaceError,
    OperationalError,
    ReadOnlySqlTransaction,
)
# Failures of connections, rollbacks of the server (such as a deadlock), no resources,
# shutdowns: https://www.postgresql.org/docs/current/errcodes-appendix.html
OUTAGE = re.compile("08|40|53[123]|57P")
MAX_RETRY_DELAY = 60  # seconds between two attempts while PostgreSQL is away
MAX_REDELIVERIES = 5  # times that a job is restarted after its worker was killed
BROKER_TIMEOUT = 2.0  # seconds without a response, at each of three attempts

COUNT = "SELECT count FROM redelivered_tasks WHERE id = %s"
INCREMENT = (
    "INSERT INTO redelivered_tasks (id) VALUES (%s) ON CONFLICT (id)"
    " DO UPDATE SET count = redelivered_tasks.count + 1 RETURNING count"
)
FORGET = "DELETE FROM redelivered_tasks WHERE id = %s RETURNING count"


class RetriesExceededError(MaxRetriesExceededError):
    """All retries have failed. Unlike Celery's message, this one has no arguments."""

    def __init__(self, *_: object, **kwargs: Any) -> None:
        super().__init__("All retries have failed", **kwargs)


class Task(CeleryTask[P, R]):
    """Celery's task, whose `delay` waits for the commit."""

    MaxRetriesExceededError = RetriesExceededError

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Send a job once the transaction of `get_db()` is committed.

        Outside of a transaction, it is sent at once. The job keeps its arguments as
        JSON. Raises `TypeError` if the task does not accept the arguments, or if JSON
        cannot hold them. If the broker does not respond, the `with` block raises
        kombu's `OperationalError`, but stays committed. Raises `ProgrammingError` in a
        transaction that was started without a block.
        """
        inspect.signature(self.run).bind(*args, **kwargs)
        call = loads(dumps([args, kwargs]))  # a copy of the arguments
        task: Any = get_celery().tasks[self.name]
        job: AsyncResult[R] = task.AsyncResult(uuid())
        on_commit(partial(task.apply_async, *call, task_id=job.id))
        return job

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        request: Any = self.request
        app: Any = getattr(self.app, "flask_app", None)
        if request.called_directly:
            # A worker calls the task of `link_error` like this, without a context.
            with app.app_context() if app and not current_app else nullcontext():
                return self.run(*args, **kwargs)
        if not request.is_eager:
            request_id.set(f"job-{request.id}")
        began = time.perf_counter()
        try:
            with _limit_redeliveries(app, request), app.app_context():
                # A retry gets the arguments as they were sent.
                result = self.run(*deepcopy(args), **deepcopy(kwargs))
        except CONNECTION_ERRORS as error:
            if request.is_eager or not _is_outage(error):
                raise
            self._send_again(error)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, MemoryError):
                raise
            # Otherwise Celery never ends this job, and its thread gets no other one.
            raise RuntimeError(f"The task raised {error!r}") from error
        ms = round(1000 * (time.perf_counter() - began), 1)
        parts = {"job_id": request.id, "task": self.name, "ms": ms}
        logger.info("Job %(job_id)s (%(task)s) succeeded in %(ms)s ms", parts)
        return result

    def _send_again(self, error: Exception) -> NoReturn:
        # The limit of `retry` is for errors of the task itself.
        request: Any = self.request
        losses = request.headers.get("connection_losses", 0) + 1
        delay = min(2**losses, MAX_RETRY_DELAY)
        logger.warning("Retrying a job of %s in %d s: %s", self.name, delay, error)
        again = self.signature_from_request(
            retries=request.retries,
            countdown=delay,
            headers=request.headers | {"connection_losses": losses},
        )
        try:
            again.apply_async()
        except KombuError as broker_error:  # The broker is unavailable, too.
            raise Reject(broker_error, requeue=True) from error
        raise Ignore


def _is_outage(error: Any) -> bool:
    """Return whether the job may succeed once PostgreSQL is available."""
    if isinstance(error, ReadOnlySqlTransaction) and error.cursor:
        conn: Any = error.cursor.connection
        return bool(conn.is_outdated)  # A failover made the server read-only.
    if code := getattr(error, "pgcode", None):
        return bool(OUTAGE.match(code))
    if isinstance(error.__context__, OperationalError):  # The error is its consequence.
        return _is_outage(error.__context__)
    return not isinstance(error, InterfaceError) or "connection" in str(error)


_suspect = Lock()


@contextmanager
def _limit_redeliveries(app: Flask, request: Any) -> Iterator[None]:
    """Count the runs of a job whose worker was killed, perhaps by the job."""
    with ExitStack() as stack:
        if (request.delivery_info or {}).get("redelivered"):
            stack.callback(_forget, app, request.id)
            if _redeliveries(app, COUNT, request.id):
                # From the second time on, the job runs alone. Jobs that wait here have
                # not started, so the death of this worker does not count against them.
                stack.enter_context(_suspect)
            count = _redeliveries(app, INCREMENT, request.id)
            # In development, each save may kill the worker of a long job.
            if count > MAX_REDELIVERIES and not app.debug:
                message = f"{count} workers died while they ran this job"
                raise WorkerLostError(message)
        yield


def _redeliveries(app: Flask, query: str, job: str) -> int:
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute(query, [job])
        return sum(count for (count,) in cursor)


def _forget(app: Flask, job: str) -> None:
    with suppress(*CONNECTION_ERRORS):  # The row does no harm.
        _redeliveries(app, FORGET, job)


@overload
def task(function: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(
    *, bind: Literal[True], **options: Any
) -> Callable[[Callable[Concatenate[Any, P], R]], Task[P, R]]: ...
@overload
def task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def task(function: Any = None, /, **options: Any) -> Any:
    """Make a task of a function: `@task`, or `@task(max_retries=5)`.

    The options are those of https://docs.celeryq.dev/en/stable/userguide/tasks.html
    """
    if function is None:
        return partial(task, **options)
    name = function.__qualname__
    if any(is_other(function) for is_other in OTHER_FUNCTIONS):
        message = f"Task {name} is a coroutine or generator, which Celery does not run"
        raise TypeError(f"{message}: write a plain function.")
    if limits := {"time_limit", "soft_time_limit"} & options.keys():
        message = f"Task {name} has {min(limits)}, but nothing can stop a thread"
        raise TypeError(f"{message}: set timeouts on what the task waits for.")
    if "queue" in options:
        message = f"Task {name} has queue, which Celery has deprecated"
        raise TypeError(f"{message}: set the task_routes of Celery.")
    base = options.get("base", Task)
    if not issubclass(base, Task):  # Its jobs would run outside of any context.
        options["base"] = type(base.__name__, (Task, base), {})
    return shared_task(**options)(function)


@task
def note_failure(
    job: str, name: str, args: str, kwargs: str, error: str | None = None
) -> None:
    """List a failed job. Its arguments are JSON that PostgreSQL may not accept."""
    with get_db().cursor() as cursor:
        cursor.execute(
            "INSERT INTO failed_tasks (id, name, args, kwargs, error)"
            " VALUES (%s, %s, %s, %s, %s) ON CONFLICT (id) DO NOTHING",
            [job, name, Json(args), Json(kwargs), error],
        )


def _note(
    celery: Any, job: str, name: str, args: Any, kwargs: Any, error: str | None = None
) -> None:
    call: list[Any] = [job, name, dumps(args), dumps(kwargs), error]
    try:
        with celery.flask_app.app_context():
            note_failure(*call)
    except CONNECTION_ERRORS:
        celery.send_task(note_failure.name, call)


@signals.task_failure.connect
def _note_failed(
    sender: Any, task_id: str, exception: Any, args: Any, kwargs: Any, **_: Any
) -> None:
    # PostgreSQL does not accept every character of a message.
    error = f"{''.join(format_exception_only(exception)).strip()!r:.500}"
    _note(sender.app, task_id, sender.name, args, kwargs, error)


@signals.task_retry.connect
def _log_retry(request: Any, reason: Any, **_: object) -> None:
    error = type(reason.exc or reason).__name__
    parts = {"job_id": request.id, "task": request.task, "error": error}
    logger.warning("Job %(job_id)s (%(task)s) is retried after %(error)s", parts)


@signals.task_unknown.connect
@signals.task_rejected.connect
def _note_unknown(sender: Any, message: Any, **_: object) -> None:
    """List a message that no worker with this code can run."""
    headers = message.headers
    try:
        payload = message.payload
    except Exception:  # No worker accepts the format of the arguments.
        payload = [[str(message.body)], {}]
    args, kwargs = payload[:2] if "task" in headers else ([payload], {})
    job = headers.get("id", message.delivery_tag)
    _note(sender.app, job, headers.get("task", "unknown"), args, kwargs)


@signals.before_task_publish.connect
def _note_time(headers: dict[str, object], **_: object) -> None:
    headers["sent_at"] = time.time()


@signals.after_task_publish.connect
def _log_publish(headers: dict[str, object], **_: object) -> None:
    parts = {"job_id": headers["id"], "task": headers["task"]}
    logger.info("Enqueued job %(job_id)s: %(task)s", parts)


class Logging(CeleryLogging):
    """Celery's logging, which leaves the lines of tasks to the application's."""

    def setup_task_loggers(self, *args: object, **kwargs: object) -> logging.Logger:
        """Give Celery's logger of tasks neither a handler nor a level."""
        return logging.getLogger("celery.task")


class FlaskCelery(Celery):
    """The Celery application of a Flask application, on the broker of its settings."""

    def __init__(self, app: Flask) -> None:
        self.flask_app = app
        super().__init__(app.name, task_cls=Task, set_as_current=False, log=Logging)

    def _get_backend(self) -> Any:
        # In development, the URL of the broker is a function that starts one.
        if callable(url := self.conf.result_backend):
            self.conf.update(result_backend=url())
        return super()._get_backend()  # type: ignore[misc]

    def _connection(self, url: str, **options: Any) -> Any:
        # Celery prefers the environment to its configuration, even in tests.
        config = self.flask_app.config
        configured = config["CELERY_BROKER_URL"]
        url = configured() if callable(configured) else configured
        transport: dict[str, object] = {"confirm_publish": True}
        transport |= dict.fromkeys(["read_timeout", "write_timeout"], BROKER_TIMEOUT)
        if url.startswith(("redis", "sentinel")):
            transport = {
                "socket_timeout": BROKER_TIMEOUT,
                "socket_connect_timeout": BROKER_TIMEOUT,
                "visibility_timeout": config["CELERY_VISIBILITY_TIMEOUT"],
                # Projects that share a database may differ in that.
                "unacked_key": f"{self.main}.unacked",
                "unacked_index_key": f"{self.main}.unacked_index",
                "unacked_mutex_key": f"{self.main}.unacked_mutex",
                # By default, workers poll for overdue jobs every 100 s.
                "unacked_restore_interval": 2,
                "unacked_restore_throttle": 1,
                # A worker that is killed meanwhile blocks the others for this long.
                "unacked_mutex_expire": 10,
            }
        options = {"transport_options": transport} | options
        return super()._connection(url, **options)  # type: ignore[misc]


def get_celery() -> FlaskCelery:
    """Return the Celery application of the current application."""
    celery: FlaskCelery = current_app.extensions["celery"]
    return celery


def init_app(app: Flask) -> None:
    """Give `app` a Celery application, and `flask migrate` its tables."""
    add_folder(app, Path(__file__).parent)
    celery = FlaskCelery(app)
    celery.conf.update(
        broker_connection_max_retries=None,
        broker_connection_timeout=BROKER_TIMEOUT,
        broker_pool_limit=100,  # No thread waits until another has sent its job.
        control_exchange=app.name,  # Projects may share a broker.
        imports=[TASKS] if find_spec(TASKS) else [],
        task_acks_late=True,
        task_default_queue=app.name,
        task_publish_retry_policy={"max_retries": 1},
        worker_enable_prefetch_count_reduction=False,  # The worker counts its jobs.
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=not app.debug,  # for `print` and the debugger
        worker_prefetch_multiplier=1,
    )
    logging.getLogger("celery.task").setLevel(app.logger.level)
    celery.set_default()
    app.extensions["celery"] = celery
