"""Plain SQL migrations: `migrations/*.sql`, applied in order by `flask migrate`.

Each runs in a transaction. One that begins with `-- no transaction` does not: it is for
a single statement that cannot, such as `CREATE INDEX CONCURRENTLY`.
"""

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from time import sleep

import psycopg2
from flask import Flask, current_app
from psycopg2.errors import UndefinedTable
from psycopg2.extensions import connection, cursor

LOCK = 7_164_001  # any number will do, so long as every runner takes the same

logger = logging.getLogger(__name__)


class MigrationError(Exception):
    """A migration was refused: in a transaction, it left the database as it was."""


def migrate(conn: connection, *folders: Path) -> list[str]:
    """Apply the files that are new, and return their names.

    They are those of `folders`, or the current application's. `conn` is in autocommit
    and used for nothing else: it holds a lock until it is closed, so that of two
    runners one waits for the other. Raises `MigrationError`; the files before the
    refused one stay applied.
    """
    applied = _lock_and_list(conn)
    paths = _paths(folders or _folders())
    return [path.name for path in paths if _apply_if_new(conn, path, applied)]


def status(conn: connection) -> dict[str, bool]:
    """Return the names of the files and whether each is applied, at one round trip."""
    try:
        with conn.cursor() as cursor:
            cursor.execute("SELECT name FROM schema_migrations")
            applied = {name for (name,) in cursor}
    except UndefinedTable:
        applied = set()
    paths = _paths(_folders())
    return {path.name: path.name in applied for path in paths}


def missing(conn: connection) -> list[str]:
    """Return the names of the files that are not applied."""
    return [name for name, done in status(conn).items() if not done]


def add_folder(app: Flask, folder: Path) -> None:
    """Let `app` apply the files in `folder` after its own."""
    app.extensions.setdefault("migrations", []).append(folder)


def _folders() -> list[Path]:
    own = Path(current_app.root_path) / "migrations"
    return [own, *current_app.extensions.get("migrations", [])]


def _lock_and_list(conn: connection) -> dict[str, str]:
    with conn.cursor() as cursor:
        # A session's lock, not a row: a runner that is killed leaves none behind. It
        # waits between queries, for CREATE INDEX CONCURRENTLY waits for all that run.
        if not _try_lock(cursor):
            logger.warning("Another one migrates this database: waiting for its end")
            while not _try_lock(cursor):
                sleep(0.1)
        cursor.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY,"
            " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        cursor.execute("SELECT name, checksum FROM schema_migrations")
        return dict(cursor.fetchall())


def _paths(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob("*.sql"))]


def _try_lock(cursor: cursor) -> bool:
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
    outside_transaction = sql.startswith("-- no transaction")
    try:
        with nullcontext() if outside_transaction else conn, conn.cursor() as cursor:
            cursor.execute(sql)
            cursor.execute("RESET ROLE; RESET ALL")  # what a file sets is for that file
            cursor.execute(
                "INSERT INTO schema_migrations (name, checksum) VALUES (%s, %s)",
                [name, checksum],
            )
    except psycopg2.Error as error:
        reason = error.diag.message_primary or error
        where = f"{name}{_line_number(sql, error)}"
        hint = "nothing of it is applied"
        if outside_transaction:
            hint = "drop what it left behind"
        raise MigrationError(f"{where}: {reason}; {hint}.") from error


def _line_number(sql: str, error: psycopg2.Error) -> str:
    """Return the line that PostgreSQL points at, where it points at one."""
    position = error.diag.statement_position
    if position is None:
        return ""
    return f", line {sql.count(chr(10), 0, int(position) - 1) + 1}"
