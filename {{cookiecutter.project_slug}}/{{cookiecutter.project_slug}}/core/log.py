"""The log: a line a request, and the request's id on every line that comes of it."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from secrets import token_hex
from time import perf_counter
from typing import Any
from urllib.parse import quote

from flask import Flask, current_app
from psycopg2.extensions import connection, cursor

from .config import number

SANE_ID = re.compile(r"[\w.:+/=-]{1,128}", re.ASCII)

logger = logging.getLogger(__name__)
request_id: ContextVar[str] = ContextVar("request_id", default="-")


class TextFormatter(logging.Formatter):
    """Format a line for people: when, how bad, what, and in which request."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        of_request = f" [{request_id.get()}]" if request_id.get() != "-" else ""
        time = self.formatTime(record, "%H:%M:%S")
        return f"{time} {record.levelname} {record.message}{of_request}"


class JsonFormatter(logging.Formatter):
    """Format a line as a JSON object; a message with named parts has these, too."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
        }
        if isinstance(record.args, Mapping):
            line = line | dict(record.args) | line
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class RequestLog:
    """Log the requests to a WSGI application, once each has an answer.

    A request has the id of its header X-Request-ID, if that is sane, or a new one; the
    answer returns it.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        began = perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id.set(given if SANE_ID.fullmatch(given) else token_hex(8))

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            _log_request(environ, status, began)
            headers = [*headers, ("X-Request-ID", request_id.get())]
            return start_response(status, headers, *error)

        try:
            return self.app(environ, start)
        except Exception:  # which Werkzeug's debugger is to show
            _log_request(environ, "500", began)
            raise


class LoggedCursor(cursor):
    """Log the queries that take longer than `SLOW_QUERY`, without their parameters."""

    def execute(self, query: Any, vars: Any = None) -> None:
        """Run a query."""
        began = perf_counter()
        try:
            super().execute(query, vars)
        finally:
            _log_if_slow(self.connection, query, perf_counter() - began)

    def executemany(self, query: Any, vars_list: Iterable[Any]) -> None:
        """Run a query with each of the parameters."""
        began = perf_counter()
        try:
            super().executemany(query, vars_list)
        finally:
            _log_if_slow(self.connection, query, perf_counter() - began)


class LoggedConnection(connection):
    """Give every cursor, of whatever class, what `LoggedCursor` does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slow_query: float = current_app.config["SLOW_QUERY"]

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


def _log_request(environ: dict[str, Any], status: str, began: float) -> None:
    parts = {
        "method": environ["REQUEST_METHOD"],
        "path": quote(environ["PATH_INFO"], encoding="latin1"),
        "status": int(status[:3]),
        "ms": round(1000 * (perf_counter() - began), 1),
    }
    logger.info("%(method)s %(path)s %(status)d %(ms)s ms", parts)


def _log_if_slow(conn: Any, query: object, seconds: float) -> None:
    if seconds > conn.slow_query:
        # What psycopg2 puts together, in bytes or objects, has parameters in it.
        text = query if isinstance(query, str) else f"of the type {type(query)}"
        text = " ".join(text.split())[:1000]
        logger.warning("A query took %d ms: %s", 1000 * seconds, text)


def _is_no_request(record: logging.LogRecord) -> bool:
    return record.levelno != logging.INFO or " - - [" not in str(record.msg)


def init_app(app: Flask) -> None:
    """Log to the standard error, as JSON in production, unless logging is set up."""
    number(app, "SLOW_QUERY", 0.5)
    app.wsgi_app = RequestLog(app.wsgi_app)  # type: ignore[method-assign]
    # Werkzeug's own server has a line of its own for each request.
    logging.getLogger("werkzeug").addFilter(_is_no_request)
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if app.debug else JsonFormatter())
    logging.basicConfig(handlers=[handler])
    app.logger.setLevel(logging.DEBUG if app.debug else logging.INFO)
