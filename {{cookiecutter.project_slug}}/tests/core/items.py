"""A table and two routes for the tests of `core`, which do not use the example."""

from contextlib import closing

from flask import Blueprint, abort, jsonify, request
from flask.typing import ResponseReturnValue

from {{ cookiecutter.project_slug }}.core.db import get_db

from ..conftest import connect

bp = Blueprint("items", __name__, url_prefix="/items")


@bp.get("")
def index() -> ResponseReturnValue:
    """List the items."""
    with get_db().cursor() as cursor:
        cursor.execute("SELECT body FROM items ORDER BY id")
        return jsonify([body for (body,) in cursor])


@bp.post("")
def add() -> ResponseReturnValue:
    """Add an item from a form or from JSON."""
    data = request.get_json() if request.is_json else request.form
    if "body" not in data:
        abort(400)
    with get_db() as db, db.cursor() as cursor:
        cursor.execute("INSERT INTO items (body) VALUES (%s)", [data["body"]])
    return "added", 201


def create_table(url: str) -> None:
    """Create the table in the database at `url`."""
    with closing(connect(url)) as conn, conn.cursor() as cursor:
        columns = "(id serial PRIMARY KEY, body text)"
        cursor.execute(f"CREATE TABLE IF NOT EXISTS items {columns}")
