"""Plain SQL migrations: `migrations/*.sql`, applied in order by `flask migrate`.

Each runs in a transaction. One that begins with `-- no transaction` does not: it is for
a single statement that cannot, such as `CREATE INDEX CONCURRENTLY`.
"""

import logging
from collections.abc import Iterable
from contextlib import closing, nullcontext
from hashlib import sha256
from pathlib import Path
from time import sleep

import click
import psycopg2
from flask import Flask, current_app
from flask.cli import with_appcontext
from psycopg2.errors import UndefinedTable
from psycopg2.extensions import connection, cursor

from .db import connect

FOLDER = Path(__file__).parents[1] / "migrations"
LOCK = 7_164_001  # any number will do, so long as every runner takes the same

logger = logging.getLogger(__name__)


class MigrationError(click.ClickException):
    """A migration was refused: in a transaction, it left the database as it was."""


def migrate(conn: connection, *folders: Path) -> list[str]:
    """Apply the files that are new, and return their names.

    They are those of `folders`, or the current application's. `conn` is in autocommit
    and used for nothing else: it holds a lock until it is closed, so that of two
    runners one waits for the other. Raises `MigrationError`; the files before the
    refused one stay applied.
    """
    applied = _lock_and_list(conn)
    paths = _paths(folders or current_app.extensions["migrations"])
    return [path.name for path in paths if _apply_if_new(conn, path, applied)]


def status(conn: connection) -> dict[str, bool]:
    """Return the names of the files and whether each is applied, at one round trip."""
    try:
        with conn.cursor() as cursor:
            cursor.execute("SELECT name FROM schema_migrations")
            applied = {name for (name,) in cursor}
    except UndefinedTable:
        applied = set()
    paths = _paths(current_app.extensions["migrations"])
    return {path.name: path.name in applied for path in paths}


@click.command("migrate")
@click.option("--status", "only_list", is_flag=True, help="Only list the migrations.")
@with_appcontext
def migrate_command(only_list: bool) -> None:
    """Apply the SQL migrations that the database does not have yet."""
    with closing(connect()) as conn:
        if only_list:
            word = {True: "Applied", False: "Missing"}
            lines = [f"{word[done]} {name}" for name, done in status(conn).items()]
        else:
            lines = [f"Applied {name}" for name in migrate(conn)]
    click.echo("\n".join(lines) or "Nothing to apply")


def init_app(app: Flask) -> None:
    """Add the command `flask migrate`, and the application's own migrations."""
    app.extensions.setdefault("migrations", []).append(FOLDER)
    app.cli.add_command(migrate_command)


def _lock_and_list(conn: connection) -> dict[str, str]:
    with conn.cursor() as cursor:
        # A session's lock, not a row: a runner that is killed leaves none behind. It
        # waits between queries, for CREATE INDEX CONCURRENTLY waits for all that run.
        if not _locks(cursor):
            logger.warning("Another one migrates this database: waiting for its end")
            while not _locks(cursor):
                sleep(0.1)
        cursor.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY,"
            " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        cursor.execute("SELECT name, checksum FROM schema_migrations")
        return dict(cursor.fetchall())


def _paths(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob("*.sql"))]


def _locks(cursor: cursor) -> bool:
    cursor.execute("SELECT pg_try_advisory_lock(%s)", [LOCK])
    return cursor.fetchone() == (True,)


def _apply_if_new(conn: connection, path: Path, applied: dict[str, str]) -> bool:
    sql = path.read_text(encoding="utf-8")
    checksum = sha256(sql.encode()).hexdigest()
    if path.name not in applied:
        _apply(conn, path.name, sql, checksum)
    elif applied[path.name] != checksum:
        message = f"{path.name} was edited after it was applied: put the change into"
        raise MigrationError(f"{message} a new file, and this one back as it was.")
    return path.name not in applied


def _apply(conn: connection, name: str, sql: str, checksum: str) -> None:
    alone = sql.startswith("-- no transaction")
    try:
        with nullcontext() if alone else conn, conn.cursor() as cursor:
            cursor.execute(sql)
            cursor.execute("RESET ROLE; RESET ALL")  # what a file sets is for that file
            cursor.execute(
                "INSERT INTO schema_migrations (name, checksum) VALUES (%s, %s)",
                [name, checksum],
            )
    except psycopg2.Error as error:
        reason = error.diag.message_primary or error
        left = "drop what it left behind" if alone else "nothing of it is applied"
        raise MigrationError(f"{name}{_line(sql, error)}: {reason}; {left}.") from error


def _line(sql: str, error: psycopg2.Error) -> str:
    """Return the line that PostgreSQL points at, where it points at one."""
    position = error.diag.statement_position
    if position is None:
        return ""
    return f", line {sql.count(chr(10), 0, int(position) - 1) + 1}"
