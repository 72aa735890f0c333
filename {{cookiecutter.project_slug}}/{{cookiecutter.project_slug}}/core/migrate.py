"""Plain SQL migrations: `migrations/*.sql`, applied in order by `flask migrate`.

Each is a transaction, so it holds no BEGIN, COMMIT, ROLLBACK or SAVEPOINT. One that
begins with `-- no transaction` is none: it is for a single statement that cannot be in
one, such as `CREATE INDEX CONCURRENTLY`.
"""

import logging
from hashlib import sha256
from pathlib import Path
from time import sleep
from typing import Any

import psycopg2
from flask import Flask, current_app
from psycopg2.errors import ActiveSqlTransaction, FeatureNotSupported, UndefinedTable
from psycopg2.extensions import connection, cursor

LOCK = 7_164_001  # Any number will do, as long as every runner takes the same.
TABLE = """CREATE TABLE IF NOT EXISTS schema_migrations (
    name text PRIMARY KEY, checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)"""
BLOCK = "DO $do_{mark}$BEGIN EXECUTE $_{mark}${sql}\n;SELECT$_{mark}$; END$do_{mark}$; "
# Settings of a file, such as its search_path, end with it.
RECORD = (
    "RESET ROLE; RESET ALL; "
    "INSERT INTO schema_migrations (name, checksum) VALUES (%s, %s)"
)

logger = logging.getLogger(__name__)


class MigrationError(Exception):
    """A migration was rejected, or the list of the applied ones cannot be read."""


def migrate(conn: connection, *folders: Path) -> list[str]:
    """Apply the files that are new, and return their names.

    They are those of `folders`, or the current application's. `conn` is in autocommit
    and used for nothing else: it holds a lock until it is closed, so that of two
    runners one waits for the other. Raises `MigrationError`; the files before the
    rejected one stay applied.
    """
    own, *others = folders or _folders()
    with conn.cursor() as cursor:
        _lock(cursor)
        applied = _applied(cursor)
        # A newer version of a library may have changed its files.
        _reject_edited(_paths(own), applied)
        paths = [path for path in _paths(own, *others) if path.name not in applied]
        if paths and not applied:
            cursor.execute(TABLE)
        for path in paths:
            _apply(cursor, path)
    return [path.name for path in paths]


def forget(conn: connection, name: str) -> None:
    """Take the migration for one that is not applied. Raises `MigrationError`."""
    with conn.cursor() as cursor:
        cursor.execute("DELETE FROM schema_migrations WHERE name = %s", [name])
        if cursor.rowcount == 0:
            raise MigrationError(f"{name} is not applied.")


def status(conn: connection) -> dict[str, str]:
    """Return "Applied", "Edited", "Missing" or "Gone" by name, at one round trip.

    A migration is gone when it is applied and has no file any more.
    """
    own, *others = _folders()
    with conn.cursor() as cursor:
        applied = _applied(cursor)
    names = [path.name for path in _paths(own, *others)]
    found = {name: "Applied" if name in applied else "Missing" for name in names}
    found |= {path.name: "Edited" for path in _edited(_paths(own), applied)}
    return dict.fromkeys(applied, "Gone") | found


def missing(conn: connection) -> list[str]:
    """Return the names of the files that are not applied, at one round trip."""
    # Unlike `status`, it reads no file: /readyz calls it all the time.
    with conn.cursor() as cursor:
        applied = _applied(cursor)
    return [path.name for path in _paths(*_folders()) if path.name not in applied]


def add_folder(app: Flask, folder: Path) -> None:
    """Let `app` apply the files in `folder` after its own."""
    app.extensions.setdefault("migrations", []).append(folder)


def _folders() -> list[Path]:
    own = Path(current_app.root_path) / "migrations"
    return [own, *current_app.extensions.get("migrations", [])]


def _paths(*folders: Path) -> list[Path]:
    # Not those of editors and macOS, which begin with a dot.
    return [path for folder in folders for path in sorted(folder.glob("[!.]*.sql"))]


def _lock(cursor: cursor) -> None:
    # A session's lock, not a row: a runner that is killed leaves none behind. It waits
    # between queries, because CREATE INDEX CONCURRENTLY waits for all that run.
    if not _try_lock(cursor):
        logger.warning("Another process migrates this database: waiting for its end")
        while not _try_lock(cursor):
            sleep(0.1)


def _try_lock(cursor: cursor) -> bool:
    cursor.execute("SELECT pg_try_advisory_lock(%s)", [LOCK])
    return cursor.fetchone() == (True,)


def _applied(cursor: cursor) -> dict[str, str]:
    """Return the checksums by name."""
    try:
        cursor.execute("SELECT name, checksum FROM schema_migrations ORDER BY name")
    except UndefinedTable:
        return {}
    except psycopg2.ProgrammingError as error:
        hint = "GRANT SELECT ON schema_migrations to this role, or, if the table is"
        hint += " another tool's, rename it or let this role have a schema."
        raise MigrationError(f"{error.diag.message_primary}: {hint}") from error
    return dict(cursor.fetchall())


def _edited(paths: list[Path], applied: dict[str, str]) -> list[Path]:
    """Return the files that were edited after they were applied."""
    return [p for p in paths if applied.get(p.name) not in (None, _read(p)[1])]


def _reject_edited(paths: list[Path], applied: dict[str, str]) -> None:
    for path in _edited(paths, applied):
        hint = "put the change into a new file, and this one back as it was."
        if path == paths[-1]:
            hint += " In development, use `flask migrate --reset`, or undo the file"
            hint += f" by hand and use `flask migrate --forget {path.name}`."
        raise MigrationError(f"{path.name} was edited after it was applied: {hint}")


def _read(path: Path) -> tuple[str, str]:
    """Return SQL and checksum of the file."""
    try:
        sql = path.read_text(encoding="utf-8-sig")  # PowerShell begins it with a mark.
    except UnicodeDecodeError:
        sql = "\0"
    if "\0" in sql:  # In UTF-16, every second byte is one.
        message = f"{path.name} is not in UTF-8: save it again in this encoding."
        raise MigrationError(message)
    return sql, sha256(sql.encode()).hexdigest()


def _apply(cursor: cursor, path: Path) -> None:
    sql, checksum = _read(path)
    outside = sql.startswith("-- no transaction")
    record = [path.name, checksum]
    try:
        if outside:
            cursor.execute(sql)
            cursor.execute(RECORD, record)
        else:
            # All or nothing: PostgreSQL executes no COMMIT there. A last SELECT INTO
            # would be refused as well. No file holds its own checksum.
            block = BLOCK.format(sql=sql, mark=checksum).replace("%", "%%")
            cursor.execute(block + RECORD, record)
    except psycopg2.Error as error:
        reason = error.diag.message_primary or str(error).partition("\n")[0]
        hint = "drop what it left behind" if outside else "nothing of it is applied"
        if isinstance(error, FeatureNotSupported):
            hint += ": leave out BEGIN, COMMIT, ROLLBACK and SAVEPOINT"
        if isinstance(error, ActiveSqlTransaction):
            hint = "put it alone into a file that begins with `-- no transaction`"
        if cursor.connection.closed:
            hint = "`flask migrate --status` tells whether it is applied"
        where = f"{path.name}{_line_number(sql, error.diag)}"
        raise MigrationError(f"{where}: {reason}; {hint}.") from error


def _line_number(sql: str, diag: Any) -> str:
    """Return the line that PostgreSQL points at, where it points at one."""
    position = diag.statement_position
    if (diag.internal_query or "").startswith(sql):  # not the query of a function
        position = diag.internal_position
    return f", line {sql.count(chr(10), 0, int(position)) + 1}" if position else ""
