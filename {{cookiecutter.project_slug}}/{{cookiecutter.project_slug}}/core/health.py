"""Health checks, with which a load balancer polls whether the process is ready."""

from functools import partial
from typing import Any

import psycopg2
from flask import Blueprint, Flask, current_app, request

from . import migrate
from .db import DatabaseUnavailable, get_db, get_pool

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def healthz() -> dict[str, str]:
    """Respond without the database: the process is alive."""
    return {"status": "ok"}


@bp.get("/readyz")
def readyz() -> tuple[dict[str, str], int]:
    """Respond 200 when the database responds and has every migration, 503 otherwise."""
    status = "migrations missing"
    try:
        problem = migrate.find_problem(get_db())
    except migrate.MigrationError as error:
        status, problem = "migrations unreadable", str(error)
    except (DatabaseUnavailable, psycopg2.Error) as error:
        stats = get_pool().stats()
        status, problem = "unavailable", f"{error} (connections: {stats})"
    if not problem:
        return {"status": "ok"}, 200
    current_app.logger.error("Not ready: %s", problem)
    return {"status": status}, 503  # The problem is not for the public.


@bp.before_app_request
def _respond_first() -> Any:
    # The application's own hooks may require a login.
    if request.blueprint == bp.name:
        return current_app.view_functions[str(request.endpoint)]()
    return None


def init_app(app: Flask) -> None:
    """Add the two routes to `app`, for any host and before its hooks."""
    app.register_blueprint(bp)
    app.wsgi_app = partial(_trust_checks, app, app.wsgi_app)  # type: ignore[method-assign]


def _trust_checks(
    app: Flask, wsgi_app: Any, environ: dict[str, Any], start_response: Any
) -> Any:
    # Most load balancers name the address of the machine, which may change.
    if environ["PATH_INFO"] in ("/healthz", "/readyz"):
        hosts = app.config["TRUSTED_HOSTS"] or ["localhost"]
        environ["HTTP_HOST"] = hosts[0].lstrip(".")
    return wsgi_app(environ, start_response)
