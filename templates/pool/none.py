"""No pool: each application context opens a connection and closes it at the end."""

from flask import Flask

from .config import Settings
from .db import Connection, connect

SETTINGS: Settings = {}


class Pool:
    """Open a connection at each checkout."""

    def __init__(self) -> None:
        self._checked_out: set[Connection] = set()

    def getconn(self) -> Connection:
        """Open a connection. Raises `DatabaseUnavailable`."""
        conn = connect()
        self._checked_out.add(conn)
        return conn

    def putconn(self, conn: Connection) -> None:
        """Close a connection, which rolls back whatever is open."""
        self._checked_out.discard(conn)
        conn.close()

    def stats(self) -> dict[str, int]:
        """Return how many connections are checked out."""
        return {"in_use": len(self._checked_out)}

    def close(self) -> None:
        """Do nothing: there are no idle connections."""


def init_app(app: Flask) -> None:
    """Let every context of `app` open a connection of its own."""
    app.extensions["pool"] = Pool()
