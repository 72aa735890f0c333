"""procrastinate's part of `flask worker`."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from signal import SIGINT, SIGTERM, signal
from threading import Event, Thread
from typing import Any

import procrastinate
import psycopg
from flask import Flask
from procrastinate import JobContext, cli
from procrastinate.exceptions import ConnectorException, UniqueViolation
from procrastinate.jobs import Job, Status
from procrastinate.manager import JobManager
from procrastinate.periodic import PeriodicRegistry
from procrastinate.worker import Worker as EngineWorker
from psycopg.conninfo import make_conninfo
from psycopg.errors import UndefinedFunction, UndefinedTable
from psycopg2.extras import RealDictCursor
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from .db import DatabaseUnavailable, connect, connection_parameters, get_db
from .jobs import ContextConnector, queue
from .log import request_id
from .migrate import find_problem
from .serve import end_forks_at_signals

logger = logging.getLogger(__name__)

ENGINE_ERRORS = (ConnectorException,)
HEARTBEAT_INTERVAL = 2.0  # seconds
STALLED_AFTER = 15.0  # seconds without a heartbeat until others requeue a worker's jobs
MAX_INTERRUPTIONS = 6  # killed workers, after which their job counts as failed
RECONNECT_DELAY = 3.0  # seconds
WARNING_INTERVAL = 60.0  # seconds between two lines about the same outage
CONNECTION_ERRORS = (psycopg.OperationalError, psycopg.InterfaceError)
# asyncio would take these errors of a thread for its own, and the job would never end.
ASYNCIO_ERRORS = (StopIteration, asyncio.CancelledError, CancelledError)

in_job: ContextVar[bool] = ContextVar("in_job", default=False)

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

FAILED = """
SELECT jobs.id::text,
    concat_ws(' ', max(at)::timestamptz(0), task_name, left(args::text, 200))
FROM procrastinate_jobs jobs LEFT JOIN procrastinate_events ON job_id = jobs.id
WHERE status = 'failed' GROUP BY jobs.id ORDER BY max(at)
"""

# The condition on the worker keeps two workers from requeueing a job twice. From the
# third time on, the lock separates a job that kills its workers from its neighbors. The
# events count the interruptions, as `attempts` counts the job's own failures.
REQUEUE = """
WITH requeued AS (
    UPDATE procrastinate_jobs AS job SET
        status = (CASE WHEN abort_requested OR interruptions + 1 >= %(limit)s
                OR EXISTS (SELECT FROM procrastinate_jobs AS other WHERE
                    other.status = 'todo' AND other.queueing_lock = job.queueing_lock)
            THEN 'failed' ELSE 'todo' END)::procrastinate_job_status,
        lock = CASE WHEN interruptions < 2 THEN lock
            ELSE coalesce(lock, 'interrupted in ' || queue_name) END,
        scheduled_at = now()
    FROM (SELECT count(*) AS interruptions FROM procrastinate_events
        WHERE job_id = %(id)s AND type = 'aborted') AS counted
    WHERE id = %(id)s AND status = 'doing'
        AND worker_id IS NOT DISTINCT FROM %(worker_id)s
    RETURNING id, status
), noted AS (
    INSERT INTO procrastinate_events (job_id, type) SELECT id, 'aborted' FROM requeued
)
SELECT status FROM requeued
"""


class Pool(AsyncConnectionPool):
    """Wait for PostgreSQL for as long as it takes.

    After an error, the worker would take no other job until its running jobs end.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(timeout=5.0, reconnect_timeout=5.0, **options)
        self._warned = -WARNING_INTERVAL

    async def getconn(self, timeout: float | None = None) -> psycopg.AsyncConnection:
        while True:
            with suppress(PoolTimeout):
                return await super().getconn(timeout)
            if (now := time.monotonic()) - self._warned >= WARNING_INTERVAL:
                self._warned = now
                logger.warning("Waiting for a connection to PostgreSQL")


class Connector(procrastinate.PsycopgConnector):
    """Run a worker's queries on connections of its own, and those of a job on its."""

    def get_sync_connector(self) -> ContextConnector:
        return ContextConnector()

    async def open_async(self, pool: Any = None) -> None:
        await super().open_async(pool)
        queue.connector = queue.job_manager.connector = self

    async def close_async(self) -> None:
        queue.connector = queue.job_manager.connector = self.get_sync_connector()
        await super().close_async()

    async def execute_query_all_async(self, query: str, **arguments: Any) -> Any:
        if in_job.get():  # It may be in a transaction.
            return ContextConnector().execute_query_all(query, **arguments)
        return await super().execute_query_all_async(query, **arguments)

    async def execute_query_one_async(self, query: str, **arguments: Any) -> Any:
        if in_job.get():
            return ContextConnector().execute_query_one(query, **arguments)
        return await super().execute_query_one_async(query, **arguments)

    async def execute_query_async(self, query: str, **arguments: Any) -> None:
        # Without a retry, a job whose end is not recorded would count as running for as
        # long as this worker lives. Heartbeats also come here.
        await _retry_if_lost(super().execute_query_async, query, **arguments)

    async def listen_notify(self, *args: Any, **kwargs: Any) -> None:
        # The engine would stop the worker. Until this reconnects, the worker polls.
        await _retry_if_lost(super().listen_notify, *args, **kwargs)


async def _retry_if_lost(method: Any, *args: Any, **kwargs: Any) -> None:
    while True:
        try:
            return await method(*args, **kwargs)  # type: ignore[no-any-return]
        except ConnectorException as error:
            if not isinstance(error.__cause__, CONNECTION_ERRORS):
                raise
        await asyncio.sleep(1.0)


class Jobs(JobManager):
    """Fail a job that can be neither retried nor finished."""

    async def retry_job(self: Any, job: Job, *args: Any, **kwargs: Any) -> None:
        try:
            await super().retry_job(job, *args, **kwargs)
        except UniqueViolation:
            message = "Job %d (%s) fails: another one with its queueing lock waits"
            logger.warning(message, job.id, job.task_name)
            await self.finish_job(job, Status.FAILED, delete_job=False)


class WorkerQueue(procrastinate.App):
    """The queue as `flask worker` and procrastinate's own command use it.

    When the worker stops, running jobs have `WORKER_DEADLINE` seconds.
    """

    def __init__(self, app: Flask) -> None:
        self.flask_app = app
        super().__init__(
            connector=Connector(
                pool_factory=Pool, conninfo=self._conninfo, configure=_autocommit
            ),
            import_paths=queue.import_paths,
            worker_defaults={
                "concurrency": app.config["WORKER_CONCURRENCY"],
                "delete_jobs": "successful",
                "fetch_job_polling_interval": 2.0,
                "stalled_worker_timeout": STALLED_AFTER,
                "task_middleware": [self._run, self._run_async],
            },
        )
        logging.getLogger("procrastinate.worker").addFilter(_drop_arguments)
        # In an outage, it warns of each connection each second.
        logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
        self.job_manager = Jobs(self.connector)
        self.tasks = queue.tasks
        self.periodic_registry = queue.periodic_registry
        self.stopping = Event()
        self.started = 0  # jobs
        self._stop: Callable[[], object] = bool

    def _conninfo(self) -> str:
        # A password may change, and a server may reject the startup options.
        with self.flask_app.app_context():
            return make_conninfo(**connection_parameters())

    async def run_worker_async(self, **options: Any) -> None:
        """Run a worker, and requeue the jobs of stalled workers."""
        self.perform_import_paths()  # type: ignore[no-untyped-call]
        if options.pop("install_signal_handlers", True):
            self.handle_signals()
        options = {**self.worker_defaults, **options}
        worker: Any = EngineWorker(app=self, install_signal_handlers=False, **options)
        loop = asyncio.get_running_loop()
        # Psycopg also resolves host names in this executor, while all jobs run.
        loop.set_default_executor(ThreadPoolExecutor(worker.concurrency + 2))
        helper = asyncio.create_task(self._requeue_stalled_jobs(worker))
        self._stop = partial(loop.call_soon_threadsafe, worker.stop)
        try:
            if not self.stopping.is_set():
                await worker.run()
        finally:
            self._stop = bool
            helper.cancel()

    def handle_signals(self) -> None:
        """Stop the worker at SIGTERM and SIGINT, which may come twice."""
        for number in (SIGINT, SIGTERM):
            signal(number, self._on_signal)
        end_forks_at_signals()

    def _on_signal(self, *_: object) -> None:
        Thread(target=self._force_exit, daemon=True).start()
        self.stopping.set()
        self._stop()

    def _force_exit(self) -> None:
        time.sleep(self.flask_app.config["WORKER_DEADLINE"])
        # Nothing else stops a thread. Its transaction is rolled back.
        message = "WORKER_DEADLINE has passed; jobs that still run will run again"
        logger.warning(message)
        os._exit(1)

    def _run(self, run: Callable[[], Any], context: JobContext, _: object) -> Any:
        with self._job_context(context):
            try:
                return run()
            except ASYNCIO_ERRORS as error:
                raise RuntimeError(f"The task raised {error!r}") from error

    async def _run_async(
        self, run: Callable[[], Awaitable[Any]], context: JobContext, _: object
    ) -> Any:
        with self._job_context(context):
            try:
                return await run()
            except asyncio.CancelledError as error:
                if (task := asyncio.current_task()) and task.cancelling():
                    raise  # The job is aborted.
                raise RuntimeError(f"The task raised {error!r}") from error

    @contextmanager
    def _job_context(self, context: JobContext) -> Iterator[None]:
        job = context.job
        self.started += 1
        request_id.set(f"job-{job.id}")
        token = in_job.set(True)
        began = time.perf_counter()
        parts: dict[str, object] = {"job_id": job.id, "task": job.task_name}
        try:
            with self.flask_app.app_context():
                yield
            parts["ms"] = round(1000 * (time.perf_counter() - began), 1)
            logger.info("Job %(job_id)d (%(task)s) succeeded in %(ms)s ms", parts)
        except Exception as error:
            # The engine logs only the last failure above INFO.
            if context.task.get_retry_exception(error, job):
                parts["error"] = type(error).__name__
                message = "Job %(job_id)d (%(task)s) is retried after %(error)s"
                is_shown = self.flask_app.debug or self.flask_app.testing
                logger.warning(message, parts, exc_info=is_shown)
            raise
        finally:
            in_job.reset(token)

    async def _requeue_stalled_jobs(self, worker: EngineWorker) -> None:
        # A periodic job would wait behind other jobs. The engine's own heartbeat ends
        # when the worker is told to stop, though its jobs still run.
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL)
            with suppress(ConnectorException):
                if worker.worker_id is not None:
                    await self.job_manager.update_heartbeat(worker.worker_id)
                for job in await self.job_manager.get_stalled_jobs(
                    seconds_since_heartbeat=STALLED_AFTER
                ):
                    await self._requeue(job)

    async def _requeue(self, job: Job) -> None:
        with suppress(ConnectorException):  # An error must not delay the other jobs.
            # In development, each save may kill the worker of a long job.
            limit = sys.maxsize if self.flask_app.debug else MAX_INTERRUPTIONS
            for row in await self.connector.execute_query_all_async(
                REQUEUE, id=job.id, worker_id=job.worker_id, limit=limit
            ):
                parts = {"job_id": job.id, "task": job.task_name, **row}
                line = "Job %(job_id)d (%(task)s) lost its worker and is now %(status)s"
                logger.warning(line, parts)


class Worker:
    """Run the jobs, each in an application context of its own, and manage them."""

    def __init__(self, app: Flask) -> None:
        self.app = app

    def run(self, arguments: tuple[str, ...] = ()) -> None:
        """Run jobs until SIGTERM or SIGINT; wait while PostgreSQL is away.

        `arguments` are those of `procrastinate worker`.
        """
        parser = cli.add_arguments(cli.create_parser(), include_app=False)
        options = vars(parser.parse_args(["worker", *arguments]))
        del options["command"], options["func"]
        queue = WorkerQueue(self.app)
        queue.handle_signals()
        logged = ""
        while not queue.stopping.is_set():
            try:
                _check_database()
                logged = ""
                queue.run_worker(**options)
                if not options.get("wait", True):
                    return
            except (DatabaseUnavailable, ConnectorException, PoolTimeout) as error:
                cause = error.__cause__
                # During `flask migrate --reset`, the functions and tables are missing.
                is_reset = isinstance(cause, (UndefinedFunction, UndefinedTable))
                if isinstance(cause, psycopg.ProgrammingError) and not is_reset:
                    raise
                reason = str(cause or error).partition("\n")[0]
                if reason != logged:
                    logger.warning("Retrying every %g s: %s", RECONNECT_DELAY, reason)
                logged = reason
            queue.stopping.wait(RECONNECT_DELAY)

    def run_waiting(self) -> None:
        """Run the waiting jobs and those that they enqueue, for tests."""
        queue, before = WorkerQueue(self.app), -1
        # Otherwise the engine would also enqueue the periodic jobs that are due.
        queue.periodic_registry = PeriodicRegistry()  # type: ignore[no-untyped-call]
        while queue.started > before:
            before = queue.started
            queue.run_worker(wait=False, install_signal_handlers=False)

    def status(self) -> dict[str, int]:
        """Count the jobs that wait, run and have failed, and the workers.

        `oldest_seconds` is the time that the oldest waiting job has waited. `later`
        counts the jobs that are scheduled for later.
        """
        with get_db().cursor(cursor_factory=RealDictCursor) as cursor:
            cursor.execute(STATUS, [STALLED_AFTER])
            return dict(cursor.fetchall()[0])

    def failed(self) -> dict[str, str]:
        """Return the time and the call of each failed job by id.

        The log has the error, on the lines of `job-` and the id.
        """
        with get_db().cursor() as cursor:
            cursor.execute(FAILED)
            return {job: call for job, call in cursor}

    def retry(self, job: str) -> None:
        """Requeue a failed job."""
        queue.job_manager.retry_job_by_id(int(job), retry_at=datetime.now(UTC))


async def _autocommit(conn: psycopg.AsyncConnection) -> None:
    # Each query of the engine is one statement: BEGIN and COMMIT would only take time.
    await conn.set_autocommit(True)


def _check_database() -> None:
    with closing(connect()) as conn:
        if problem := find_problem(conn):
            raise DatabaseUnavailable(problem)


def _drop_arguments(record: logging.LogRecord) -> bool:
    """Keep the arguments of a job, which may be secret, out of the engine's log."""
    if job := getattr(record, "job", None):
        name = f"{job['task_name']}[{job['id']}]"
        record.msg = str(record.msg).replace(job["call_string"], name)
    return True
