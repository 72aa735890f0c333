"""Plain SQL migrations: `migrations/*.sql`, applied in order by `flask migrate`.

Each file is one transaction, so it contains no BEGIN, COMMIT, ROLLBACK or SAVEPOINT. A
file that begins with `-- no transaction` runs outside of one. It is for a single
statement that cannot be in a transaction, such as `CREATE INDEX CONCURRENTLY`.
"""

import logging
import re
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from time import sleep
from typing import Any

import psycopg2
from flask import Flask, current_app
from psycopg2 import errors
from psycopg2.extensions import TRANSACTION_STATUS_IDLE as IDLE
from psycopg2.extensions import connection, cursor

LOCK_TIMEOUT = 10.0  # seconds that a file waits for a table; later queries wait, too
LOCK = 7_164_001  # any number, but the same for every process that migrates
TABLE = """CREATE TABLE IF NOT EXISTS schema_migrations (
    name text PRIMARY KEY, checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now())"""
BLOCK = "DO $do_{mark}$BEGIN EXECUTE $_{mark}${sql}\n;SELECT$_{mark}$; END$do_{mark}$; "
# PostgreSQL 17 and later have transaction_timeout.
UNLIMITED = """SELECT set_config(name, '0', false) FROM pg_settings
    WHERE name IN ('statement_timeout', 'transaction_timeout')"""
# A file's settings and temporary tables must not affect the next one.
RECORD = """RESET SESSION AUTHORIZATION; RESET ROLE; SET CONSTRAINTS ALL IMMEDIATE;
    RESET ALL; CLOSE ALL; DEALLOCATE ALL; DISCARD TEMP;
    INSERT INTO schema_migrations VALUES (%s, %s)"""

# A file that raises these needs to run outside of a transaction.
OUTSIDE = errors.ActiveSqlTransaction, errors.InvalidTransactionTermination

BLANK = re.compile(r"--.*|/\*(?s:.*?)\*/|[\s;]")

logger = logging.getLogger(__name__)


class MigrationError(Exception):
    """A migration was rejected, or the list of the applied ones cannot be read."""


def migrate(
    conn: connection, *folders: Path, report: Callable[[str], object] = lambda name: ()
) -> list[str]:
    """Apply the files that are new, and return their names. `report` each at once.

    The files are those in `folders`, of which the last is the application's own, or
    those of the current application. Use `conn`, which is in autocommit, for nothing
    else: it holds a lock until it is closed, and a second process waits for that.
    Raises `MigrationError`; the files before the rejected one stay applied.
    """
    *others, own = folders or _folders()
    with cursor(conn) as plain:  # `conn.cursor()` would log a slow file.
        _lock(plain)
        applied = _applied(plain)
        # A newer version of a library may have changed its files.
        _reject_edited(_paths(own), applied)
        paths = [path for path in _paths(*others, own) if path.name not in applied]
        if paths and not applied:
            plain.execute(TABLE)
        for path in paths:
            _apply(plain, path)
            report(path.name)
    return [path.name for path in paths]


def forget(conn: connection, name: str) -> None:
    """List the migration as not applied. Raises `MigrationError`."""
    with conn.cursor() as cursor:
        cursor.execute("DELETE FROM schema_migrations WHERE name = %s", [name])
        if cursor.rowcount == 0:
            hint = "`flask migrate --status` lists the names."
            raise MigrationError(f"{name} is not applied: {hint}")


def status(conn: connection) -> dict[str, str]:
    """Return "Applied", "Edited", "Pending" or "Gone" by name, at one round trip.

    A migration is gone when it is applied, but its file no longer exists. Those of
    libraries, often dozens, are listed only while they are pending.
    """
    *others, folder = _folders()
    own, libraries = _paths(folder), [path.name for path in _paths(*others)]
    applied = _applied(conn.cursor())
    found = {name: "Gone" for name in applied if name not in libraries}
    found |= {path.name: "Applied" for path in own}
    found |= {path.name: "Edited" for path in _edited(own, applied)}
    pending = [name for name in (*found, *libraries) if name not in applied]
    return found | dict.fromkeys(pending, "Pending")


def find_problem(conn: connection) -> str:
    """Return a sentence about the first pending migration, or an empty string."""
    # Unlike `status`, this reads no file, because /readyz calls it often.
    applied = _applied(conn.cursor())
    names = [path.name for path in _paths(*_folders()) if path.name not in applied]
    return f"Migration {names[0]} is pending: run `flask migrate`." if names else ""


def add_folder(app: Flask, folder: Path) -> None:
    """Let `app` apply the files in `folder` before its own, which may refer to them."""
    app.extensions.setdefault("migrations", []).append(folder)


def _folders() -> list[Path]:
    own = Path(current_app.root_path) / "migrations"
    return [*current_app.extensions.get("migrations", []), own]


def _paths(*folders: Path) -> list[Path]:
    # Temporary files of editors and macOS begin with a dot.
    pattern = "[!.]*.[sS][qQ][lL]"
    return [path for folder in folders for path in sorted(folder.glob(pattern))]


def _lock(cursor: cursor) -> None:
    # The lock is the session's, so a process that is killed leaves none behind. Poll
    # for it: CREATE INDEX CONCURRENTLY would wait for a query that waits for the lock.
    for polls in count():
        cursor.execute("SELECT pg_try_advisory_lock(%s)", [LOCK])
        if cursor.fetchone() == (True,):
            return
        if polls == 10:  # Processes that start together wait for less.
            problem = "Another process migrates this database, or a pooler has its lock"
            logger.warning("%s: waiting", problem)
        sleep(0.1)


def _applied(cursor: cursor) -> dict[str, str]:
    """Return the checksums by name."""
    try:
        cursor.execute("SELECT name, checksum FROM schema_migrations ORDER BY name")
    except errors.UndefinedTable:
        return {}
    except psycopg2.ProgrammingError as error:
        hint = "GRANT SELECT ON schema_migrations, or rename the table of another tool."
        raise MigrationError(f"{error.diag.message_primary}: {hint}") from error
    return dict(cursor.fetchall())


def _edited(paths: list[Path], applied: dict[str, str]) -> list[Path]:
    """Return the files that were edited after they were applied."""
    return [p for p in paths if applied.get(p.name) not in (None, _read(p)[1])]


def _reject_edited(paths: list[Path], applied: dict[str, str]) -> None:
    for path in _edited(paths, applied):
        hint = "restore it, and put the change into a new file."
        if path == paths[-1]:
            hint += " In development, use `flask migrate --reset`, or undo the file"
            hint += f" by hand and use `flask migrate --forget {path.name}`."
        raise MigrationError(f"{path.name} was edited after it was applied: {hint}")


def _read(path: Path) -> tuple[str, str]:
    """Return SQL and checksum of the file."""
    # PowerShell writes a BOM. Bytes that are not UTF-8 become surrogates.
    sql = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    name = path.name.encode(errors="backslashreplace").decode()
    if name != path.name:
        raise MigrationError(f"The name {name} is not in UTF-8: rename the file.")
    if re.search("[\0\udc80-\udcff]", sql):
        raise MigrationError(f"{name} is not text in UTF-8: save it in this encoding.")
    return sql, sha256(sql.encode()).hexdigest()


def _apply(cursor: cursor, path: Path) -> None:
    sql, checksum = _read(path)
    if not BLANK.sub("", sql):
        raise MigrationError(f"{path.name} has no statement: write one or delete it.")
    outside = re.match(r"-- no transaction\b", sql)
    # Limits of the role are meant for requests. CREATE INDEX CONCURRENTLY has to wait.
    limit = 0 if outside else int(1000 * LOCK_TIMEOUT)
    cursor.execute(f"{UNLIMITED}; SET lock_timeout = {limit}")
    try:
        if outside:
            cursor.execute(sql)
            if cursor.connection.info.transaction_status != IDLE:
                hint = "end it with COMMIT, or leave out BEGIN."
                raise MigrationError(f"{path.name} leaves a transaction open: {hint}")
            cursor.execute(RECORD, [path.name, checksum])
        else:
            # PostgreSQL rejects COMMIT in a DO block, so the file is all or nothing. It
            # also rejects a SELECT INTO at the end, so another SELECT follows. No file
            # contains its own checksum, which ends the quotes.
            block = BLOCK.format(sql=sql, mark=checksum).replace("%", "%%")
            cursor.execute(block + RECORD, [path.name, checksum])
    except psycopg2.Error as error:
        reason = error.diag.message_primary or str(error).partition("\n")[0]
        hint = "drop what it left behind" if outside else "nothing of it is applied"
        is_dynamic = error.diag.source_function == "exec_stmt_dynexecute"
        if is_dynamic and "COPY" not in reason:
            hint += ": leave out BEGIN, COMMIT, ROLLBACK and SAVEPOINT"
        if isinstance(error, errors.LockNotAvailable):
            hint += ": end the transaction that holds a lock, and try again"
        if isinstance(error, OUTSIDE) and "SET TRANSACTION" not in reason:
            hint = "put it alone into a file that begins with `-- no transaction`"
        if cursor.connection.closed:
            hint = "`flask migrate --status` tells whether it is applied"
        where = f"{path.name}{_line_number(sql, error.diag)}"
        # The detail of these quotes data.
        quotes = isinstance(error, psycopg2.DataError | psycopg2.IntegrityError)
        detail = "" if quotes else error.diag.message_detail
        parts = f"{reason}; {hint}.", detail, error.diag.message_hint
        raise MigrationError(f"{where}: {' '.join(filter(None, parts))}") from error


def _line_number(sql: str, diag: Any) -> str:
    """Return the line that PostgreSQL points at, or an empty string."""
    position = diag.statement_position
    if (diag.internal_query or "").startswith(sql):  # not the query of a function
        position = diag.internal_position
    return f", line {sql.count(chr(10), 0, int(position)) + 1}" if position else ""
