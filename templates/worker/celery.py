"""`flask worker`: run the tasks, and look at them."""

import json
import os
import time
from collections.abc import Iterable
from threading import Timer
from typing import Any

import click
from celery import Celery, Task, signals
from flask import Flask, current_app
from flask.cli import with_appcontext
from kombu.exceptions import OperationalError as BrokerError
from kombu.transport import redis
from kombu.utils.json import dumps
from psycopg2.errors import UndefinedTable
from psycopg2.extras import Json

from .db import get_db
from .log import request_id

# Kombu gives back what runs when the connection is lost: by that connection, which ends
# the worker. On Redis the visibility timeout does it.
redis.QoS.restore_at_shutdown = False

ANSWER = 0.5  # seconds that workers have to say that they live


@signals.before_task_publish.connect
def note_origin(headers: dict[str, object], **_: object) -> None:
    """Note when the task was sent, and in which request."""
    headers["sent_at"] = time.time()
    headers["request_id"] = request_id.get()


def task_class(app: Flask) -> type[Task[Any, Any]]:
    """Return the class of the tasks of `app`, each run in a context of its own."""

    # From Redis, what waits for its time longer than this is given to all workers.
    longest = app.config.get("CELERY_VISIBILITY_TIMEOUT")

    class ContextTask(Task[Any, Any]):
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


class Worker:
    """Run tasks, `concurrency` at a time, each in an application context of its own.

    At its end those that run have `deadline` seconds.
    """

    def __init__(self, app: Flask, concurrency: int, deadline: float) -> None:
        self.app = app
        self.concurrency = concurrency
        self.deadline = deadline

    def run(self) -> None:
        """Run tasks until SIGTERM or SIGINT; wait for the broker where it is away."""
        signals.worker_shutting_down.connect(self._end, weak=False)
        options = ["--pool=threads", f"--concurrency={self.concurrency}"]
        options += ["--loglevel=WARNING", "--without-gossip", "--without-mingle"]
        options += [f"--hostname={os.getpid()}@%h"]  # others may be on this machine
        self._celery.worker_main(["--quiet", "worker", *options])

    def status(self) -> dict[str, int]:
        """Return how many tasks wait, run and have failed, and how many workers live.

        `oldest_seconds` is how long ago the first of those that wait was sent, where
        the broker is Redis. What runs is asked of the workers, which takes `ANSWER`
        seconds, and cannot be where tasks are files.
        """
        with self._celery.connection_for_read() as conn:
            status = _waiting(conn, self._celery.amqp.queues.values())
            if conn.transport.driver_type != "filesystem":
                inspect = self._celery.control.inspect(connection=conn, timeout=ANSWER)
                active = inspect.active() or {}
                status["running"] = sum(map(len, active.values()))
                status["workers"] = len(active)
        return status | {"failed": len(self.failed())}

    def failed(self) -> dict[str, str]:
        """Return the failed tasks: their calls by their ids."""
        with get_db().cursor() as cursor:
            cursor.execute("SELECT id, name, args, kwargs FROM failed_tasks")
            return {id: f"{name} {args} {kwargs}" for id, name, args, kwargs in cursor}

    def retry(self, job: str) -> None:
        """Send a failed task again. Raises `ClickException` where it is none."""
        with get_db() as db, db.cursor() as cursor:
            cursor.execute(
                "DELETE FROM failed_tasks WHERE id = %s RETURNING name, args, kwargs",
                [job],
            )
            if not cursor.rowcount:
                message = f"No failed task has the id {job}: see --failed."
                raise click.ClickException(message)
            [(name, args, kwargs)] = cursor.fetchall()
            self._celery.send_task(name, args, kwargs, task_id=job)

    @property
    def _celery(self) -> Celery:
        app: Celery = self.app.extensions["celery"]
        return app

    def _end(self, **_: Any) -> None:
        timer = Timer(self.deadline, self._cut_off)
        timer.daemon = True
        timer.start()

    def _cut_off(self) -> None:
        # Nothing else ends a thread. What it did and did not commit is rolled back.
        message = "Tasks that did not end in %g s are cut off, to be begun again"
        self.app.logger.warning(message, self.deadline)
        os._exit(1)


def _note_failure(id: str, name: str, args: Any, kwargs: Any) -> None:
    with get_db().cursor() as cursor:
        cursor.execute(
            "INSERT INTO failed_tasks (id, name, args, kwargs)"
            " VALUES (%s, %s, %s, %s) ON CONFLICT (id) DO NOTHING",
            [id, name, Json(args, dumps=dumps), Json(kwargs, dumps=dumps)],
        )


def _waiting(conn: Any, all_queues: Iterable[Any]) -> dict[str, int]:
    queues = [queue(conn.default_channel) for queue in all_queues]
    waiting = sum(queue.queue_declare().message_count for queue in queues)
    if conn.transport.driver_type != "redis":
        return {"waiting": waiting}
    client = conn.default_channel.client
    oldest = [client.lindex(queue.name, -1) for queue in queues]
    sent = [json.loads(task)["headers"]["sent_at"] for task in oldest if task]
    seconds = time.time() - min(sent, default=time.time())
    return {"waiting": waiting, "oldest_seconds": int(seconds)}


@click.command("worker")
@click.option("--status", is_flag=True, help="Count the tasks and the workers.")
@click.option("--failed", is_flag=True, help="List the tasks that have failed.")
@click.option("--retry", metavar="ID", help="Send a failed task again.")
@with_appcontext
def worker_command(status: bool, failed: bool, retry: str | None) -> None:
    """Run tasks in the background until SIGTERM, or look at them."""
    if status or failed or retry is not None:
        _look(status, failed, retry)
    else:
        current_app.extensions["worker"].run()


def _look(status: bool, failed: bool, retry: str | None) -> None:
    worker = current_app.extensions["worker"]
    try:
        if status:
            found = worker.status().items()
            click.echo("\n".join(f"{name}: {figure}" for name, figure in found))
        elif failed:
            found = worker.failed().items()
            click.echo("\n".join(f"{id} {call}" for id, call in found))
        else:
            worker.retry(retry)
    except UndefinedTable as error:
        message = "A migration is missing: run `flask migrate`."
        raise click.ClickException(message) from error
    except BrokerError as error:
        hint = "is it right, and does a broker run there?"
        raise click.ClickException(f"CELERY_BROKER_URL: {error}: {hint}") from error
