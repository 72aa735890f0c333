"""Whether the process is alive and ready, for a load balancer to poll."""

import psycopg2
from flask import Blueprint, Flask, current_app

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
    try:
        missing = migrate.missing(get_db())
    except migrate.MigrationError as error:
        current_app.logger.error("Not ready: %s", error)
        return {"status": "migrations unreadable"}, 503
    except (DatabaseUnavailable, psycopg2.Error) as error:
        stats = get_pool().stats()  # in the log only: /readyz is public
        current_app.logger.error("Not ready: %s (connections: %s)", error, stats)
        return {"status": "unavailable"}, 503
    if missing:
        names = ", ".join(missing)
        current_app.logger.error("Not ready: run `flask migrate` to apply %s", names)
        return {"status": "migrations missing"}, 503
    return {"status": "ok"}, 200


def init_app(app: Flask) -> None:
    """Add the two routes to `app`."""
    app.register_blueprint(bp)
