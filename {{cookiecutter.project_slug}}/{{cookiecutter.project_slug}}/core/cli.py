"""The project's commands for `flask`."""

from contextlib import ExitStack, closing, suppress

import click
import psycopg2
from flask import Flask, current_app
from flask.cli import with_appcontext
from psycopg2 import extensions
from psycopg2.errors import InvalidCatalogName
from psycopg2.extensions import cursor, make_dsn, parse_dsn, quote_ident
from psycopg2.extras import wait_select

from . import migrate
from .db import DatabaseUnavailable, connect, database_url
from .serve import serve_command

ERRORS = (DatabaseUnavailable, migrate.MigrationError, psycopg2.Error, OSError)


@click.command("migrate")
@click.option("--status", "only_list", is_flag=True, help="Only list the migrations.")
@click.option("--forget", metavar="NAME", help="List a migration as missing again.")
@click.option("--reset", is_flag=True, help="First drop and create the database.")
@with_appcontext
def migrate_command(only_list: bool, forget: str | None, reset: bool) -> None:
    """Apply the SQL migrations that the database does not have yet.

    With --reset, which needs debug mode, a command `seed` of the application follows.
    """
    if reset and (only_list or forget):
        raise click.UsageError("Use --reset without other options.")
    try:
        if reset:
            _create_again()
        with closing(connect()) as conn, ExitStack() as stack:
            # Otherwise Ctrl-C has no effect before the end of a query.
            extensions.set_wait_callback(wait_select)
            stack.callback(extensions.set_wait_callback, None)
            if only_list:
                found = migrate.status(conn).items()
                lines = [f"{state} {name}" for name, state in found]
            elif forget:
                migrate.forget(conn, forget)
                lines = [f"Missing {forget}"]
            else:
                lines = [f"Applied {name}" for name in migrate.migrate(conn)]
    except ERRORS as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    click.echo("\n".join(lines) or "Nothing to apply")
    if reset and (seed := current_app.cli.commands.get("seed")):
        click.get_current_context().invoke(seed)


def _create_again() -> None:
    if not current_app.debug:
        message = "--reset drops the database: use it with `flask --debug`."
        raise click.ClickException(message)
    url = database_url()
    if not (name := parse_dsn(url).get("dbname")):
        raise click.ClickException("DATABASE_URL names no database to drop.")
    with closing(psycopg2.connect(make_dsn(url, dbname="postgres"))) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:
            old, new = (quote_ident(n, cursor) for n in (name, f"reset_of_{name}"))
            cursor.execute(f"DROP DATABASE IF EXISTS {new}")  # A killed reset left it.
            # A role that may not do this loses nothing.
            cursor.execute(f"CREATE DATABASE {new}")
            try:
                _drop(cursor, name)
                cursor.execute(f"ALTER DATABASE {new} RENAME TO {old}")
            except psycopg2.Error:
                cursor.execute(f"DROP DATABASE {new}")
                raise


def _drop(cursor: cursor, name: str) -> None:
    """Drop a database, or let it be as it was."""
    quoted = quote_ident(name, cursor)
    allow = f"ALTER DATABASE {quoted} ALLOW_CONNECTIONS"
    with suppress(InvalidCatalogName):  # A killed reset has dropped it.
        cursor.execute(f"{allow} false")  # A worker reconnects at once.
    # WITH (FORCE) would also end an autovacuum, which only a superuser may do.
    cursor.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = %s AND usename = current_user",
        [name],
    )
    try:
        cursor.execute(f"DROP DATABASE IF EXISTS {quoted}")
    except psycopg2.Error:
        cursor.execute(f"{allow} true")
        raise


def init_app(app: Flask) -> None:
    """Add the commands to `app`."""
    app.cli.add_command(migrate_command)
    app.cli.add_command(serve_command)
