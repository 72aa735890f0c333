"""Work in the background, by Celery: where there is a broker, such as Redis.

`flask worker` runs the tasks, on as many machines as wanted. One is acknowledged when
it is done, so it runs again when its worker was killed: write tasks for which twice is
as good as once. On Redis that is `CELERY_VISIBILITY_TIMEOUT` seconds later, and a task
that takes longer is given to a second worker: set it above your longest; and a worker
that is killed just as it takes a task from Redis loses it, which RabbitMQ does not do.
Without a broker, in development, tasks are files: one is lost with a killed worker.
"""

import os
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, overload

from celery import Celery, shared_task
from flask import Flask, current_app
from kombu.serialization import dumps
from psycopg2 import InterfaceError, OperationalError

from .config import number, refuse
from .db import Unavailable, on_commit

P = ParamSpec("P")
R = TypeVar("R")

# A task whose connection to PostgreSQL was lost is tried again for some minutes.
LOST = (Unavailable, InterfaceError, OperationalError)

EXAMPLE = "redis://localhost:6379/0"


class Task(Generic[P, R]):
    """A function that can be called as ever, or put off with `delay`.

    `job` is what Celery made of it, for more to say about it, such as
    `job.apply_async([1], countdown=60)`.
    """

    def __init__(self, function: Callable[P, R], **options: Any) -> None:
        self.function = function
        options["autoretry_for"] = (*LOST, *options.get("autoretry_for", ()))
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
        job = current_app.extensions["celery"].tasks[self.job.name]
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


def init_app(app: Flask) -> None:
    """Give `app` a Celery application and the command `flask worker`."""
    from . import worker

    broker = _broker(app)
    celery = Celery(app.name, task_cls=worker.task_class(app), set_as_current=False)
    celery.conf.update(
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        imports=[f"{app.name}.tasks"],  # and others that have tasks
        task_acks_late=True,
        task_ignore_result=True,
        task_publish_retry_policy={"max_retries": 2},
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=1,
        **broker,
    )
    celery.set_default()
    app.extensions["celery"] = celery
    app.extensions["worker"] = worker.Worker(
        app,
        concurrency=number(app, "WORKER_CONCURRENCY", 4),
        deadline=number(app, "WORKER_DEADLINE", 10.0),
    )
    app.cli.add_command(worker.worker_command)


def _broker(app: Flask) -> dict[str, Any]:
    given = os.environ.get("CELERY_BROKER_URL")
    url = app.config.setdefault("CELERY_BROKER_URL", given)
    options: dict[str, object] = {}
    if not url:
        if not (app.debug or app.testing):
            hint = f"set it to {EXAMPLE}, or use `flask --debug` in development."
            refuse(app, f"CELERY_BROKER_URL is not set: {hint}")
            return {}
        url = "filesystem://localhost"
        options = _folders(Path(app.instance_path) / "celery")
    elif url.startswith(("redis", "valkey")):
        seconds = number(app, "CELERY_VISIBILITY_TIMEOUT", 25)
        options["visibility_timeout"] = seconds
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
