"""Plain SQL migrations: `migrations/*.sql`, applied in order by `flask migrate`."""

from collections.abc import Iterable
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import click
import psycopg2
from flask import Flask, current_app
from flask.cli import with_appcontext
from psycopg2.extensions import connection

from .db import connect

FOLDER = Path(__file__).parent / "migrations"
LOCK = 7_164_001  # any number will do, so long as every runner takes the same


class MigrationError(click.ClickException):
    """A migration was refused: it left the database as it was."""


def migrate(conn: connection, *folders: Path) -> list[str]:
    """Apply the files that are new, each in a transaction, and return their names.

    They are those of `folders`, or the current application's. `conn` is in autocommit
    and used for nothing else: it holds a lock until it is closed, so that of two
    runners one waits for the other. Raises `MigrationError`; the files before the
    refused one stay applied.
    """
    applied = _lock_and_list(conn)
    paths = _paths(folders or current_app.extensions["migrations"])
    return [path.name for path in paths if _apply_if_new(conn, path, applied)]


@click.command("migrate")
@with_appcontext
def migrate_command() -> None:
    """Apply the SQL migrations that the database does not have yet."""
    with closing(connect()) as conn:
        names = migrate(conn)
    click.echo("\n".join(f"Applied {name}" for name in names) or "Nothing to apply")


def init_app(app: Flask) -> None:
    """Add the command `flask migrate`, and the application's own migrations."""
    app.extensions.setdefault("migrations", []).append(FOLDER)
    app.cli.add_command(migrate_command)


def _lock_and_list(conn: connection) -> dict[str, str]:
    with conn.cursor() as cursor:
        # A session's lock, not a row: a runner that is killed leaves none behind.
        cursor.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        cursor.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY,"
            " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        cursor.execute("SELECT name, checksum FROM schema_migrations")
        return dict(cursor.fetchall())


def _paths(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob("*.sql"))]


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
    try:
        with conn, conn.cursor() as cursor:
            cursor.execute(
                "INSERT INTO schema_migrations (name, checksum) VALUES (%s, %s)",
                [name, checksum],
            )
            cursor.execute(sql)
            cursor.execute("RESET ALL")  # what a file sets is for that file
    except psycopg2.Error as error:
        reason = error.diag.message_primary or error
        message = f"{name}{_line(sql, error)}: {reason}; nothing of it is applied."
        raise MigrationError(message) from error


def _line(sql: str, error: psycopg2.Error) -> str:
    """Return the line that PostgreSQL points at, where it points at one."""
    position = error.diag.statement_position
    if position is None:
        return ""
    return f", line {sql.count(chr(10), 0, int(position) - 1) + 1}"
