"""The PostgreSQL connection of the current application context."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

import click
import psycopg2
from flask import Flask, current_app, g
from flask.typing import ResponseReturnValue
from psycopg2.extensions import connection, parse_dsn
from werkzeug.exceptions import ServiceUnavailable

from .log import LoggedConnection

SLOW = 0.1  # seconds to take a connection that are worth a line in the log


class Unavailable(click.ClickException):
    """No connection can be had now; answered 503 with Retry-After."""


class Connection(LoggedConnection):
    """psycopg2's, which also calls what is to follow once it has committed."""

    followers: list[Callable[[], object]] | None = None  # within a transaction

    def __enter__(self) -> Self:
        super().__enter__()
        self.followers = []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        place: TracebackType | None,
    ) -> None:
        followers, self.followers = self.followers or [], None
        super().__exit__(kind, error, place)
        with ExitStack() as stack:  # which calls them all, whatever one raises
            for follower in reversed(followers) if error is None else []:
                stack.callback(follower)


class NullPool:
    """Open a connection for every context that asks, and close it at the end."""

    def __init__(self) -> None:
        self._lent: set[connection] = set()

    def getconn(self) -> connection:
        """Take a connection. Raises `Unavailable`."""
        conn = connect()
        self._lent.add(conn)
        return conn

    def putconn(self, conn: connection) -> None:
        """Give a connection back."""
        self._lent.discard(conn)
        conn.close()

    def status(self) -> dict[str, int]:
        """Return how many connections are lent."""
        return {"in_use": len(self._lent)}

    def close(self) -> None:
        """Close what is free, which is nothing."""


def get_db() -> connection:
    """Return the connection of this request, command or task, taken at first use.

    It is in autocommit: a statement takes effect at once. A transaction is
    `with get_db() as db:`, which commits at the end and rolls back on an error
    (psycopg2 2.9 and later). What is open when the context ends is rolled back. A
    process forked meanwhile needs a context of its own. Raises `Unavailable`.
    """
    if "db" not in g:
        began = monotonic()
        g.db = current_app.extensions["pool"].getconn()
        _log_if_slow(monotonic() - began)
    db: connection = g.db
    return db


def close_db(error: BaseException | None = None) -> None:
    """Give the connection of this context back, if it took one."""
    if "db" in g:
        current_app.extensions["pool"].putconn(g.pop("db"))


def on_commit(function: Callable[[], object]) -> None:
    """Call `function` once the transaction of this context is committed.

    It is not called when that is rolled back, and called at once outside of one. What
    it raises comes out of the `with` block; what was committed stays.
    """
    followers = getattr(g.get("db"), "followers", None)
    if followers is None:
        function()
    else:
        followers.append(function)


def connect() -> connection:
    """Open a connection in autocommit, which the caller closes.

    Parameters in `DATABASE_URL` win over the defaults here. Raises `Unavailable`.
    """
    return _open(current_app.config["DATABASE_URL"] or _embedded_url())


def parameters(url: str) -> dict[str, Any]:
    """Return what libpq is told for a connection; what is in `url` wins."""
    return {
        "application_name": current_app.name,
        "connect_timeout": "5",
        # A peer that is gone is given up after 25 s; by default it takes hours.
        "keepalives_idle": "10",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        "tcp_user_timeout": "25000",
        # A query whose client is gone ends within 0.5 s, so none outlives a reload; a
        # transaction whose client is cut off ends after 30 s, and holds its locks no
        # longer: https://www.postgresql.org/docs/current/runtime-config-client.html
        "options": "-c client_connection_check_interval=500"
        " -c idle_in_transaction_session_timeout=30000",
        **parse_dsn(url),
    }


def init_app(app: Flask) -> None:
    """Give every application context of `app` a connection when it asks for one."""
    app.extensions["pool"] = NullPool()
    app.teardown_appcontext(close_db)
    app.register_error_handler(Unavailable, _service_unavailable)
    for error in (psycopg2.OperationalError, psycopg2.InterfaceError):
        app.register_error_handler(error, _error_of_a_query)


def _log_if_slow(seconds: float) -> None:
    # In development it may have been the start of PostgreSQL.
    if seconds > SLOW and not current_app.debug:
        message = "It took %d ms to get a connection (connections: %s)"
        status = current_app.extensions["pool"].status()
        current_app.logger.warning(message, 1000 * seconds, status)


def _service_unavailable(error: Unavailable) -> ResponseReturnValue:
    reason = str(error).partition("\n")[0]
    status = current_app.extensions["pool"].status()
    current_app.logger.error("%s (connections: %s)", reason, status)
    return current_app.handle_http_exception(ServiceUnavailable(retry_after=1))


def _error_of_a_query(error: Exception) -> ResponseReturnValue:
    if "db" in g and g.db.closed == 2:  # 1 if the view closed it
        return _service_unavailable(Unavailable(f"The connection was lost: {error}"))
    raise error


def _open(url: str) -> connection:
    try:
        options = parameters(url)
        conn: connection = psycopg2.connect(connection_factory=Connection, **options)
    except psycopg2.OperationalError as error:
        reason = str(error).partition("\n")[0]
        hint = "is it right, and does PostgreSQL run there?"
        raise Unavailable(f"DATABASE_URL: {reason}: {hint}") from error
    conn.autocommit = True
    return conn


def _embedded_url() -> str:
    # Development and tests only: elsewhere the settings demand a DATABASE_URL.
    from flask_devserver import postgres

    from .migrate import migrate

    folder = Path(current_app.instance_path) / "postgres"
    url = postgres.ensure_database(folder, current_app.name)
    with closing(_open(url)) as conn:
        for name in migrate(conn):
            current_app.logger.info("Applied %s", name)
    current_app.config["DATABASE_URL"] = url
    return url
