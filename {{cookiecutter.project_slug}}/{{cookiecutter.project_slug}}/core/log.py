"""The log: one line per request, and the request's id on every line it causes."""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from logging.config import dictConfig
from random import getrandbits
from time import gmtime, perf_counter, strftime, time
from typing import Any
from urllib.parse import quote

from flask import Flask

VALID_REQUEST_ID = re.compile(r"[\w.:+/=-]{1,128}", re.ASCII)

PACKAGE = __name__.partition(".")[0]
MESSAGE = "%(method)s %(path)s %(status)d %(ms)s ms"
TEXT = "%(asctime)s %(levelname)s %(message)s%(suffix)s"
# The line of a request, as `JsonFormatter` formats it.
LINE = (
    '{"time": "%s", "level": "INFO", "logger": "%s", "message": "%s %s %d %.1f ms",'
    ' "request_id": "%s", "method": "%s", "path": "%s", "status": %d, "ms": %.1f}\n'
)

logger = logging.getLogger(__name__)
app_logger = logging.getLogger(PACKAGE)
_encode = json.JSONEncoder(default=str, allow_nan=False).encode
request_id: ContextVar[str] = ContextVar("request_id", default="-")


class RequestIdFilter(logging.Filter):
    """Give every record the id of the current request, or "-" outside of one."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = current = request_id.get()
        record.suffix = f" [{current}]" if current != "-" else ""
        return True


class JsonFormatter(logging.Formatter):
    """Format a record as a JSON object, with the named arguments of our messages."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", "-"),
        }
        # Other packages may put secrets there, as Celery does with a job's arguments.
        is_ours = record.name.partition(".")[0] == PACKAGE
        if is_ours and isinstance(record.args, Mapping):
            line |= {**record.args, **line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return _encode(line)
        except (TypeError, ValueError):  # NaN, a key that is a tuple, a cycle
            return _encode({str(name): str(value) for name, value in line.items()})


class RequestLogMiddleware:
    """Log each request to a WSGI application once the response starts.

    A request keeps the id of its header X-Request-ID if that is valid; otherwise it
    gets a new one. The response returns the id.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        began = perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        if not VALID_REQUEST_ID.fullmatch(given):
            given = f"{getrandbits(64):016x}"  # noqa: S311  # It is not a secret.
        request_id.set(given)

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            _log_request(environ, status, began)
            headers = [*headers, ("X-Request-ID", request_id.get())]
            return start_response(status, headers, *error)

        try:
            return self.app(environ, start)
        except Exception:  # Werkzeug's debugger shows it.
            _log_request(environ, "500", began)
            raise


# Requests repeat their paths, and follow each other within a second.
_quote = lru_cache(partial(quote, encoding="latin1"))


@lru_cache(1)
def _second(seconds: int) -> str:
    return strftime("%Y-%m-%dT%H:%M:%S", gmtime(seconds))


def _timestamp(seconds: float) -> str:
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03}+00:00"


def _log_request(environ: dict[str, Any], status: str, began: float) -> None:
    method, path = _quote(environ["REQUEST_METHOD"]), _quote(environ["PATH_INFO"])
    code, ms = int(status[:3]), 1000 * (perf_counter() - began)
    handlers: list[Any] = app_logger.handlers + logging.root.handlers
    kinds = [(type(h), type(h.formatter), len(h.filters), h.level) for h in handlers]
    is_enabled = not logger.filters and logger.isEnabledFor(logging.INFO)
    if is_enabled and kinds == [(logging.StreamHandler, JsonFormatter, 1, 0)]:
        # Making, formatting and handling a record takes five times as long.
        texts = __name__, method, path, code, ms, request_id.get(), method, path
        line = LINE % (_timestamp(time()), *texts, code, ms)
        # There may be no stream.
        with suppress(AttributeError, OSError, ValueError), handlers[0].lock:
            handlers[0].stream.write(line)
            handlers[0].stream.flush()
    else:
        parts = {"method": method, "path": path, "status": code, "ms": round(ms, 1)}
        logger.info(MESSAGE, parts)


def _log_thread_error(error: Any) -> None:
    if error.exc_type is not SystemExit:
        logger.error("A thread failed", exc_info=error[:3])


def _is_not_request(record: logging.LogRecord) -> bool:
    return record.levelno != logging.INFO or " - - [" not in str(record.msg)


CONFIG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"request_id": {"()": RequestIdFilter}},
    "formatters": {
        "text": {"format": TEXT, "datefmt": "%H:%M:%S"},
        "json": {"()": JsonFormatter},
    },
    "root": {"handlers": ["stderr"]},
}


def init_app(app: Flask) -> None:
    """Log to standard error, as JSON in production, unless logging is configured."""
    app.wsgi_app = RequestLogMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    # Werkzeug's own server logs one more line per request.
    logging.getLogger("werkzeug").addFilter(_is_not_request)
    if not logging.root.handlers:
        stderr = {"class": "logging.StreamHandler", "filters": ["request_id"]}
        stderr["formatter"] = "text" if app.debug else "json"
        dictConfig(CONFIG | {"handlers": {"stderr": stderr}})
        # Otherwise Python writes these to standard error in its own format.
        logging.captureWarnings(True)
        threading.excepthook = _log_thread_error
    # At first use, Flask adds a handler of its own to a logger that has none.
    app.logger.setLevel(logging.DEBUG if app.debug else logging.INFO)
