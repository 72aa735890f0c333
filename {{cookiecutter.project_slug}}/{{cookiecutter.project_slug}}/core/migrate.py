"""Plain SQL migrations: `migrations/*.sql`, applied in order by `flask migrate`.

Each runs in a transaction. One that begins with `-- no transaction` does not: it is for
a single statement that cannot, such as `CREATE INDEX CONCURRENTLY`.
"""

import logging
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from time import sleep

import psycopg2
from flask import Flask, current_app
from psycopg2.errors import InsufficientPrivilege, UndefinedColumn, UndefinedTable
from psycopg2.extensions import connection, cursor

LOCK = 7_164_001  # Any number will do, as long as every runner takes the same.

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
        try:
            applied = _applied(cursor)
        except UndefinedTable:
            cursor.execute(
                "CREATE TABLE schema_migrations (name text PRIMARY KEY, checksum text"
                " NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
            )
            applied = {}
        # An edition of the library may edit the files of `others`.
        _reject_edited(own, applied)
        paths = [path for path in _paths([own, *others]) if path.name not in applied]
        for path in paths:
            _apply(cursor, path)
    return [path.name for path in paths]


def forget(conn: connection, name: str) -> bool:
    """Take the migration for one that is not applied; return whether it was."""
    with conn.cursor() as cursor:
        cursor.execute("DELETE FROM schema_migrations WHERE name = %s", [name])
        return cursor.rowcount == 1


def status(conn: connection) -> dict[str, str]:
    """Return "Applied", "Missing" or "Gone" by name, at one round trip.

    A migration is gone when it is applied and has no file any more.
    """
    try:
        with conn.cursor() as cursor:
            applied = _applied(cursor)
    except UndefinedTable:
        applied = {}
    names = [path.name for path in _paths(_folders())]
    found = {name: "Applied" if name in applied else "Missing" for name in names}
    return dict.fromkeys(sorted(applied), "Gone") | found


def missing(conn: connection) -> list[str]:
    """Return the names of the files that are not applied."""
    return [name for name, state in status(conn).items() if state == "Missing"]


def add_folder(app: Flask, folder: Path) -> None:
    """Let `app` apply the files in `folder` after its own."""
    app.extensions.setdefault("migrations", []).append(folder)


def _folders() -> list[Path]:
    own = Path(current_app.root_path) / "migrations"
    return [own, *current_app.extensions.get("migrations", [])]


def _paths(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.glob("*.sql"))]


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
    """Return the checksums by name. Raises `UndefinedTable` where none was applied."""
    try:
        cursor.execute("SELECT name, checksum FROM schema_migrations ORDER BY name")
    except UndefinedColumn as error:
        message = "The table schema_migrations is another tool's: rename that one, or"
        raise MigrationError(f"{message} let this role have a schema.") from error
    except InsufficientPrivilege as error:
        hint = "GRANT SELECT ON schema_migrations to this role"
        raise MigrationError(f"{error.diag.message_primary}: {hint}.") from error
    return dict(cursor.fetchall())


def _reject_edited(folder: Path, applied: dict[str, str]) -> None:
    paths = _paths([folder])
    for path in paths:
        if applied.get(path.name) not in (None, _read(path)[1]):
            message = f"{path.name} was edited after it was applied: put the change"
            message += " into a new file, and this one back as it was."
            if path == paths[-1]:
                message += " In development, apply it again to a new database with"
                message += " `flask migrate --reset`, or undo it by hand and"
                message += f" use `flask migrate --forget {path.name}`."
            raise MigrationError(message)


def _read(path: Path) -> tuple[str, str]:
    """Return SQL and checksum of the file."""
    try:
        sql = path.read_text(encoding="utf-8-sig")  # PowerShell begins it with a mark.
    except UnicodeDecodeError as error:
        message = f"{path.name} is not in UTF-8: save it again in this encoding."
        raise MigrationError(message) from error
    return sql, sha256(sql.encode()).hexdigest()


def _apply(cursor: cursor, path: Path) -> None:
    sql, checksum = _read(path)
    begin, end = "BEGIN; SAVEPOINT migration", "RELEASE migration"
    if sql.startswith("-- no transaction"):
        begin = end = "SELECT"
    try:
        cursor.execute(begin)
        cursor.execute(sql)
        # Settings of a file end with it. RELEASE fails if the file has committed.
        cursor.execute(f"SET CONSTRAINTS ALL IMMEDIATE; {end}; RESET ROLE; RESET ALL")
        cursor.execute(
            "INSERT INTO schema_migrations (name, checksum) VALUES (%s, %s)",
            [path.name, checksum],
        )
        cursor.execute("COMMIT" if begin != end else "SELECT")
    except psycopg2.Error as error:
        reason = error.diag.message_primary or str(error).partition("\n")[0]
        hint = _clean_up(cursor, begin == end)
        where = f"{path.name}{_line_number(sql, error)}"
        raise MigrationError(f"{where}: {reason}; {hint}.") from error


def _clean_up(cursor: cursor, outside_transaction: bool) -> str:
    """Roll back. Return what the failed file has left behind."""
    if outside_transaction:
        return "drop what it left behind"
    try:
        cursor.execute("ROLLBACK TO migration; ROLLBACK")
    except (psycopg2.OperationalError, psycopg2.InterfaceError):
        return "`flask migrate --status` tells whether it is applied"
    except psycopg2.Error:
        cursor.execute("ROLLBACK")
        hint = "leave out BEGIN, COMMIT and ROLLBACK: each file is a transaction"
        return f"part of it may be applied, as it ended its transaction: {hint}"
    return "nothing of it is applied"


def _line_number(sql: str, error: psycopg2.Error) -> str:
    """Return the line that PostgreSQL points at, where it points at one."""
    position = error.diag.statement_position
    if position is None:
        return ""
    return f", line {sql.count(chr(10), 0, int(position) - 1) + 1}"
