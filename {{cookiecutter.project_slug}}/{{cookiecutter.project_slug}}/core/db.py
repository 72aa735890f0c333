"""The PostgreSQL connection of the current application context."""

import logging
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import lru_cache, partial, partialmethod
from threading import RLock
from time import monotonic
from typing import Any, Protocol, Self, cast
from weakref import finalize

import psycopg2
from flask import Flask, current_app, g, request
from psycopg2.errors import InFailedSqlTransaction, ReadOnlySqlTransaction
from psycopg2.extensions import STATUS_BEGIN, connection, cursor, parse_dsn
from psycopg2.extensions import STATUS_READY as READY
from psycopg2.extensions import TRANSACTION_STATUS_IDLE as IDLE
from psycopg2.extensions import TRANSACTION_STATUS_INERROR as IN_ERROR
from psycopg2.extensions import TRANSACTION_STATUS_INTRANS as IN_TRANSACTION
from werkzeug.exceptions import BadRequest, HTTPException, ServiceUnavailable

from .config import Settings, check_url, number_setting

SETTINGS: Settings = {"SLOW_QUERY": number_setting(0.5)}  # seconds

logger = logging.getLogger(__name__)

SLOW_CHECKOUT = 0.1  # seconds; a slower checkout is logged

# A query whose client is gone ends within 0.5 s, so that none outlives a reload. A
# transaction whose client's machine is gone ends after 25 s and holds its locks no
# longer: https://www.postgresql.org/docs/current/runtime-config-connection.html
STARTUP_OPTIONS = (
    "-c client_connection_check_interval=500 -c tcp_keepalives_idle=10"
    " -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
)
# PostgreSQL on Windows rejects the first option, and most poolers reject them all.
REJECTED = re.compile("client_connection_check|startup param|command-line opt", re.I)

# PostgreSQL's text holds neither NUL nor half of an emoji that a client has cut.
# In production, the message of a query's error has only its SQLSTATE.
UNSTORABLE = re.compile(
    r"NUL \(0x00\)|surrogates not|unsupported Unicode escape|SQLSTATE 22P05"
    r'|surrogate must|Token "-?(NaN|Infinity)"'
)

# The methods of a cursor that send a query.
QUERIES = ("execute", "executemany", "callproc", "copy_expert", "copy_from", "copy_to")

# PostgreSQL reports changes of these settings to each client.
READ_ONLY_REPORTS = ("default_transaction_read_only", "in_hot_standby")


class DatabaseUnavailable(Exception):
    """No connection is available now. The response is 503 with Retry-After."""


class Connection(connection):
    """psycopg2's connection, in autocommit, whose transactions never fail silently.

    Every cursor, unless a function makes it, logs the queries that take longer than
    `SLOW_QUERY`, without their parameters. Their errors do not quote these either.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocommit = True
        self.app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        self.is_outdated = False  # whether a failover made the server read-only
        self.opened, self.returned = monotonic(), float("inf")  # It was never idle.
        self._on_commit: list[Callable[[], object]] | None = None  # in a transaction
        self.as_opened: tuple[object, ...] = ()
        self.default_factory: Any = None

    def cursor(self, name: Any = None, cursor_factory: Any = None, **rest: Any) -> Any:  # type: ignore[override]
        """Open a cursor."""
        default: Any = self.cursor_factory
        factory = cursor_factory or default or cursor
        if isinstance(factory, type):  # It may be a function.
            factory = _logged(factory)
        return super().cursor(name, cursor_factory=factory, **rest)

    def commit(self) -> None:
        """Commit. Raises `InFailedSqlTransaction` if a query has failed."""
        state = self.info.transaction_status
        if state == IN_ERROR or (self.status == STATUS_BEGIN and state == IDLE):
            self.rollback()  # A query failed or, if it is idle, ended it.
        if state == IN_ERROR:
            message = "A query failed, so the transaction was rolled back"
            hint = "let its error leave the `with` block, or use a savepoint."
            raise InFailedSqlTransaction(f"{message}: {hint}")
        # A deferred constraint may fail only here.
        _watch(self, connection.commit)
        if self.info.transaction_status == IN_TRANSACTION:
            self.cursor().execute("COMMIT")  # psycopg2 ends only what it began.
        self._committed = len(self._on_commit or [])

    def rollback(self) -> None:
        """Roll back, and drop the functions of `on_commit` since the last commit."""
        if self._on_commit:
            del self._on_commit[self._committed :]
        super().rollback()
        if self.info.transaction_status != IDLE:
            self.cursor().execute("ROLLBACK")

    def reset(self) -> None:
        """Roll back, and reset the session, which stays in autocommit."""
        self.rollback()
        super().reset()
        self.autocommit = self._on_commit is None

    def __enter__(self) -> Self:
        if self._on_commit is not None:
            message = "In a transaction already: use `get_db()` without another `with`."
            raise psycopg2.ProgrammingError(message)
        self._autocommit_outside = self.autocommit
        # psycopg2 would not restore what was set for the session.
        if not (self.isolation_level or self.readonly or self.deferrable):
            self.autocommit = False  # In autocommit there are no server-side cursors.
        super().__enter__()
        self._on_commit, self._committed = [], 0
        return self

    def __exit__(self, *error: Any) -> None:
        if isinstance(error[1], psycopg2.Error):
            self.examine(error[1])  # The FETCH of a server-side cursor raised it.
        try:
            super().__exit__(*error)
        except psycopg2.Error:
            if error[1] is None:  # Otherwise the error of the block says why.
                raise
        finally:
            callbacks = (self._on_commit or [])[: self._committed]
            self._on_commit = None
            if not self.closed and self.status == READY:
                self.autocommit = self._autocommit_outside
            with ExitStack() as stack:  # This calls all functions, even if one raises.
                for callback in reversed(callbacks):
                    stack.callback(callback)

    def clean(self) -> bool:
        """Reset psycopg2's own state. Return whether all else is as it was opened."""
        self.returned = monotonic()
        self.notices, self.notifies = [], []
        self.string_types.clear()
        self.binary_types.clear()
        if self.get_transaction_status() == IDLE and self.status == READY:
            self.autocommit, self.cursor_factory = True, self.default_factory
        return self.state() == self.as_opened

    def examine(self, error: psycopg2.Error) -> None:
        """Leave DETAIL, CONTEXT and the query out of the message, which the log quotes.

        Note whether the server has become read-only.
        """
        if error.pgcode and not (self.app.debug or self.app.testing):
            # A data exception quotes the value in its primary message.
            is_safe = not isinstance(error, psycopg2.DataError)
            message = error.diag.message_primary if is_safe else "invalid data"
            error.args = (f"{message} (SQLSTATE {error.pgcode})",)
        if isinstance(error, ReadOnlySqlTransaction) and not self.readonly:
            # If no query has made the session read-only, a failover demoted the server.
            self.is_outdated = "on" in map(self.get_parameter_status, READ_ONLY_REPORTS)

    def is_lost(self) -> bool:
        """Return whether the server closed it, or has become read-only."""
        return self.closed == 2 or self.is_outdated

    def state(self) -> tuple[object, ...]:
        """Return the state that a context may change, without the server's settings."""
        session = self.isolation_level, self.readonly, self.deferrable
        own = self.autocommit, self.encoding, self.is_outdated, self._on_commit
        return self.get_transaction_status(), self.status, *session, *own


class Pool(Protocol):
    """The interface of every `Pool` in `pool.py`."""

    def getconn(self) -> Connection:
        """Check out a connection. Raises `DatabaseUnavailable`."""

    def putconn(self, conn: Connection) -> None:
        """Return a connection."""

    def stats(self) -> dict[str, int]:
        """Return how many connections there are, for the log."""

    def close(self) -> None:
        """Close the idle connections."""


def get_pool() -> Pool:
    """Return the pool of the current application in this process."""
    pool: Pool = current_app.extensions["pool"]
    return pool


def get_db() -> Connection:
    """Return the connection of this request, command or job, checked out at first use.

    It is in autocommit: a statement takes effect at once. A transaction is
    `with get_db() as db:`, which commits at the end and rolls back on an error. The end
    of the context rolls back an open transaction. Threads that share the context share
    the connection; a forked process gets its own. A lost connection is replaced, except
    in such a block. Raises `DatabaseUnavailable`.
    """
    context: Any = g._get_current_object()  # The proxy is too slow for each query.
    db: Connection | None = context.get("db")
    if db is None or (db.closed or db.is_outdated) and db._on_commit is None:
        # A handler of the log, which this writes to, may also store its lines.
        with context.setdefault("db_lock", RLock()):
            if context.get("db") is db:  # No other thread was faster.
                close_db()
                _check_out(context)
            db = context.db
    return cast(Connection, db)


def close_db() -> None:
    """Return the connection of this context to the pool, if there is one.

    An open transaction is rolled back. In a `with` block, all later queries of the
    block then raise `InterfaceError`.
    """
    context: Any = g._get_current_object()
    if db := context.get("db"):
        is_open = db.get_transaction_status() == IN_TRANSACTION
        if db._on_commit is None:
            del context.db  # Otherwise the rest of a block would run in autocommit.
        if db.is_outdated:
            get_pool().close()  # Its idle connections lead to the same server.
        if return_db := context.pop("return_db", None):
            return_db()
        if is_open and db._on_commit is None and current_app.debug:
            logger.warning("A transaction was open, and is rolled back: commit it.")


def on_commit(function: Callable[[], object]) -> None:
    """Call `function` once the transaction of this context is committed.

    It is not called after a rollback, unless that is to a savepoint. Outside of a
    transaction, it is called at once. The `with` block raises its errors, but the
    transaction stays committed. Raises `ProgrammingError` in a transaction that `BEGIN`
    or `autocommit = False` started. Queries in a block must not end its transaction.
    """
    db: Connection | None = g.get("db")
    callbacks = getattr(db, "_on_commit", None)
    if callbacks is None:
        if db and db.get_transaction_status() in (IN_TRANSACTION, IN_ERROR):
            message = "A transaction without a block is open: use `with get_db()`."
            raise psycopg2.ProgrammingError(message)
        function()
    else:
        callbacks.append(function)


def connect() -> Connection:
    """Open a connection, which the caller closes. Raises `DatabaseUnavailable`.

    After a server has rejected `STARTUP_OPTIONS`, connect without them.
    """
    parameters = connection_parameters()
    try:
        conn: Connection = psycopg2.connect(connection_factory=Connection, **parameters)
    except (psycopg2.OperationalError, UnicodeDecodeError) as error:
        # If a message is in another encoding, psycopg2 raises UnicodeDecodeError.
        reason = " ".join(str(getattr(error, "object", error)).split())
        if REJECTED.search(reason) and STARTUP_OPTIONS in parameters.get("options", ""):
            if current_app.extensions.pop("startup_options", ""):
                message = "Connecting without `%s`, which the server rejects: %s"
                current_app.logger.warning(message, STARTUP_OPTIONS, reason)
            return connect()
        raise DatabaseUnavailable(f"DATABASE_URL: {reason}") from error
    conn.as_opened = conn.state()
    conn.default_factory = conn.cursor_factory  # A tracing library may have set it.
    return conn


def connection_parameters() -> dict[str, Any]:
    """Return the parameters of a connection, for libpq.

    Parameters in `DATABASE_URL`, libpq's own environment variables and a service file
    override the defaults here. PostgreSQL's `options` in the URL or PGOPTIONS follow
    those of the project, and override them where both set the same.
    """
    url = current_app.config["DATABASE_URL"]
    url = url() if callable(url) else url  # `dev.py` sets a function.
    try:
        given = parse_dsn(check_url(url))
    except ValueError as error:
        raise DatabaseUnavailable(f"DATABASE_URL is invalid: {error}") from None
    defaults = {"fallback_application_name": current_app.name}
    if "service" not in given and "PGSERVICE" not in os.environ:
        defaults |= {
            "client_encoding": os.environ.get("PGCLIENTENCODING", "UTF8"),
            "connect_timeout": os.environ.get("PGCONNECT_TIMEOUT", "5"),
            # A lost peer is noticed after 25 s; by default it takes hours.
            "keepalives_idle": "10",
            "keepalives_interval": "5",
            "keepalives_count": "3",
            "tcp_user_timeout": "25000",
        }
        options = current_app.extensions.get("startup_options", "")
        own = given.get("options", os.environ.get("PGOPTIONS", ""))
        given["options"] = f"{options} {own}".strip()
    return defaults | given


def init_app(app: Flask) -> None:
    """Give every application context of `app` a connection when it asks for one."""
    app.extensions["startup_options"] = STARTUP_OPTIONS
    # Flask stops at the first teardown function that fails. An error handler here would
    # hide the application's for less specific classes. Extensions such as Flask-RESTX
    # handle errors before the application does.
    app.do_teardown_appcontext = partial(_tear_down, app.do_teardown_appcontext)  # type: ignore[method-assign]
    app.preprocess_request = partial(_translate_error, app.preprocess_request)  # type: ignore[method-assign]
    app.dispatch_request = partial(_translate_error, app.dispatch_request)  # type: ignore[method-assign]
    app.handle_exception = partial(_handle_late, app, app.handle_exception)  # type: ignore[method-assign]


def _tear_down(tear_down: Any, *args: Any) -> None:
    try:
        tear_down(*args)
    finally:
        close_db()


def _leave_to_parent() -> None:
    """Let the context of a forked process open a connection of its own."""
    # Two processes on one connection read each other's responses.
    if g:
        g.pop("db_lock", None)  # A thread of the parent may hold it.
        g.pop("db", None)
        if return_db := g.pop("return_db", None):
            return_db.detach()


if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=_leave_to_parent)


def _translate_error(function: Callable[..., Any], *args: Any) -> Any:
    """Raise the HTTP error for an outage, or for text that cannot be stored."""
    try:
        return function(*args)
    except (DatabaseUnavailable, psycopg2.Error, ValueError) as error:
        if http_error := _http_error(error):
            raise http_error from error
        raise


def _handle_late(app: Any, handle: Any, *args: Any) -> Any:
    """Handle an error of a session or of a function of `after_request`."""
    if http_error := _http_error(args[-1]):
        with suppress(Exception):  # Otherwise, Flask handles the first error.
            response = app.handle_user_exception(*args[:-1], http_error)
            return app.finalize_request(*args[:-1], response, from_error_handler=True)
    return handle(*args)


def _http_error(error: Exception) -> HTTPException | None:
    reason = " ".join(str(error).split())
    detail = getattr(getattr(error, "diag", None), "message_detail", None)
    is_ours = isinstance(error, (DatabaseUnavailable, psycopg2.Error, ValueError))
    if is_ours and (found := UNSTORABLE.search(f"{reason} {detail}")):
        # A stored text may raise these errors, too. Without input, the server is at
        # fault. Others are about a parameter of a query, which input always fills.
        has_input = request.query_string or request.content_length or request.view_args
        if has_input or found[0] in ("NUL (0x00)", "surrogates not"):
            current_app.logger.warning("The database rejects a text: %s", reason)
            message = "The text has a character that the database cannot store."
            return BadRequest(message)
    if isinstance(error, psycopg2.Error):
        # The application may have another connection by now.
        conn: Any = error.cursor.connection if error.cursor else g.get("db")
        if not (isinstance(conn, Connection) and conn.is_lost()):
            return None
        reason = f"The connection was lost: {reason}"
    elif not isinstance(error, DatabaseUnavailable):
        return None
    current_app.logger.error("%s", reason)
    description = reason if current_app.debug else None
    return ServiceUnavailable(description, retry_after=1)


@lru_cache
def _logged(factory: type[cursor]) -> type[cursor]:
    methods = {name: partialmethod(_watch, getattr(factory, name)) for name in QUERIES}
    return type(factory.__name__, (factory,), methods)


def _check_out(context: Any) -> None:
    began = monotonic()
    pool = get_pool()
    conn = pool.getconn()
    seconds = monotonic() - began
    # A thread may call `get_db` after the context has ended. The connection returns to
    # the pool when nothing refers to `g` any more.
    context.return_db = finalize(context, pool.putconn, conn)
    # Returning it at exit would wait for a query that still runs.
    context.return_db.atexit = False
    context.db = conn
    # In development, the time may include the start of PostgreSQL.
    if seconds > SLOW_CHECKOUT and not current_app.debug:
        message = "It took %d ms to get a connection (connections: %s)"
        current_app.logger.warning(message, 1000 * seconds, pool.stats())


def _watch(self: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    conn: Connection = getattr(self, "connection", self)
    began = monotonic()
    try:
        result = method(self, *args, **kwargs)
        if getattr(self, "withhold", False):
            conn.as_opened = ()  # It may outlive this context, so `clean` fails.
        if conn._on_commit is not None and conn.status == STATUS_BEGIN:
            if getattr(self, "statusmessage", "") == "COMMIT":
                conn._committed = len(conn._on_commit)
            if conn.info.transaction_status == IDLE:
                conn.rollback()  # psycopg2 does not know that the query ended it.
        return result
    except psycopg2.Error as error:
        conn.examine(error)
        raise
    finally:
        seconds = monotonic() - began
        if seconds > conn.app.config["SLOW_QUERY"]:
            # Bytes and the objects of `psycopg2.sql` may contain parameters.
            words = [arg for arg in args if isinstance(arg, str)] or [method.__name__]
            text = " ".join(words[0].split())[:1000]
            logger.warning("A query took %d ms: %s", 1000 * seconds, text)
