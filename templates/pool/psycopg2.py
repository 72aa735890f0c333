"""A pool of psycopg2 connections: at most `POOL_SIZE` per process."""

import atexit
import os
from collections import deque
from contextlib import suppress
from socket import AF_INET, SHUT_RDWR, SOCK_STREAM, fromfd, socket
from threading import Condition, Timer
from time import monotonic
from weakref import WeakSet

import psycopg2
from flask import Config, Flask

from .config import Settings, bool_setting, number_setting
from .db import Connection, DatabaseUnavailable, connect

{% include 'parts/pool.py' %}

class Pool:
    """Lend each connection to one context at a time.

    `POOL_SIZE` is the maximum number of connections. Each is opened when first needed
    and replaced when it is `POOL_RECYCLE` seconds old. A context waits `POOL_TIMEOUT`
    seconds for one. `POOL_RESET` undoes what queries changed in a session (`SET`,
    advisory locks, temporary tables, `LISTEN`). This takes a round trip per context, as
    long as a read. `SET LOCAL` and `pg_advisory_xact_lock` leave nothing to undo.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.reset_after_fork()
        pools.add(self)

    def reset_after_fork(self) -> None:
        """Forget the connections, which the parent process uses."""
        # Two processes on one connection read each other's responses. psycopg2 leaves
        # inherited connections to the process that opened them.
        self._semaphore = FairSemaphore(self.config["POOL_SIZE"])
        # Last in, first out keeps a few connections busy and lets the others grow old.
        self._idle: list[Connection] = []
        self._checked_out: dict[Connection, bool] = {}

    def getconn(self) -> Connection:
        """Check out a connection. Raises `DatabaseUnavailable` after `POOL_TIMEOUT`."""
        self._semaphore.acquire(self.config["POOL_TIMEOUT"])
        try:
            conn = self._take_idle() or connect()
            self._checked_out[conn] = True
            return conn
        except BaseException:
            self._semaphore.release()
            raise

    def putconn(self, conn: Connection) -> None:
        """Return a connection. One with anything open or changed is closed."""
        if not self._checked_out.pop(conn, False):
            return  # It was already returned, or belongs to the parent process.
        try:
            reset = self.config["POOL_RESET"]
            if conn.clean() and (not reset or responds(conn, "DISCARD ALL")):
                self._idle.append(conn)
            else:
                conn.close()
        finally:
            self._semaphore.release()

    def stats(self) -> dict[str, int]:
        """Count the connections, those in use, and the threads that wait for one."""
        return self._semaphore.stats()

    def close(self) -> None:
        """Close the idle connections. Those in use stay open."""
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def _take_idle(self) -> Connection | None:
        with suppress(IndexError):
            conn = self._idle.pop()
            age = monotonic() - conn.opened
            if age < self.config["POOL_RECYCLE"] and is_usable(conn):
                return conn
            conn.close()
        return None


def init_app(app: Flask) -> None:
    """Let the contexts of `app` share a pool instead of connecting each."""
    app.extensions["pool"] = Pool(app.config)
