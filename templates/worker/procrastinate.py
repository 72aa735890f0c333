"""`flask worker`: run the jobs, and look at them."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from signal import SIGINT, SIGTERM, signal
from threading import Event
from time import monotonic
from typing import Any

import click
from flask import Flask, current_app
from flask.cli import with_appcontext
from procrastinate import JobContext
from procrastinate.exceptions import ConnectorException
from psycopg.conninfo import make_conninfo
from psycopg2.errors import UndefinedTable
from psycopg2.extras import RealDictCursor
from psycopg_pool import PoolTimeout

from .config import Settings, number_setting
from .db import (
    DatabaseUnavailable,
    connect,
    connection_parameters,
    database_url,
    get_db,
)
from .jobs import REQUEST, Connector, queue
from .log import request_id
from .migrate import missing

SETTINGS: Settings = {
    "WORKER_CONCURRENCY": number_setting(4),
    "WORKER_DEADLINE": number_setting(10.0),  # seconds
}

HEARTBEAT = 3.0  # seconds between two signs of life of a worker
STALLED = 12.0  # seconds without any, after which its jobs are given to others
LOOK = 2.0  # seconds between two looks for such jobs
PATIENCE = 30.0  # seconds that a query waits for PostgreSQL, and a worker at most

STATUS = """
SELECT count(*) FILTER (WHERE status = 'todo' AND NOT later) AS waiting,
    count(*) FILTER (WHERE status = 'todo' AND later) AS later,
    count(*) FILTER (WHERE status = 'doing') AS running,
    count(*) FILTER (WHERE status = 'failed') AS failed,
    coalesce(extract(epoch FROM now() - min(greatest(at, scheduled_at))
        FILTER (WHERE status = 'todo' AND NOT later)), 0)::int AS oldest_seconds,
    (SELECT count(*) FROM procrastinate_workers
        WHERE last_heartbeat > now() - %s * interval '1 second') AS workers
FROM procrastinate_jobs jobs
LEFT JOIN procrastinate_events ON job_id = jobs.id AND type = 'deferred'
CROSS JOIN LATERAL (SELECT coalesce(scheduled_at > now(), false) AS later) AS given
"""


class Worker:
    """Run jobs, `concurrency` at a time, each in an application context of its own.

    At its end those that run have `deadline` seconds.
    """

    def __init__(self, app: Flask, concurrency: int, deadline: float) -> None:
        self.app = app
        self.concurrency = concurrency
        self.deadline = deadline
        self._ending = Event()
        self._working: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Run jobs until SIGTERM or SIGINT; wait for PostgreSQL where it is away."""
        for number in (SIGINT, SIGTERM):
            signal(number, self._end)
        pause = 1.0
        while not self._ending.is_set():
            began = monotonic()
            try:
                _check_database()
                asyncio.run(self._work())
            except (DatabaseUnavailable, ConnectorException, PoolTimeout) as error:
                reason = str(error.__cause__ or error).partition("\n")[0]
                self.app.logger.warning("Again in %g s, after: %s", pause, reason)
            self._ending.wait(pause)
            pause = min(2 * pause, PATIENCE) if monotonic() - began < PATIENCE else 1.0

    def run_waiting(self) -> None:
        """Run the jobs that wait, and return: for tests, which need no worker then."""
        asyncio.run(self._work(wait=False))

    def status(self) -> dict[str, int]:
        """Return how many jobs wait, run and have failed, and how many workers live.

        `oldest_seconds` is how long the first has waited; `later` is how many are not
        to begin yet.
        """
        with get_db().cursor(cursor_factory=RealDictCursor) as cursor:
            cursor.execute(STATUS, [STALLED])
            [row] = cursor.fetchall()
        return dict(row)

    def failed(self) -> dict[int, str]:
        """Return the failed jobs: their calls by their ids."""
        found = queue.job_manager.list_jobs(status="failed")
        return {job.id: job.call_string for job in found if job.id}

    def retry(self, job: int) -> None:
        """Put a failed job back into the queue. Raises `ClickException` for others."""
        if job not in self.failed():
            raise click.ClickException(f"No failed job has the id {job}: see --failed.")
        queue.job_manager.retry_job_by_id(job, retry_at=datetime.now(UTC))

    async def _work(self, wait: bool = True) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(self.concurrency))
        with self.app.app_context():
            dsn = make_conninfo(**connection_parameters(database_url()))
        own = Connector(conninfo=dsn, timeout=PATIENCE)
        work = queue.run_worker_async(
            concurrency=self.concurrency,
            delete_jobs="successful",
            install_signal_handlers=False,
            stalled_worker_timeout=STALLED,
            task_middleware=[self._run_in_context],
            update_heartbeat_interval=HEARTBEAT,
            wait=wait,
        )
        with queue.replace_connector(own):
            async with queue.open_async():
                looking = asyncio.create_task(_put_back_stalled_jobs())
                self._working = asyncio.create_task(work)
                if self._ending.is_set():  # since a signal that came meanwhile
                    self._finish(self._working)
                try:
                    with suppress(asyncio.CancelledError):
                        await self._working
                finally:
                    looking.cancel()
                    self._working = None

    def _run_in_context(
        self, run: Callable[[], Any], context: JobContext, _: object
    ) -> Any:
        request_id.set(str(context.job.task_kwargs.pop(REQUEST, "-")))
        with self.app.app_context():
            return run()

    def _end(self, *_: object) -> None:
        self._ending.set()
        if self._working:
            loop = self._working.get_loop()
            loop.call_soon_threadsafe(self._finish, self._working)

    def _finish(self, working: asyncio.Task[None]) -> None:
        working.cancel()  # which lets the jobs that run finish
        working.get_loop().call_later(self.deadline, self._cut_off)

    def _cut_off(self) -> None:
        # Nothing else ends a thread. What it did and did not commit is rolled back.
        message = "Jobs that did not end in %g s are cut off, to be begun again"
        self.app.logger.warning(message, self.deadline)
        os._exit(1)


def _check_database() -> None:
    with closing(connect()) as conn:
        names = missing(conn)
    if names:
        message = f"{len(names)} migrations are missing"
        raise DatabaseUnavailable(f"{message}: run `flask migrate`.")


async def _put_back_stalled_jobs() -> None:
    # Not by a periodic job, which would wait for those before it.
    manager = queue.job_manager
    while True:
        await asyncio.sleep(LOOK)
        with suppress(ConnectorException, PoolTimeout):  # or another worker was quicker
            for job in await manager.get_stalled_jobs(seconds_since_heartbeat=STALLED):
                await manager.retry_job(job)


@click.command("worker")
@click.option("--status", is_flag=True, help="Count the jobs and the workers.")
@click.option("--failed", is_flag=True, help="List the jobs that have failed.")
@click.option("--retry", type=int, metavar="ID", help="Put a failed job back.")
@with_appcontext
def worker_command(status: bool, failed: bool, retry: int | None) -> None:
    """Run jobs in the background until SIGTERM, or look at them."""
    if status or failed or retry is not None:
        _look(status, failed, retry)
    else:
        get_worker().run()


def _look(status: bool, failed: bool, retry: int | None) -> None:
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
