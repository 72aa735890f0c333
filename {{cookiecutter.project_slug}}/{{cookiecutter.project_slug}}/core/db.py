"""The PostgreSQL connection of the current application context."""

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from time import monotonic
from types import TracebackType
from typing import Any, Protocol, Self

import psycopg2
from flask import Flask, current_app, g
from flask.typing import ResponseReturnValue
from psycopg2.extensions import connection, cursor, parse_dsn
from werkzeug.exceptions import ServiceUnavailable

from .config import Settings, number_setting

SETTINGS: Settings = {"SLOW_QUERY": number_setting(0.5)}  # seconds

logger = logging.getLogger(__name__)

SLOW_CHECKOUT = 0.1  # seconds to take a connection that are worth a line in the log


class DatabaseUnavailable(Exception):
    """No connection is available now. The response is 503 with Retry-After."""


class LoggedCursor(cursor):
    """Log the queries that take longer than `SLOW_QUERY`, without their parameters.

    An error that a query raises does not quote them either: see `_redact`.
    """

    def execute(self, query: Any, vars: Any = None) -> None:
        """Run a query."""
        self._watch(super().execute, query, vars)

    def executemany(self, query: Any, vars_list: Iterable[Any]) -> None:
        """Run a query with each of the parameters."""
        self._watch(super().executemany, query, vars_list)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        """Run a COPY between the table and the file."""
        self._watch(super().copy_expert, sql, file, size)

    def _watch(self, run: Callable[..., None], query: Any, *args: Any) -> None:
        began = monotonic()
        try:
            run(query, *args)
        except psycopg2.Error as error:
            _redact(self.connection, error)
            raise
        finally:
            _log_slow_query(self.connection, query, monotonic() - began)


class LoggedConnection(connection):
    """Give every cursor, of whatever class, what `LoggedCursor` does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slow_query: float = current_app.config["SLOW_QUERY"]
        self.quotes_data = current_app.debug or current_app.testing

    def cursor(  # type: ignore[override]
        self, name: Any = None, cursor_factory: Any = None, **options: Any
    ) -> Any:
        """Open a cursor."""
        default: Any = self.cursor_factory
        factory = _logged(cursor_factory or default or cursor)
        return super().cursor(name, cursor_factory=factory, **options)


@cache
def _logged(factory: type[cursor]) -> type[cursor]:
    return type(factory.__name__, (LoggedCursor, factory), {})


class Connection(LoggedConnection):
    """psycopg2's, which also calls what is to follow once it has committed."""

    _on_commit: list[Callable[[], object]] | None = None  # within a transaction

    def __enter__(self) -> Self:
        super().__enter__()
        self._on_commit = []
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        callbacks, self._on_commit = self._on_commit or [], None
        try:
            super().__exit__(exc_type, exc, tb)
        except psycopg2.Error as error:  # A deferred constraint may fail only here.
            _redact(self, error)
            raise
        with ExitStack() as stack:  # It calls all of them, even if one raises.
            for callback in reversed(callbacks) if exc is None else []:
                stack.callback(callback)


class Pool(Protocol):
    """The interface of every `Pool` in `pool.py`."""

    def getconn(self) -> connection:
        """Check out a connection. Raises `DatabaseUnavailable`."""

    def putconn(self, conn: connection) -> None:
        """Return a connection."""

    def stats(self) -> dict[str, int]:
        """Return how many connections there are, for the log."""

    def close(self) -> None:
        """Close the idle connections."""


def get_pool() -> Pool:
    """Return the pool of the current application in this process."""
    pool: Pool = current_app.extensions["pool"]
    return pool


def get_db() -> connection:
    """Return the connection of this request, command or task, taken at first use.

    It is in autocommit: a statement takes effect at once. A transaction is
    `with get_db() as db:`, which commits at the end and rolls back on an error
    (psycopg2 2.9 and later). What is open when the context ends is rolled back. A
    process forked meanwhile needs a context of its own. Raises `DatabaseUnavailable`.
    """
    if "db" not in g:
        began = monotonic()
        g.db = get_pool().getconn()
        _log_slow_checkout(monotonic() - began)
    db: connection = g.db
    return db


def close_db(error: BaseException | None = None) -> None:
    """Give the connection of this context back, if it took one."""
    if "db" in g:
        get_pool().putconn(g.pop("db"))


def on_commit(function: Callable[[], object]) -> None:
    """Call `function` once the transaction of this context is committed.

    It is not called when that is rolled back, and called at once outside of one. What
    it raises comes out of the `with` block; what was committed stays.
    """
    callbacks = getattr(g.get("db"), "_on_commit", None)
    if callbacks is None:
        function()
    else:
        callbacks.append(function)


def connect() -> connection:
    """Open a connection in autocommit, which the caller closes.

    Parameters in `DATABASE_URL` win over the defaults here. Raises
    `DatabaseUnavailable`.
    """
    try:
        conn: connection = psycopg2.connect(
            connection_factory=Connection, **connection_parameters(database_url())
        )
    except psycopg2.OperationalError as error:
        reason = str(error).partition("\n")[0]
        hint = "is it right, and does PostgreSQL run there?"
        raise DatabaseUnavailable(f"DATABASE_URL: {reason}: {hint}") from error
    conn.autocommit = True
    return conn


def database_url() -> str:
    """Return `DATABASE_URL`, or in development what `dev.py` put in its place."""
    url: str | Callable[[], str] = current_app.config["DATABASE_URL"]
    return url() if callable(url) else url


def connection_parameters(url: str) -> dict[str, Any]:
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
    app.teardown_appcontext(close_db)
    app.register_error_handler(DatabaseUnavailable, _service_unavailable)
    for error in (psycopg2.OperationalError, psycopg2.InterfaceError):
        app.register_error_handler(error, _handle_query_error)


def _log_slow_checkout(seconds: float) -> None:
    # In development it may have been the start of PostgreSQL.
    if seconds > SLOW_CHECKOUT and not current_app.debug:
        message = "It took %d ms to get a connection (connections: %s)"
        status = get_pool().stats()
        current_app.logger.warning(message, 1000 * seconds, status)


def _log_slow_query(conn: Any, query: object, seconds: float) -> None:
    if seconds > conn.slow_query:
        # The bytes or objects that psycopg2 composes hold the parameters.
        text = query if isinstance(query, str) else f"of the type {type(query)}"
        text = " ".join(text.split())[:1000]
        logger.warning("A query took %d ms: %s", 1000 * seconds, text)


def _redact(conn: Any, error: psycopg2.Error) -> None:
    """Leave DETAIL, CONTEXT and the query out of the message, which the log quotes."""
    if error.pgcode and not conn.quotes_data:
        # A data exception, of class 22, quotes the value in its primary message, too.
        is_safe = not error.pgcode.startswith("22")
        message = error.diag.message_primary if is_safe else "invalid data"
        error.args = (f"{message} (SQLSTATE {error.pgcode})",)


def _service_unavailable(error: DatabaseUnavailable) -> ResponseReturnValue:
    reason = str(error).partition("\n")[0]
    status = get_pool().stats()
    current_app.logger.error("%s (connections: %s)", reason, status)
    return current_app.handle_http_exception(ServiceUnavailable(retry_after=1))


def _handle_query_error(error: Exception) -> ResponseReturnValue:
    if "db" in g and g.db.closed == 2:  # 1 if the view closed it
        lost = DatabaseUnavailable(f"The connection was lost: {error}")
        return _service_unavailable(lost)
    raise error
