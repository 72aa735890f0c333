"""The application of the reload tests, with routes that inspect its process."""

import os

from psycopg2.extensions import make_dsn

import {{ cookiecutter.project_slug }} as package
from {{ cookiecutter.project_slug }}.core.db import get_db

from .application import create_app

# Nothing that the project starts may stop a reload. Its pages must not matter here.
package.create_app()
app = create_app()

if isinstance(url := app.config["DATABASE_URL"], str):
    # pg_stat_activity then shows the process of each connection.
    name = f"process {os.getpid()}"
    app.config["DATABASE_URL"] = make_dsn(url, application_name=name)


@app.get("/version")
def version() -> dict[str, object]:
    """Return the version of the package, and the process that responds."""
    with get_db().cursor() as cursor:
        cursor.execute("SELECT 1")  # This opens a connection.
    return {
        "version": getattr(package, "VERSION", 0),
        "process": os.getpid(),
        "greeting": os.environ.get("GREETING"),
    }


@app.get("/query")
def query() -> str:
    """Run a query for a minute."""
    with get_db().cursor() as cursor:
        cursor.execute("SELECT pg_sleep(60)")
    return "done"


@app.get("/failure")
def failure() -> str:
    """Fail in the middle of a transaction."""
    get_db().cursor().execute("BEGIN")
    raise RuntimeError("on purpose")


@app.get("/transaction")
def transaction() -> str:
    """Insert an item, and run a query for a minute before the commit."""
    with get_db() as db, db.cursor() as cursor:
        cursor.execute("INSERT INTO items (body) VALUES ('unfinished')")
        cursor.execute("SELECT pg_sleep(60)")
    return "done"
