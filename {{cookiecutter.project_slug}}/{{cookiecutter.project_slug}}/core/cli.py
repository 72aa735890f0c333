"""The project's commands for `flask`."""

from contextlib import closing

import click
from flask import Flask
from flask.cli import with_appcontext

from . import migrate
from .db import DatabaseUnavailable, connect
from .serve import serve_command


@click.command("migrate")
@click.option("--status", "only_list", is_flag=True, help="Only list the migrations.")
@with_appcontext
def migrate_command(only_list: bool) -> None:
    """Apply the SQL migrations that the database does not have yet."""
    try:
        with closing(connect()) as conn:
            if only_list:
                word = {True: "Applied", False: "Missing"}
                found = migrate.status(conn).items()
                lines = [f"{word[done]} {name}" for name, done in found]
            else:
                lines = [f"Applied {name}" for name in migrate.migrate(conn)]
    except (DatabaseUnavailable, migrate.MigrationError) as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(lines) or "Nothing to apply")


def init_app(app: Flask) -> None:
    """Add the commands to `app`."""
    app.cli.add_command(migrate_command)
    app.cli.add_command(serve_command)
