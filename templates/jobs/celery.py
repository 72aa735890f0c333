"""Work in the background, by Celery: where there is a broker, such as Redis.

`flask worker` runs the tasks, on as many machines as wanted. One is acknowledged when
it is done, so it runs again when its worker was killed: write tasks for which twice is
as good as once. On Redis that is `CELERY_VISIBILITY_TIMEOUT` seconds later, and a task
that takes longer is given to a second worker: set it above your longest; and a worker
that is killed just as it takes a task from Redis loses it, which RabbitMQ does not do.
Without a broker, in development, tasks are files: one is lost with a killed worker.
"""

import time
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, overload

from celery import Celery, shared_task, signals
from celery import Task as CeleryTask
from flask import Flask, current_app
from kombu.serialization import dumps
from kombu.utils.json import dumps as json_dumps
from psycopg2 import InterfaceError, OperationalError
from psycopg2.extras import Json

from .config import Settings, number_setting, text_setting
from .db import DatabaseUnavailable, get_db, on_commit
from .log import request_id

P = ParamSpec("P")
R = TypeVar("R")

# A task whose connection to PostgreSQL was lost is tried again for some minutes.
CONNECTION_ERRORS = (DatabaseUnavailable, InterfaceError, OperationalError)

SETTINGS: Settings = {
    "CELERY_BROKER_URL": text_setting(example="redis://localhost:6379/0", secret=True),
    "CELERY_VISIBILITY_TIMEOUT": number_setting(25),  # seconds
}


class Task(Generic[P, R]):
    """A function that can be called as ever, or put off with `delay`.

    `job` is what Celery made of it, for more to say about it, such as
    `job.apply_async([1], countdown=60)`.
    """

    def __init__(self, function: Callable[P, R], **options: Any) -> None:
        self.function = function
        given = options.get("autoretry_for", ())
        options["autoretry_for"] = (*CONNECTION_ERRORS, *given)
        self.job = shared_task(**options)(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Send a task once the transaction of `get_db()` is committed.

        Outside of one it is sent at once. It keeps the arguments as JSON. Raises
        `TypeError` when they do not fit, and `EncodeError` of kombu when JSON has no
        such thing. The broker cannot join the transaction: when it cannot be reached,
        `OperationalError` of kombu is raised, and what was committed stays; so does it
        when the process dies just then. Where that must not be, note in a table what
        is to be done, too.
        """
        signature(self.function).bind(*args, **kwargs)
        dumps([args, kwargs], serializer="json")
        job = get_celery().tasks[self.job.name]
        on_commit(partial(job.apply_async, args, kwargs))


@overload
def task(function: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def task(function: Any = None, /, **options: Any) -> Any:
    """Make a task of a function: `@task`, or `@task(max_retries=5)`.

    The options are those of https://docs.celeryq.dev/en/stable/userguide/tasks.html
    """
    return Task(function, **options) if function else partial(task, **options)


@signals.before_task_publish.connect
def note_origin(headers: dict[str, object], **_: object) -> None:
    """Note when the task was sent, and in which request."""
    headers["sent_at"] = time.time()
    headers["request_id"] = request_id.get()


def task_class(app: Flask) -> type[CeleryTask[Any, Any]]:
    """Return the class of the tasks of `app`, each run in a context of its own."""

    # From Redis, what waits for its time longer than this is given to all workers.
    redis = app.config["CELERY_BROKER_URL"].startswith(("redis", "valkey"))
    longest = app.config["CELERY_VISIBILITY_TIMEOUT"] if redis else None

    class ContextTask(CeleryTask[Any, Any]):
        max_retries = 10
        retry_backoff = True
        retry_backoff_max = longest * 2 // 3 if longest else 600

        def apply_async(self, *args: Any, **options: Any) -> Any:
            if longest and (options.get("countdown") or 0) >= longest:
                message = f"countdown is {options['countdown']:g} s"
                hint = f"raise CELERY_VISIBILITY_TIMEOUT ({longest} s) above it."
                raise ValueError(f"{message}: {hint}")
            return super().apply_async(*args, **options)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            request_id.set(self.request.get("request_id") or "-")
            with app.app_context():
                return self.run(*args, **kwargs)

        def on_failure(
            self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any
        ) -> None:
            try:
                with app.app_context():
                    _note_failure(task_id, self.name, args, kwargs)
            except Exception:  # or it would keep its place in the worker for good
                message = "Task %s (%s) failed, which could not be noted"
                app.logger.exception(message, self.name, task_id)

    return ContextTask


def get_celery() -> Celery:
    """Return the Celery application of the current application."""
    celery: Celery = current_app.extensions["celery"]
    return celery


def init_app(app: Flask) -> None:
    """Give `app` a Celery application."""
    celery = Celery(app.name, task_cls=task_class(app), set_as_current=False)
    celery.conf.update(
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        imports=[f"{app.name}.tasks"],  # and others that have tasks
        task_acks_late=True,
        task_ignore_result=True,
        task_publish_retry_policy={"max_retries": 2},
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=1,
        **_broker(app),
    )
    celery.set_default()
    app.extensions["celery"] = celery


def _note_failure(id: str, name: str, args: Any, kwargs: Any) -> None:
    with get_db().cursor() as cursor:
        cursor.execute(
            "INSERT INTO failed_tasks (id, name, args, kwargs)"
            " VALUES (%s, %s, %s, %s) ON CONFLICT (id) DO NOTHING",
            [id, name, Json(args, dumps=json_dumps), Json(kwargs, dumps=json_dumps)],
        )


def _broker(app: Flask) -> dict[str, Any]:
    url = app.config["CELERY_BROKER_URL"]
    options: dict[str, object] = {}
    if not url:
        url = "filesystem://localhost"
        options = _folders(Path(app.instance_path) / "celery")
    elif url.startswith(("redis", "valkey")):
        options["visibility_timeout"] = app.config["CELERY_VISIBILITY_TIMEOUT"]
        # By default it looks for tasks to give to others every 100 s.
        options |= {"unacked_restore_interval": 2, "unacked_restore_throttle": 1}
    return {"broker_url": url, "broker_transport_options": options}


def _folders(folder: Path) -> dict[str, object]:
    for name in ("control", "queue"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    queue, control = str(folder / "queue"), str(folder / "control")
    return {
        "control_folder": control,
        "data_folder_in": queue,
        "data_folder_out": queue,
        "polling_interval": 0.05,
    }
