"""An application for the tests of `core/`, without any code of your project.

Your pages, settings, error handlers and templates do not change the results.
"""

from contextlib import closing

from flask import Blueprint, Flask, abort, jsonify, request
from flask.typing import ResponseReturnValue

from {{ cookiecutter.project_slug }} import core
from {{ cookiecutter.project_slug }}.core.config import Overrides
from {{ cookiecutter.project_slug }}.core.db import get_db

from ..conftest import connect

# The settings that production requires. No server listens at these addresses.
PRODUCTION = {
    "DATABASE_URL": "postgresql://127.0.0.1:1/none",
    "SECRET_KEY": "0123456789abcdef" * 2,
    "TRUSTED_HOSTS": "localhost",
{%- if cookiecutter.worker == 'celery' %}
    "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
{%- endif %}
}

bp = Blueprint("items", __name__, url_prefix="/items")


def create_app(overrides: Overrides = None) -> Flask:
    """Create an application that has only `core`."""
    app = Flask(core.__name__.partition(".")[0], template_folder="none")
    core.init_app(app, overrides)
    return app


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
