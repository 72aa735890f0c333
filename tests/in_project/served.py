"""The application with routes for these tests."""

import atexit
import os
import signal

from app import create_app
from app.core import serve
from app.core.db import get_db
from flask import request, url_for
from granian import _signals
from granian._granian import WorkerSignal
from psycopg2.extensions import ISOLATION_LEVEL_SERIALIZABLE

app = create_app()

if "USE_BEFORE_FORK" in os.environ:
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("SELECT 1")


def lose_signal() -> WorkerSignal:
    """Do as a worker of granian that gets SIGTERM while it starts."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    return WorkerSignal()


if "LOSE_SIGNAL" in os.environ:
    serve.STOP_TIMEOUT = 2
    _signals.set_sync_signals = lose_signal


@app.before_request
def log_start() -> None:
    """Log the start of each request."""
    app.logger.info("started")


@app.post("/read")
def read() -> tuple[dict[str, int], int]:
    """Return the length of the body."""
    return {"length": len(request.get_data())}, 201


@app.get("/url")
def url() -> str:
    """Return the URL of this page."""
    return url_for("url", _external=True)


@app.get("/environ")
def environ() -> list[str]:
    """Return the names of what the server says of this request."""
    return list(request.environ)


@app.get("/at-exit")
def at_exit() -> str:
    """Print a line when the process exits."""
    atexit.register(print, "exit handler", flush=True)
    return ""


@app.get("/failure/<what>")
def failure(what: str) -> str:
    """Fail with an error that holds everything about the connection."""
    db = get_db()
    if what == "query":
        app.logger.info("%r %s %s", db, db.dsn, db.get_dsn_parameters())
        db.cursor().execute("SELECT 1 / 0 AS %s", [db.dsn])
    elif what == "lost":
        db.cursor().execute("SELECT pg_terminate_backend(pg_backend_pid())")
    raise RuntimeError(db, vars(db))


@app.get("/value/<int:value>")
def value(value: int) -> dict[str, int]:
    """Return the value from the database, and the ids of both processes."""
    with get_db().cursor() as cursor:
        cursor.execute("SELECT %s, pg_backend_pid()", [value])
        [found, backend] = cursor.fetchone()
    return {"value": found, "backend": backend, "process": os.getpid()}


@app.get("/sleep/<float:seconds>")
def sleep(seconds: float) -> dict[str, float]:
    """Run a query that takes this many seconds."""
    with get_db().cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [seconds])
    return {"slept": seconds}


@app.get("/leave/<what>")
def leave(what: str) -> dict[str, str]:
    """Leave the connection in another state, or fail in a transaction."""
    db = get_db()
    if what == "transaction":
        db.cursor().execute("BEGIN")
        db.cursor().execute("CREATE TEMPORARY TABLE left_behind (id int)")
    elif what == "session":
        db.set_session(ISOLATION_LEVEL_SERIALIZABLE, readonly=True, autocommit=False)
    elif what == "cursor":
        db.autocommit = False
        db.cursor("left_behind").execute("SELECT 1")
    elif what == "failure":
        db.cursor().execute("BEGIN")
        db.cursor().execute("SELECT 1 / 0")
    elif what == "failure_in_with":
        with db:
            db.cursor().execute("SELECT 1 / 0")
    elif what == "setting":
        db.cursor().execute("SET search_path TO left_behind")
        db.cursor().execute("SELECT pg_advisory_lock(1)")
        db.cursor().execute("CREATE TEMPORARY TABLE left_behind (id int)")
        db.cursor().execute("LISTEN left_behind")
    return {"left": what}


@app.get("/found")
def found() -> dict[str, object]:
    """Return the state of this request's connection."""
    db = get_db()
    with db.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('transaction_isolation'),"
            " current_setting('transaction_read_only'),"
            " current_setting('search_path'),"
            " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'),"
            " (SELECT count(*) FROM pg_cursors),"
            " to_regclass('pg_temp.left_behind')::text,"
            " (SELECT count(*) FROM pg_listening_channels())"
        )
        [row] = cursor.fetchall()
    return {"session": row, "autocommit": db.autocommit}
