"""A pool of psycopg2 connections: at most `POOL_SIZE` a process, kept for reuse."""

import atexit
import os
from contextlib import suppress
from queue import Empty, LifoQueue
from time import monotonic

import psycopg2
from flask import Flask
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, connection

from .config import number
from .db import Unavailable, connect

IDLE = 1.0  # seconds after which a connection is asked whether it still lives


class Pool:
    """Lend each connection to one context at a time.

    `size` connections at most, each opened when first needed and replaced when it
    is `recycle` seconds old. `timeout` is how many seconds a context waits for one.
    """

    def __init__(self, size: int, timeout: float, recycle: int) -> None:
        self.size = size
        self.timeout = timeout
        self.recycle = recycle
        self._start()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
            os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        # A place holds a connection and when it came back, or None until it is
        # needed. Last in, first out: what is busy stays open, the rest grows old.
        # A forked process starts anew, as two on one connection read each other's
        # answers; psycopg2 leaves the inherited ones to the process that opened them.
        self._places: LifoQueue[tuple[connection, float] | None] = LifoQueue()
        self._opened: dict[connection, float] = {}
        for _ in range(self.size):
            self._places.put(None)

    def getconn(self) -> connection:
        """Take a connection, waiting for a free one. Raises `Unavailable`."""
        try:
            place = self._places.get(timeout=self.timeout)
        except Empty:
            message = f"No connection came free in POOL_TIMEOUT ({self.timeout:g} s)"
            hint = f"raise POOL_SIZE ({self.size}) or give them back sooner."
            raise Unavailable(f"{message}: {hint}") from None
        try:
            return self._fresh(*place) if place else self._open()
        except BaseException:
            self._places.put(None)
            raise

    def putconn(self, conn: connection) -> None:
        """Give a connection back; one with anything open or changed is closed.

        What a query changed (`SET`, advisory locks, temporary tables) is not noticed.
        """
        if conn not in self._opened:
            return  # the parent's, whose context was open when this process was forked
        if _is_clean(conn):
            self._places.put((conn, monotonic()))
        else:
            self._discard(conn)
            self._places.put(None)

    def close(self) -> None:
        """Close the connections that are free; whatever is lent stays open."""
        with suppress(Empty):
            while True:
                if place := self._places.get_nowait():
                    self._discard(place[0])

    def _open(self) -> connection:
        conn = connect()
        self._opened[conn] = monotonic()
        return conn

    def _fresh(self, conn: connection, since: float) -> connection:
        now = monotonic()
        if now - self._opened[conn] < self.recycle:
            if now - since < IDLE or _is_alive(conn):
                return conn
        self._discard(conn)
        return self._open()

    def _discard(self, conn: connection) -> None:
        self._opened.pop(conn, None)
        conn.close()


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
