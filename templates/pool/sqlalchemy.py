"""A pool of psycopg2 connections, SQLAlchemy's: at most `POOL_SIZE` per process."""

import atexit
import os
import selectors
from collections import deque
from contextlib import suppress
from functools import partial
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd, socket
from threading import Condition, Timer
from time import monotonic
from typing import Any, cast

import psycopg2
from flask import Flask
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

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
    """Lend each connection to one context at a time, as psycopg2's own object.

    `size` is the maximum number of connections. Each is opened when first needed and
    replaced when it is `recycle` seconds old. A context waits `timeout` seconds for
    one. `reset` undoes what queries changed in a session (`SET`, advisory locks,
    temporary tables, `LISTEN`). It costs each context a round trip, as much as a read
    does. `SET LOCAL` and `pg_advisory_xact_lock` leave nothing to undo.
    """

    def __init__(self, size: int, timeout: float, recycle: int, reset: bool) -> None:
        self.size = size
        self.timeout = timeout
        self.reset = reset
        # Without a dialect it sends no queries of its own. Last in, first out keeps a
        # few connections busy and lets the others grow old.
        self._pool = QueuePool(
            cast(Any, connect),
            pool_size=size,
            max_overflow=0,
            recycle=recycle,
            use_lifo=True,
            reset_on_return=None,
            events=[(_note_time, "checkin"), (_check, "checkout")],
        )
        self._checked_out: dict[Connection, PoolProxiedConnection] = {}
        self._inherited: list[object] = []
        self._reset_after_fork()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):  # Windows has no fork.
            os.register_at_fork(after_in_child=self._reset_after_fork)

    def _reset_after_fork(self) -> None:
        # Two processes on one connection read each other's responses. psycopg2 leaves
        # the inherited connections to the process that opened them.
        # Garbage-collected proxies would return to a pool whose lock may be held.
        self._inherited.append(self._checked_out)
        self._pool = self._pool.recreate()
        self._semaphore = FairSemaphore(self.size)
        self._checked_out = {}

    def getconn(self) -> Connection:
        """Check out a connection. Raises `DatabaseUnavailable` after `timeout`."""
        if not self._semaphore.acquire(self.timeout):
            message = f"No connection came free in POOL_TIMEOUT ({self.timeout:g} s)"
            hint = f"raise POOL_SIZE ({self.size}) or give them back sooner."
            raise DatabaseUnavailable(f"{message}: {hint}")
        try:
            proxy = self._pool.connect()
            # It stays here: `with` on it returns the connection and commits nothing.
            conn = cast(Connection, proxy.driver_connection)
            self._checked_out[conn] = proxy
            return conn
        except BaseException:
            self._semaphore.release()
            raise

    def putconn(self, conn: Connection) -> None:
        """Return a connection. One with anything open or changed is closed."""
        proxy = self._checked_out.pop(conn, None)
        if proxy is None:
            return  # It was returned before, or it is the parent process's.
        try:
            if conn.clean() and (not self.reset or _discard_all(conn)):
                proxy.close()
            else:
                proxy.invalidate()
        finally:
            self._semaphore.release()

    def stats(self) -> dict[str, int]:
        """Return how many connections there may be, are in use, and are waited for."""
        waiting = len(self._semaphore.waiting)
        in_use = self.size - self._semaphore.free
        return {"size": self.size, "in_use": in_use, "waiting": waiting}

    def close(self) -> None:
        """Close the idle connections. Those in use stay open."""
        self._pool.dispose()


def _note_time(_: Any, record: ConnectionPoolEntry) -> None:
    record.info["since"] = monotonic()


def _check(
    conn: Connection, record: ConnectionPoolEntry, _: PoolProxiedConnection
) -> None:
    if "since" in record.info and not _is_alive(conn, record.info["since"]):
        raise DisconnectionError  # QueuePool opens another one.


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
