"""Health checks, with which a load balancer polls whether the process is ready."""

from functools import partial
from threading import Lock
from typing import Any

import psycopg2
from flask import Flask, current_app, jsonify
from werkzeug.exceptions import MethodNotAllowed

from . import migrate
from .db import DatabaseUnavailable, get_db

CHECK_TIMEOUT = 5.0  # seconds that a check waits for another one


def init_app(app: Flask) -> None:
    """Respond to health checks for any host, and before `app` sees the request."""
    app.wsgi_app = partial(_respond, app, app.wsgi_app)  # type: ignore[method-assign]


def _respond(
    app: Flask, wsgi_app: Any, environ: dict[str, Any], start_response: Any
) -> Any:
    # These are not routes, because hooks of the application may require a login, and
    # most load balancers name the address of the machine as the host.
    path = environ["PATH_INFO"]
    if path not in ("/healthz", "/readyz"):
        return wsgi_app(environ, start_response)
    response: Any = MethodNotAllowed(["GET", "HEAD"])
    if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
        with app.app_context():
            status = check_readiness() if path == "/readyz" else "ok"
            response = jsonify(status=status)
        response.status_code = 200 if status == "ok" else 503
    return response(environ, start_response)


def check_readiness() -> str:
    """Return "ok" when the database responds and has every migration.

    Log what is wrong otherwise.
    """
    status, problem = "not responding", "Another check still waits for the database."
    # If the database does not respond, checks must not occupy all threads.
    one_check = current_app.extensions.setdefault("readiness", Lock())
    if one_check.acquire(timeout=CHECK_TIMEOUT):
        try:
            status, problem = "migrations pending", migrate.find_problem(get_db())
        except migrate.MigrationError as error:
            status, problem = "migrations unreadable", str(error)
        except (DatabaseUnavailable, psycopg2.Error) as error:
            status, problem = "unavailable", str(error)
        finally:
            one_check.release()
    if not problem:
        return "ok"
    current_app.logger.error("Not ready: %s", problem)
    return status  # The problem is not for the public.
