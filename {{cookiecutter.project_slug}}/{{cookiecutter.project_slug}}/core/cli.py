"""The project's commands for `flask`."""

from contextlib import closing

import click
import psycopg2
from flask import Flask, current_app
from flask.cli import with_appcontext
from psycopg2.extensions import make_dsn, parse_dsn, quote_ident

from . import migrate
from .db import DatabaseUnavailable, connect, database_url
from .serve import serve_command


@click.command("migrate")
@click.option("--status", "only_list", is_flag=True, help="Only list the migrations.")
@click.option("--forget", metavar="NAME", help="List a migration as missing again.")
@click.option("--reset", is_flag=True, help="First drop and create the database.")
@click.pass_context
@with_appcontext
def migrate_command(
    context: click.Context, only_list: bool, forget: str | None, reset: bool
) -> None:
    """Apply the SQL migrations that the database does not have yet.

    With --reset, which needs debug mode, a command `seed` of the application follows.
    """
    try:
        if reset:
            _create_again()
        with closing(connect()) as conn:
            if only_list:
                found = migrate.status(conn).items()
                lines = [f"{state} {name}" for name, state in found]
            elif forget:
                if not migrate.forget(conn, forget):
                    raise click.ClickException(f"{forget} is not applied.")
                lines = [f"Missing {forget}"]
            else:
                lines = [f"Applied {name}" for name in migrate.migrate(conn)]
    except (
        DatabaseUnavailable,
        migrate.MigrationError,
        psycopg2.Error,
        OSError,
    ) as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    click.echo("\n".join(lines) or "Nothing to apply")
    if reset and (seed := current_app.cli.commands.get("seed")):
        context.invoke(seed)


def _create_again() -> None:
    if not current_app.debug:
        message = "--reset drops the database: use it with `flask --debug`."
        raise click.ClickException(message)
    url = database_url()
    name = parse_dsn(url)["dbname"]
    with closing(psycopg2.connect(make_dsn(url, dbname="postgres"))) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:
            # WITH (FORCE) would also end an autovacuum, which only a superuser may do.
            cursor.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = %s AND usename = current_user",
                [name],
            )
            cursor.execute(f"DROP DATABASE IF EXISTS {quote_ident(name, cursor)}")
            cursor.execute(f"CREATE DATABASE {quote_ident(name, cursor)}")


def init_app(app: Flask) -> None:
    """Add the commands to `app`."""
    app.cli.add_command(migrate_command)
    app.cli.add_command(serve_command)
