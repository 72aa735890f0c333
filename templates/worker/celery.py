"""`flask worker`: run the tasks, and look at them."""

import json
import os
import time
from collections.abc import Iterable
from threading import Timer
from typing import Any

import click
from celery import signals
from flask import Flask, current_app
from flask.cli import with_appcontext
from kombu.exceptions import OperationalError as BrokerError
from kombu.transport import redis
from psycopg2.errors import UndefinedTable

from .config import Settings, number_setting
from .db import get_db
from .jobs import get_celery

# Kombu gives back what runs when the connection is lost: by that connection, which ends
# the worker. On Redis the visibility timeout does it.
redis.QoS.restore_at_shutdown = False

SETTINGS: Settings = {
    "WORKER_CONCURRENCY": number_setting(4),
    "WORKER_DEADLINE": number_setting(10.0),  # seconds
}

ANSWER = 0.5  # seconds that workers have to say that they live


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
        get_celery().worker_main(["--quiet", "worker", *options])

    def status(self) -> dict[str, int]:
        """Return how many tasks wait, run and have failed, and how many workers live.

        `oldest_seconds` is how long ago the first of those that wait was sent, where
        the broker is Redis. What runs is asked of the workers, which takes `ANSWER`
        seconds, and cannot be where tasks are files.
        """
        with get_celery().connection_for_read() as conn:
            status = _waiting(conn, get_celery().amqp.queues.values())
            if conn.transport.driver_type != "filesystem":
                inspect = get_celery().control.inspect(connection=conn, timeout=ANSWER)
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
            get_celery().send_task(name, args, kwargs, task_id=job)

    def _end(self, **_: Any) -> None:
        timer = Timer(self.deadline, self._cut_off)
        timer.daemon = True
        timer.start()

    def _cut_off(self) -> None:
        # Nothing else ends a thread. What it did and did not commit is rolled back.
        message = "Tasks that did not end in %g s are cut off, to be begun again"
        self.app.logger.warning(message, self.deadline)
        os._exit(1)


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
        get_worker().run()


def _look(status: bool, failed: bool, retry: str | None) -> None:
    worker = get_worker()
    try:
        if status:
            figures = worker.status().items()
            click.echo("\n".join(f"{name}: {figure}" for name, figure in figures))
        elif failed:
            found = worker.failed().items()
            click.echo("\n".join(f"{id} {call}" for id, call in found))
        elif retry is not None:
            worker.retry(retry)
    except UndefinedTable as error:
        message = "A migration is missing: run `flask migrate`."
        raise click.ClickException(message) from error
    except BrokerError as error:
        hint = "is it right, and does a broker run there?"
        raise click.ClickException(f"CELERY_BROKER_URL: {error}: {hint}") from error


def get_worker() -> Worker:
    """Return the worker of the current application."""
    worker: Worker = current_app.extensions["worker"]
    return worker


def init_app(app: Flask) -> None:
    """Add the command `flask worker` to `app`."""
    app.extensions["worker"] = Worker(
        app,
        concurrency=app.config["WORKER_CONCURRENCY"],
        deadline=app.config["WORKER_DEADLINE"],
    )
    app.cli.add_command(worker_command)
