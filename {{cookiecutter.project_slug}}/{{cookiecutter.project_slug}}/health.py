"""Whether the process is alive and ready, for a load balancer to ask."""

import psycopg2
from flask import Blueprint, current_app

from .db import Unavailable, get_db

bp = Blueprint("health", __name__)


@bp.get("/healthz")
def healthz() -> dict[str, str]:
    """Answer without the database: the process is alive."""
    return {"status": "ok"}


@bp.get("/readyz")
def readyz() -> tuple[dict[str, object], int]:
    """Answer 200 when the database answers, 503 when it does not.

    `pool` is how many connections this process may have, has lent, and is asked for.
    """
    pool = current_app.extensions["pool"]
    try:
        with get_db().cursor() as cursor:
            cursor.execute("SELECT 1")
    except (Unavailable, psycopg2.Error) as error:
        current_app.logger.error("Not ready: %s", error)
        return {"status": "unavailable", "pool": pool.status()}, 503
    return {"status": "ok", "pool": pool.status()}, 200
