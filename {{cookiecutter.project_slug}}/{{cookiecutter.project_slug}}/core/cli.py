"""The project's commands for `flask`."""

import sys
from collections import deque
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import Any, cast

import click
import psycopg2
from flask import Flask, current_app
from flask.cli import with_appcontext
from psycopg2 import extensions
from psycopg2.extras import wait_select

from . import migrate
from .db import DatabaseUnavailable, connect
from .serve import serve_command

# In one transaction, so a reset that fails changes nothing. Another client may hold a
# lock.
DROP_ALL = """
DO $$ DECLARE command text; BEGIN
    SET LOCAL lock_timeout = '5s'; SET LOCAL client_min_messages = warning;
    PERFORM pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND usename = current_user
    AND pid <> pg_backend_pid();
    DROP SCHEMA IF EXISTS public CASCADE;
    FOR command IN
        SELECT text FROM (
            SELECT format('DROP SCHEMA IF EXISTS %I CASCADE', nspname), nspowner
            FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema)'
            UNION ALL SELECT format('DROP PUBLICATION %I', pubname), pubowner
            FROM pg_publication
            UNION ALL SELECT format('SELECT lo_unlink(%s)', oid), lomowner
            FROM pg_largeobject_metadata
        ) AS found (text, owner) WHERE pg_has_role(owner, 'USAGE')
    LOOP
        EXECUTE command;
    END LOOP;
    CREATE SCHEMA public;
    GRANT USAGE ON SCHEMA public TO PUBLIC;
END $$
"""
ERRORS = (DatabaseUnavailable, migrate.MigrationError, psycopg2.Error, OSError)


@click.command("migrate")
@click.option("--status", "only_list", is_flag=True, help="Only list the migrations.")
@click.option("--forget", metavar="NAME", help="List a migration as pending again.")
@click.option("--reset", is_flag=True, help="First drop all tables.")
@with_appcontext
def migrate_command(only_list: bool, forget: str | None, reset: bool) -> None:
    """Apply the SQL migrations that the database does not have yet.

    With --reset, which needs debug mode, a command `seed` of the application follows.
    """
    if only_list + reset + (forget is not None) > 1:
        raise click.UsageError("Use only one option.")
    if reset and not current_app.debug:
        raise click.ClickException("--reset drops all tables: use `flask --debug`.")
    with suppress(AttributeError):  # There may be no standard output.
        # A notice that the terminal cannot show must not end the migrations.
        cast(Any, sys.stdout).reconfigure(errors="backslashreplace")
    try:
        with closing(connect()) as conn, ExitStack() as stack:
            cast(Any, conn).notices = deque()  # A list keeps only the last 50.
            # Otherwise Ctrl-C has no effect until a query ends.
            extensions.set_wait_callback(wait_select)
            stack.callback(extensions.set_wait_callback, None)
            if reset:
                # Ask unless this is the embedded server of development.
                if "prepare" not in current_app.extensions:
                    place = f"{conn.info.dbname} on {conn.info.host}"
                    click.confirm(f"Drop all tables of {place}?", abort=True)
                # `conn.cursor()` would log a slow query.
                extensions.cursor(conn).execute(DROP_ALL)
            if only_list:
                for name, state in migrate.status(conn).items():
                    click.echo(f"{state} {name}")
            elif forget is not None:
                migrate.forget(conn, forget)
                click.echo(f"Pending {forget}")
            elif not migrate.migrate(conn, report=partial(_report, conn)):
                click.echo("Nothing to apply")
    except ERRORS as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    if reset and (seed := current_app.cli.commands.get("seed")):
        click.get_current_context().invoke(seed)
        click.echo("Ran the command seed")


def _report(conn: Any, name: str) -> None:
    """Print the notices of a migration, and that it is applied."""
    notices, conn.notices = conn.notices, deque()
    # The migrations of libraries often say IF EXISTS.
    shown = [text for text in notices if "WARNING" in text or "skipping" not in text]
    with suppress(BrokenPipeError):  # In `flask migrate | head`, the rest is applied.
        for line in (*shown, f"Applied {name}"):
            click.echo(line.strip())


def init_app(app: Flask) -> None:
    """Add the commands to `app`."""
    app.cli.add_command(migrate_command)
    app.cli.add_command(serve_command)
