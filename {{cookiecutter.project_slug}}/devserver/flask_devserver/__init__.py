"""What development needs: `flask dev`, and a PostgreSQL where none is set up."""

import sys
import time
from typing import Any

import click
from flask.cli import ScriptInfo, pass_script_info

CREATED = time.time()


@click.command("dev", short_help="Run a server that reloads when a file is saved.")
@click.option("--host", "-h", default="127.0.0.1", help="The interface to bind to.")
@click.option("--port", "-p", default=5000, help="The port to bind to.")
@click.option(
    "--deadline",
    default=1.0,
    show_default=True,
    help="Seconds after which a version that does not end is ended by force.",
)
@click.option(
    "--fork/--no-fork",
    default=sys.platform == "linux",
    help="Fork a process that has the packages ready, or start Python anew.",
)
@click.option(
    "--browser-reload/--no-browser-reload",
    default=True,
    help="Reload the pages in browsers when a new version answers.",
)
@click.option("--also", metavar="NAME", help="Run a command beside it: flask NAME.")
@pass_script_info
def dev(info: ScriptInfo, /, **options: Any) -> None:
    """Serve the application, and a new version as soon as a file is saved.

    The process that watches the files never imports the application, so nothing that
    the application does can stop the reload.
    """
    if sys.platform == "win32":
        message = "flask dev runs on Linux and macOS: use flask run --debug here."
        raise click.ClickException(message)
    try:
        from .supervisor import WebSupervisor
    except ImportError as error:
        message = f"flask dev needs the package {error.name}: install the group dev."
        raise click.ClickException(message) from None

    supervisor = WebSupervisor(info.app_import_path, **options, created=CREATED)
    if version := supervisor.run():  # in a fork, which is to serve it
        version.run()
