"""Run jobs in a thread of this process: for work that you can afford to lose.

Jobs run one after the other, each at most once. When the process exits, waiting and
running jobs have `WORKER_DEADLINE` seconds; in a server that reloads they have none,
because a reload does not wait. The log names the jobs that are lost, unless the process
is killed.
"""

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial, update_wrapper
from inspect import (
    isasyncgenfunction,
    iscoroutinefunction,
    isgeneratorfunction,
    signature,
)
from queue import Full, Queue
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd
from threading import Event, Lock, Thread
from time import monotonic, perf_counter
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar
from weakref import WeakSet

import psycopg2
from flask import Flask, current_app
from flask.ctx import AppContext
from werkzeug.serving import is_running_from_reloader

from .config import Settings, number_setting
from .db import on_commit
from .log import request_id

P = ParamSpec("P")
R = TypeVar("R")

OTHER_FUNCTIONS = isasyncgenfunction, iscoroutinefunction, isgeneratorfunction

SETTINGS: Settings = {
    "WORKER_QUEUE_SIZE": number_setting(1000),
    "WORKER_TIMEOUT": number_setting(1.0),  # seconds
    "WORKER_DEADLINE": number_setting(10.0),  # seconds
}

# Seconds to abort a job at exit. After Ctrl-C, a reloading server has 0.25 s in all.
ABORT_TIMEOUT = 0.15


class QueueFull(RuntimeError):
    """The worker has fallen behind and accepts no job for now."""


class Job(NamedTuple):
    """A call, with the names of the task and of the request, for the log.

    The arguments may be secret, so they are not logged.
    """

    call: partial[Any]
    name: str
    request_id: str


class Task(Generic[P, R]):
    """A function that you call as usual, or in the background with `delay`."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.name = function.__name__
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Run in the background, in an application context of its own.

        It starts once the transaction of `get_db()` is committed, or at once outside of
        one, with a copy of the arguments. Raises `TypeError` if the task does not
        accept them, or if one cannot be copied. If the queue stays full for
        `WORKER_TIMEOUT` seconds, the `with` block raises `QueueFull`, but stays
        committed. Raises `ProgrammingError` in a transaction without a block.
        """
        signature(self.function).bind(*args, **kwargs)
        try:
            call = deepcopy(partial(self.function, *args, **kwargs))
        except Exception as error:  # An uploaded file raises a RecursionError.
            message = f"An argument of {self.name} cannot be copied ({error})"
            raise TypeError(f"{message}: pass ids, text or bytes.") from error
        on_commit(partial(get_worker().put, Job(call, self.name, request_id.get())))


def task(function: Callable[P, R] | None = None, /, **options: Any) -> Task[P, R]:
    """Make a task of a function: `@task`, without options."""
    if function is None:
        message = f"@task has {', '.join(options)}, but a thread has no options"
        raise TypeError(f"{message}: write @task alone.")
    if any(is_other(function) for is_other in OTHER_FUNCTIONS):
        message = f"Task {function.__qualname__} is a coroutine or generator"
        raise TypeError(f"{message}, which nobody runs: write a plain function.")
    return Task(function)


class Worker:
    """Run jobs one after the other, in a thread that the first one starts.

    At most `WORKER_QUEUE_SIZE` jobs wait. A caller waits up to `WORKER_TIMEOUT` seconds
    to add one. At exit, waiting and running jobs have `WORKER_DEADLINE` seconds.
    """

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.size: int = app.config["WORKER_QUEUE_SIZE"]
        self.timeout: float = app.config["WORKER_TIMEOUT"]
        deadline: float = app.config["WORKER_DEADLINE"]
        self.deadline = 0.0 if is_running_from_reloader() else deadline
        self.reset_after_fork()
        workers.add(self)

    def reset_after_fork(self) -> None:
        """Start without jobs and without a thread."""
        # A forked process inherits no thread, and its parent runs the jobs.
        self.thread: Thread | None = None
        self._starting = Lock()
        self._ending = Event()
        self._aborting = Event()
        self._queue: Queue[Job | None] = Queue(self.size)
        self._job: Job | None = None
        self._context: AppContext | None = None

    def put(self, job: Job) -> None:
        """Add a job. Raises `QueueFull`."""
        if self._ending.is_set():
            return self._log_lost([job])
        with self._starting:
            # A handler of the log that raises ends the thread.
            if not (self.thread and self.thread.is_alive()):
                self._start()
        try:
            self._queue.put(job, timeout=self.timeout)
        except Full:
            message = f"{job.name} found no place in the queue in {self.timeout:g} s"
            hint = f"raise WORKER_QUEUE_SIZE ({self.size}) or WORKER_TIMEOUT."
            raise QueueFull(f"{message}: {hint}") from None

    def run_waiting(self) -> None:
        """Wait for the jobs and those that they enqueue: for tests."""
        self._queue.join()

    def status(self) -> dict[str, int]:
        """Count the waiting and running jobs of this process."""
        return {"waiting": self._queue.qsize(), "running": int(self._job is not None)}

    def stop(self) -> None:
        """Stop within `deadline` seconds, and log the names of the lost jobs."""
        atexit.unregister(self.stop)
        self._ending.set()
        self._shut_down(self.deadline)
        with self._queue.mutex:  # The thread takes no job meanwhile.
            waiting = list(self._queue.queue)
            self._queue.queue.clear()
        self._abort_query()
        self._shut_down(ABORT_TIMEOUT)
        self._log_lost([self._job, *waiting])

    def _start(self) -> None:
        # Python joins all threads but daemons before it runs exit hooks. Otherwise the
        # process would wait forever for this one, which the hook `stop` ends.
        self.thread = Thread(target=self._run, name="worker", daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def _run(self) -> None:
        while job := self._queue.get():
            self._job = job
            try:
                self._run_job(job)
            finally:
                self._queue.task_done()

    def _run_job(self, job: Job) -> None:
        request_id.set(job.request_id)
        began = perf_counter()
        try:
            with self.app.app_context() as self._context:
                job.call()
            ms = round(1000 * (perf_counter() - began), 1)
            parts = {"task": job.name, "ms": ms}
            self.app.logger.info("Task %(task)s succeeded in %(ms)s ms", parts)
        except BaseException:  # Not even SystemExit ends the worker.
            if self._aborting.is_set():
                return  # `stop` logs its name.
            self.app.logger.exception("Task %s failed", job.name)
        self._job = None

    def _shut_down(self, seconds: float) -> None:
        end = monotonic() + seconds
        with suppress(Full):
            self._queue.put(None, timeout=seconds)  # None ends the thread.
        if self.thread:
            self.thread.join(max(end - monotonic(), 0.0))

    def _abort_query(self) -> None:
        self._aborting.set()
        # The running query fails here at once. Within 0.5 s, the server notices and
        # rolls back. `cancel` would make the process wait for the server.
        db = self._context.g.get("db") if self._context else None
        with suppress(psycopg2.Error, OSError):
            if db and self._job:
                with fromfd(db.fileno(), AF_INET, SOCK_STREAM) as socket:
                    socket.shutdown(SHUT_RDWR)

    def _log_lost(self, jobs: list[Job | None]) -> None:
        if names := [job.name for job in jobs if job]:
            self.app.logger.warning("Jobs lost at exit: %s", ", ".join(names))


# The hook of the process must not keep the workers of former applications.
workers: WeakSet[Worker] = WeakSet()


def _reset_all() -> None:
    for worker in list(workers):
        worker.reset_after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=_reset_all)


def get_worker() -> Worker:
    """Return the worker of the current application in this process."""
    worker: Worker = current_app.extensions["worker"]
    return worker


def init_app(app: Flask) -> None:
    """Give `app` a worker. The first job starts its thread."""
    app.extensions["worker"] = Worker(app)
