"""A pool of psycopg2 connections, SQLAlchemy's: at most `POOL_SIZE` a process."""

import atexit
import os
import selectors
from collections import deque
from contextlib import suppress
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd, socket
from threading import Lock, RLock, Timer
from time import monotonic
from typing import Any, cast

import psycopg2
from flask import Flask
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, connection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from .config import Settings, bool_setting, number_setting
from .db import DatabaseUnavailable, connect

SETTINGS: Settings = {
    "POOL_SIZE": number_setting(8),
    "POOL_TIMEOUT": number_setting(5.0),  # seconds
    "POOL_RECYCLE": number_setting(1800),  # seconds
    "POOL_RESET": bool_setting(),
}

SKIP_CHECK_WITHIN = 0.005  # seconds since its return
PING_AFTER_IDLE = 1.0  # seconds after which it is asked whether it still lives
PING_TIMEOUT = 1.0  # seconds that it has to answer

# One call to look for input, where the default selector needs four; Windows has none.
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class FairSemaphore:
    """Let `size` threads pass at a time, first come first served.

    At a semaphore, one that comes just then may overtake those that wait.
    """

    def __init__(self, size: int) -> None:
        self.free = size
        self.waiting: deque[Lock] = deque()
        self._lock = RLock()  # a signal may come where it is held

    def acquire(self, timeout: float) -> bool:
        """Take a place; say whether one came free within `timeout` seconds."""
        with self._lock:
            if self.free:
                self.free -= 1
                return True
            waiter = Lock()
            waiter.acquire()
            self.waiting.append(waiter)
        try:
            return waiter.acquire(timeout=timeout) or not self._cancel(waiter)
        except BaseException:  # such as what the handler of a signal raises
            if not self._cancel(waiter):
                self.release()
            raise

    def release(self) -> None:
        """Give a place to who has waited longest."""
        with self._lock:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self.free += 1

    def _cancel(self, waiter: Lock) -> bool:
        with self._lock:
            waits = waiter in self.waiting  # or its turn has come at the last moment
            if waits:
                self.waiting.remove(waiter)
            return waits


class Pool:
    """Lend each connection to one context at a time, as psycopg2's own object.

    `size` connections at most, each opened when first needed and replaced when it
    is `recycle` seconds old. `timeout` is how many seconds a context waits for one.
    With `reset`, what queries changed in a session is undone (`SET`, advisory locks,
    temporary tables, `LISTEN`). That is a round trip for each context, where a read
    costs one, so it is left to who needs it: `SET LOCAL` and `pg_advisory_xact_lock`
    in a transaction leave nothing to undo.
    """

    def __init__(self, size: int, timeout: float, recycle: int, reset: bool) -> None:
        self.size = size
        self.timeout = timeout
        self.reset = reset
        # Without a dialect it asks the database nothing of its own. Last in, first
        # out: what is busy stays open, the rest grows old.
        self._pool = QueuePool(
            cast(Any, connect),
            pool_size=size,
            max_overflow=0,
            recycle=recycle,
            use_lifo=True,
            reset_on_return=None,
            events=[(_note_time, "checkin"), (_check, "checkout")],
        )
        self._checked_out: dict[connection, PoolProxiedConnection] = {}
        self._inherited: list[object] = []
        self._reset_after_fork()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
            os.register_at_fork(after_in_child=self._reset_after_fork)

    def _reset_after_fork(self) -> None:
        # A forked process starts anew, as two on one connection read each other's
        # answers; psycopg2 leaves the inherited ones to the process that opened them.
        # Proxies that nobody holds would go back to a pool whose lock may be held.
        self._inherited.append(self._checked_out)
        self._pool = self._pool.recreate()
        self._semaphore = FairSemaphore(self.size)
        self._checked_out = {}

    def getconn(self) -> connection:
        """Take a connection, waiting for a free one. Raises `DatabaseUnavailable`."""
        if not self._semaphore.acquire(self.timeout):
            message = f"No connection came free in POOL_TIMEOUT ({self.timeout:g} s)"
            hint = f"raise POOL_SIZE ({self.size}) or give them back sooner."
            raise DatabaseUnavailable(f"{message}: {hint}")
        try:
            proxy = self._pool.connect()
            # It stays here: `with` on it returns the connection and commits nothing.
            conn = cast(connection, proxy.driver_connection)
            self._checked_out[conn] = proxy
            return conn
        except BaseException:
            self._semaphore.release()
            raise

    def putconn(self, conn: connection) -> None:
        """Give a connection back; one with anything open or changed is closed."""
        proxy = self._checked_out.pop(conn, None)
        if proxy is None:
            return  # it came back before, or is the parent's of this forked process
        try:
            if _is_clean(conn) and (not self.reset or _discard_all(conn)):
                proxy.close()
            else:
                proxy.invalidate()
        finally:
            self._semaphore.release()

    def stats(self) -> dict[str, int]:
        """Return how many connections there may be, are lent, and are waited for."""
        waiting = len(self._semaphore.waiting)
        in_use = self.size - self._semaphore.free
        return {"size": self.size, "in_use": in_use, "waiting": waiting}

    def close(self) -> None:
        """Close the connections that are free; whatever is lent stays open."""
        self._pool.dispose()


def _note_time(_: Any, record: ConnectionPoolEntry) -> None:
    record.info["since"] = monotonic()


def _check(
    conn: connection, record: ConnectionPoolEntry, _: PoolProxiedConnection
) -> None:
    if "since" in record.info and not _is_alive(conn, record.info["since"]):
        raise DisconnectionError  # QueuePool puts a new connection in its place


def _is_clean(conn: connection) -> bool:
    session = (conn.autocommit, conn.isolation_level, conn.readonly, conn.deferrable)
    idle = conn.get_transaction_status() == TRANSACTION_STATUS_IDLE
    as_opened = session == (True, None, None, None) and conn.cursor_factory is None
    return idle and as_opened


def _discard_all(conn: connection) -> bool:
    return _execute_with_timeout(conn, "DISCARD ALL")


def _is_alive(conn: connection, since: float) -> bool:
    """Say whether a connection that is free `since` then can be used."""
    if conn.closed:
        return False
    free = monotonic() - since
    # Under load a look gives the GIL away, and so costs a read a twentieth. What the
    # server says without being asked is nearly always that it ends.
    silent = free < SKIP_CHECK_WITHIN or not _is_readable(conn)
    return silent and free < PING_AFTER_IDLE or _execute_with_timeout(conn, "SELECT 1")


def _is_readable(conn: connection) -> bool:
    with Selector() as selector:
        selector.register(conn, selectors.EVENT_READ)
        return bool(selector.select(0))


def _execute_with_timeout(conn: connection, query: str) -> bool:
    """Say whether the query succeeds within `PING_TIMEOUT` seconds."""
    began = monotonic()
    with fromfd(conn.fileno(), AF_INET, SOCK_STREAM) as duplicate:
        # A network that swallows everything would keep it waiting for hours.
        timer = Timer(PING_TIMEOUT, _shut_down, [duplicate])
        timer.daemon = True
        timer.start()
        try:
            with conn.cursor() as cursor:
                cursor.execute(query)
        except psycopg2.Error:
            return False
        finally:
            timer.cancel()
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
