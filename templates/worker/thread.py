"""Work in the background, in a thread of this process: for work that may be lost.

A task runs at most once. What waits or runs when the process ends is lost, and named
in the log; when the process is killed, not even that.
"""

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Lock, Thread
from typing import Any, Generic, ParamSpec

import psycopg2
from flask import Flask, current_app
from flask.ctx import AppContext

from .config import number

P = ParamSpec("P")

# Seconds to end a task at exit. Ctrl-C leaves a reloading server 0.25 s in all.
DEADLINE = 0.15


class QueueFull(RuntimeError):
    """The worker has fallen behind and takes no task for now."""


@dataclass(frozen=True)
class Job:
    """A task and the arguments of one call of it."""

    function: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        arguments = [repr(value) for value in self.args]
        arguments += [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return f"{self.function.__name__}({', '.join(arguments)})"

    def run(self) -> None:
        self.function(*self.args, **self.kwargs)


class Task(Generic[P]):
    """A function that can be called as ever, or put off with `delay`."""

    def __init__(self, function: Callable[P, object]) -> None:
        self.function = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        self.function(*args, **kwargs)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Run in the background, in an application context of its own.

        Call it after the transaction it relies on: it may start at once. Raises
        `QueueFull` when no place came free in `WORKER_TIMEOUT` seconds.
        """
        current_app.extensions["worker"].put(Job(self.function, args, kwargs))


def task(function: Callable[P, object]) -> Task[P]:
    """Make a task of a function: `@task`."""
    return Task(function)


class Worker:
    """Run jobs one after the other, in a thread that the first one starts.

    `size` jobs at most wait; `timeout` is how many seconds a caller waits to add one.
    """

    def __init__(self, app: Flask, size: int, timeout: float) -> None:
        self.app = app
        self.size = size
        self.timeout = timeout
        self._reset()
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        # A forked process inherits no thread; the jobs are its parent's to run.
        self._queue: Queue[Job | None] = Queue(self.size)
        self._ending = Event()
        self._starting = Lock()
        self.thread: Thread | None = None
        self._job: Job | None = None
        self._context: AppContext | None = None

    def put(self, job: Job) -> None:
        """Add a job. Raises `QueueFull`."""
        with self._starting:
            if self.thread is None:
                self._start()
        try:
            self._queue.put(job, timeout=self.timeout)
        except Full:
            message = f"{job} found no place in WORKER_TIMEOUT ({self.timeout:g} s)"
            hint = f"raise WORKER_QUEUE_SIZE ({self.size}) or give fewer tasks."
            raise QueueFull(f"{message}: {hint}") from None

    def stop(self) -> None:
        """End within `DEADLINE` seconds, and name the jobs that are lost in the log."""
        atexit.unregister(self.stop)
        if self.thread is None:
            return
        self._ending.set()
        waiting = _drain(self._queue)
        with suppress(Full):
            self._queue.put_nowait(None)  # wakes the thread where it waits for a job
        self._cancel_query()
        self.thread.join(DEADLINE)
        if lost := [str(job) for job in [self._job, *waiting] if job]:
            self.app.logger.warning("Lost as the process ends: %s", ", ".join(lost))

    def _start(self) -> None:
        # A daemon, for Python joins all other threads before it runs exit hooks: one
        # that `stop` is to end would keep the process, and with it the reload, waiting.
        self.thread = Thread(target=self._run, name="worker", daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def _run(self) -> None:
        while not self._ending.is_set():
            self._job = self._queue.get()
            if self._job:
                self._run_job(self._job)

    def _run_job(self, job: Job) -> None:
        try:
            with self.app.app_context() as self._context:
                job.run()
        except Exception:
            if self._ending.is_set():
                return  # cut off: `stop` names it
            self.app.logger.exception("%s failed", job)
        self._job = None

    def _cancel_query(self) -> None:
        db = self._context.g.get("db") if self._context else None
        if db:
            with suppress(psycopg2.Error):
                db.cancel()


def _drain(queue: Queue[Job | None]) -> list[Job | None]:
    jobs = []
    with suppress(Empty):
        while True:
            jobs.append(queue.get_nowait())
    return jobs


def init_app(app: Flask) -> None:
    """Give `app` a worker; its thread starts with the first task."""
    app.extensions["worker"] = Worker(
        app,
        size=number(app, "WORKER_QUEUE_SIZE", 1000),
        timeout=number(app, "WORKER_TIMEOUT", 1.0),
    )
