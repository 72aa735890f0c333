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
def readyz() -> tuple[dict[str, str], int]:
    """Answer 200 when the database answers, 503 when it does not."""
    try:
        with get_db().cursor() as cursor:
            cursor.execute("SELECT 1")
    except (Unavailable, psycopg2.Error) as error:
        current_app.logger.error("Not ready: %s", error)
        return {"status": "unavailable"}, 503
    return {"status": "ok"}, 200
