"""A pool of psycopg2 connections, SQLAlchemy's: at most `POOL_SIZE` per process."""

import atexit
import os
from collections import deque
from contextlib import suppress
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd, socket
from threading import Condition, Timer
from time import monotonic
from typing import Any, cast
from weakref import WeakSet

import psycopg2
from flask import Config, Flask
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from .config import Settings, bool_setting, number_setting
from .db import Connection, DatabaseUnavailable, connect

{% include 'parts/pool.py' %}

class Pool:
    """Lend each connection to one context at a time, as psycopg2's own object.

    `POOL_SIZE` is the maximum number of connections. Each is opened when first needed
    and replaced when it is `POOL_RECYCLE` seconds old. A context waits `POOL_TIMEOUT`
    seconds for one. `POOL_RESET` undoes what queries changed in a session (`SET`,
    advisory locks, temporary tables, `LISTEN`). This takes a round trip per context, as
    long as a read. `SET LOCAL` and `pg_advisory_xact_lock` leave nothing to undo.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        # Without a dialect, QueuePool sends no queries of its own. Last in, first out
        # keeps a few connections busy and lets the others grow old.
        self._pool = QueuePool(
            cast(Any, connect),
            pool_size=config["POOL_SIZE"],
            max_overflow=0,
            recycle=config["POOL_RECYCLE"],
            use_lifo=True,
            reset_on_return=None,
            events=[(_check, "checkout")],
        )
        self._checked_out: dict[Connection, PoolProxiedConnection] = {}
        self._inherited: list[object] = []
        self.reset_after_fork()
        pools.add(self)

    def reset_after_fork(self) -> None:
        """Forget the connections, which the parent process uses."""
        # Two processes on one connection read each other's responses. psycopg2 leaves
        # inherited connections to the process that opened them.
        # Garbage-collected proxies would return to a pool whose lock may be held.
        self._inherited.append(self._checked_out)
        self._pool = self._pool.recreate()
        self._semaphore = FairSemaphore(self.config["POOL_SIZE"])
        self._checked_out = {}

    def getconn(self) -> Connection:
        """Check out a connection. Raises `DatabaseUnavailable` after `POOL_TIMEOUT`."""
        self._semaphore.acquire(self.config["POOL_TIMEOUT"])
        try:
            proxy = self._pool.connect()
            # Keep the proxy here: `with` on it would commit nothing.
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
            return  # It was already returned, or belongs to the parent process.
        try:
            reset = self.config["POOL_RESET"]
            if conn.clean() and (not reset or responds(conn, "DISCARD ALL")):
                proxy.close()
            else:
                proxy.invalidate()
        finally:
            self._semaphore.release()

    def stats(self) -> dict[str, int]:
        """Count the connections, those in use, and the threads that wait for one."""
        return self._semaphore.stats()

    def close(self) -> None:
        """Close the idle connections. Those in use stay open."""
        self._pool.dispose()


def _check(conn: Connection, *_: object) -> None:
    if not is_usable(conn):
        raise DisconnectionError  # QueuePool opens another one.


def init_app(app: Flask) -> None:
    """Let the contexts of `app` share a pool instead of connecting each."""
    app.extensions["pool"] = Pool(app.config)
