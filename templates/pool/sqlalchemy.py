"""A pool of psycopg2 connections, SQLAlchemy's: at most `POOL_SIZE` a process."""

import atexit
import os
from time import monotonic
from typing import Any, cast

import psycopg2
from flask import Flask
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, connection
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from .config import number
from .db import Unavailable, connect

IDLE = 1.0  # seconds after which a connection is asked whether it still lives


class Pool:
    """Lend each connection to one context at a time, as psycopg2's own object.

    `size` connections at most, each opened when first needed and replaced when it
    is `recycle` seconds old. `timeout` is how many seconds a context waits for one.
    """

    def __init__(self, size: int, timeout: float, recycle: int) -> None:
        self.size = size
        self.timeout = timeout
        # Without a dialect it asks the database nothing of its own. Last in, first
        # out: what is busy stays open, the rest grows old.
        self._pool = QueuePool(
            cast(Any, connect),
            pool_size=size,
            max_overflow=0,
            timeout=timeout,
            recycle=recycle,
            use_lifo=True,
            reset_on_return=None,
        )
        event.listen(self._pool, "checkin", _note_time)
        event.listen(self._pool, "checkout", _check_idle)
        self._lent: dict[connection, PoolProxiedConnection] = {}
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
            os.register_at_fork(after_in_child=self._start_anew)

    def getconn(self) -> connection:
        """Take a connection, waiting for a free one. Raises `Unavailable`."""
        try:
            proxy = self._pool.connect()
        except PoolTimeout:
            message = f"No connection came free in POOL_TIMEOUT ({self.timeout:g} s)"
            hint = f"raise POOL_SIZE ({self.size}) or give them back sooner."
            raise Unavailable(f"{message}: {hint}") from None
        # The proxy stays here: `with` on it returns the connection and commits nothing.
        conn = cast(connection, proxy.driver_connection)
        self._lent[conn] = proxy
        return conn

    def putconn(self, conn: connection) -> None:
        """Give a connection back; one with anything open or changed is closed.

        What a query changed (`SET`, advisory locks, temporary tables) is not noticed.
        """
        proxy = self._lent.pop(conn, None)
        if proxy is None:
            return  # the parent's, whose context was open when this process was forked
        if _is_clean(conn):
            proxy.close()
        else:
            proxy.invalidate()

    def close(self) -> None:
        """Close the connections that are free; whatever is lent stays open."""
        self._pool.dispose()

    def _start_anew(self) -> None:
        # Two processes on one connection read each other's answers. psycopg2 leaves
        # the inherited ones to the process that opened them.
        self._pool = self._pool.recreate()
        self._lent = {}


def _note_time(_: Any, record: ConnectionPoolEntry) -> None:
    record.info["since"] = monotonic()


def _check_idle(
    conn: connection, record: ConnectionPoolEntry, _: PoolProxiedConnection
) -> None:
    since = record.info.get("since")
    if since and monotonic() - since > IDLE and not _is_alive(conn):
        raise DisconnectionError  # QueuePool puts a new connection in its place


def _is_clean(conn: connection) -> bool:
    session = (conn.autocommit, conn.isolation_level, conn.readonly, conn.deferrable)
    idle = conn.info.transaction_status == TRANSACTION_STATUS_IDLE
    return idle and session == (True, None, None, None)


def _is_alive(conn: connection) -> bool:
    try:
        with conn.cursor() as cursor:
            cursor.execute("SELECT 1")
    except psycopg2.Error:
        return False
    return True


def init_app(app: Flask) -> None:
    """Let the contexts of `app` share a pool instead of connecting each."""
    app.extensions["pool"] = Pool(
        size=number(app, "POOL_SIZE", 8),
        timeout=number(app, "POOL_TIMEOUT", 5.0),
        recycle=number(app, "POOL_RECYCLE", 1800),
    )
