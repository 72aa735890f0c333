"""A pool of psycopg2 connections: at most `POOL_SIZE` per process."""

import atexit
import os
import selectors
from collections import deque
from contextlib import suppress
from functools import partial
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd, socket
from threading import Condition, Timer
from time import monotonic

import psycopg2
from flask import Flask

from .config import Settings, bool_setting, number_setting
from .db import Connection, DatabaseUnavailable, connect

SETTINGS: Settings = {
    "POOL_SIZE": number_setting(8),
    "POOL_TIMEOUT": number_setting(5.0),  # seconds
    "POOL_RECYCLE": number_setting(1800),  # seconds
    "POOL_RESET": bool_setting(),
}

SKIP_CHECK_WITHIN = 0.005  # seconds since a connection was returned
PING_AFTER_IDLE = 1.0  # seconds since a connection was returned
PING_TIMEOUT = 1.0  # seconds

# It needs one system call where the default selector needs four. Windows has no poll.
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class FairSemaphore:
    """Let `size` threads in at a time, first come, first served.

    `threading.Semaphore` lets a new thread overtake those that wait.
    """

    def __init__(self, size: int) -> None:
        self.free = size
        self.waiting: deque[object] = deque()
        self._changed = Condition()

    def acquire(self, timeout: float) -> bool:
        """Take a slot. Return whether one came free within `timeout` seconds."""
        waiter = object()
        with self._changed:
            if self.free and not self.waiting:
                self.free -= 1
                return True
            self.waiting.append(waiter)
            try:
                is_next = partial(self._is_next, waiter)
                acquired = self._changed.wait_for(is_next, timeout)
                self.free -= acquired
            finally:
                self.waiting.remove(waiter)
                self._changed.notify_all()
            return acquired

    def release(self) -> None:
        """Return a slot."""
        with self._changed:
            self.free += 1
            if self.waiting:
                self._changed.notify_all()

    def _is_next(self, waiter: object) -> bool:
        return self.free > 0 and self.waiting[0] is waiter


class Pool:
    """Lend each connection to one context at a time.

    `size` is the maximum number of connections. Each is opened when first needed and
    replaced when it is `recycle` seconds old. A context waits `timeout` seconds for
    one. `reset` undoes what queries changed in a session (`SET`, advisory locks,
    temporary tables, `LISTEN`). It costs each context a round trip, as much as a read
    does. `SET LOCAL` and `pg_advisory_xact_lock` leave nothing to undo.
    """

    def __init__(self, size: int, timeout: float, recycle: int, reset: bool) -> None:
        self.size = size
        self.timeout = timeout
        self.recycle = recycle
        self.reset = reset
        self._reset_after_fork()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):  # Windows has no fork.
            os.register_at_fork(after_in_child=self._reset_after_fork)

    def _reset_after_fork(self) -> None:
        # Two processes on one connection read each other's responses. psycopg2 leaves
        # the inherited connections to the process that opened them.
        self._semaphore = FairSemaphore(self.size)
        # Each with the times at which it was opened and returned. Last in, first out
        # keeps a few connections busy and lets the others grow old.
        self._idle: list[tuple[Connection, float, float]] = []
        self._checked_out: dict[Connection, float] = {}

    def getconn(self) -> Connection:
        """Check out a connection. Raises `DatabaseUnavailable` after `timeout`."""
        if not self._semaphore.acquire(self.timeout):
            message = f"No connection came free in POOL_TIMEOUT ({self.timeout:g} s)"
            hint = f"raise POOL_SIZE ({self.size}) or give them back sooner."
            raise DatabaseUnavailable(f"{message}: {hint}")
        try:
            conn, opened = self._take_idle() or (connect(), monotonic())
            self._checked_out[conn] = opened
            return conn
        except BaseException:
            self._semaphore.release()
            raise

    def putconn(self, conn: Connection) -> None:
        """Return a connection. One with anything open or changed is closed."""
        opened = self._checked_out.pop(conn, None)
        if opened is None:
            return  # It was returned before, or it is the parent process's.
        try:
            if conn.clean() and (not self.reset or _discard_all(conn)):
                self._idle.append((conn, opened, monotonic()))
            else:
                conn.close()
        finally:
            self._semaphore.release()

    def stats(self) -> dict[str, int]:
        """Return how many connections there may be, are in use, and are waited for."""
        waiting = len(self._semaphore.waiting)
        in_use = self.size - self._semaphore.free
        return {"size": self.size, "in_use": in_use, "waiting": waiting}

    def close(self) -> None:
        """Close the idle connections. Those in use stay open."""
        with suppress(IndexError):
            while True:
                self._idle.pop()[0].close()

    def _take_idle(self) -> tuple[Connection, float] | None:
        try:
            conn, opened, since = self._idle.pop()
        except IndexError:
            return None
        if monotonic() - opened < self.recycle and _is_alive(conn, since):
            return conn, opened
        conn.close()
        return None


def _discard_all(conn: Connection) -> bool:
    return _execute_with_timeout(conn, "DISCARD ALL")


def _is_alive(conn: Connection, since: float) -> bool:
    """Return whether a connection that was returned at `since` can be used."""
    if conn.closed:
        return False
    idle = monotonic() - since
    # Under load a poll releases the GIL and costs a read a twentieth of its time. An
    # unrequested message of the server is nearly always that it closes the connection.
    silent = idle < SKIP_CHECK_WITHIN or not _is_readable(conn)
    return silent and idle < PING_AFTER_IDLE or _execute_with_timeout(conn, "SELECT 1")


def _is_readable(conn: Connection) -> bool:
    with Selector() as selector:
        selector.register(conn, selectors.EVENT_READ)
        return bool(selector.select(0))


def _execute_with_timeout(conn: Connection, query: str) -> bool:
    """Return whether the query succeeds within `PING_TIMEOUT` seconds."""
    began = monotonic()
    with fromfd(conn.fileno(), AF_INET, SOCK_STREAM) as duplicate:
        # In a network that drops every packet the query would wait for hours.
        timer = Timer(PING_TIMEOUT, _shut_down, [duplicate])
        timer.daemon = True
        try:
            timer.start()
            with conn.cursor() as cursor:
                cursor.execute(query)
        except (psycopg2.Error, RuntimeError):  # At its exit Python starts no thread.
            return False
        finally:
            timer.cancel()
            if timer.ident:
                timer.join()
    return monotonic() - began < PING_TIMEOUT


def _shut_down(duplicate: socket) -> None:
    with suppress(OSError):
        duplicate.shutdown(SHUT_RDWR)


def init_app(app: Flask) -> None:
    """Let the contexts of `app` share a pool instead of connecting each."""
    app.extensions["pool"] = Pool(
        size=app.config["POOL_SIZE"],
        timeout=app.config["POOL_TIMEOUT"],
        recycle=app.config["POOL_RECYCLE"],
        reset=app.config["POOL_RESET"],
    )
