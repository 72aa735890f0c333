"""Whether the process is alive and ready, for a load balancer to ask."""

import psycopg2
from flask import Blueprint, current_app

from . import migrate
from .db import Unavailable, get_db

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def healthz() -> dict[str, str]:
    """Answer without the database: the process is alive."""
    return {"status": "ok"}


@bp.get("/readyz")
def readyz() -> tuple[dict[str, object], int]:
    """Answer 200 when the database answers and has every migration, 503 otherwise.

    `pool` is how many connections this process may have, has lent, and is asked for.
    """
    pool = current_app.extensions["pool"]
    try:
        missing = [name for name, done in migrate.status(get_db()).items() if not done]
    except (Unavailable, psycopg2.Error) as error:
        current_app.logger.error("Not ready: %s", error)
        return {"status": "unavailable", "pool": pool.status()}, 503
    if missing:
        names = ", ".join(missing)
        current_app.logger.error("Not ready: `flask migrate` is to apply %s", names)
        return {"status": "migrations missing", "pool": pool.status()}, 503
    return {"status": "ok", "pool": pool.status()}, 200
