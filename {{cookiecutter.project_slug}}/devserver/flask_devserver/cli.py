"""The command `flask dev`, and the shutdown guard of `flask run --debug`.

Flask imports this module for each of its commands, before it loads the application.
That makes it the place to guard the child process of `flask run --debug`. Production
never starts that command, and does not install this package.
"""

import os
import sys
import time
from typing import Any

import click
from flask.cli import ScriptInfo, pass_script_info

from . import shutdown

CREATED = time.time()

if os.environ.get("WERKZEUG_RUN_MAIN") == "true" and "run" in sys.argv:
    shutdown.guard()


@click.command("dev", short_help="Run a server that reloads when a file is saved.")
@click.option("--host", "-h", default="127.0.0.1", help="The interface to bind to.")
@click.option("--port", "-p", default=5000, help="The port to bind to.")
@click.option(
    "--deadline",
    default=1.0,
    show_default=True,
    help="Seconds after which a process that does not exit is killed.",
)
@click.option(
    "--fork/--no-fork",
    default=sys.platform == "linux",
    help="Fork a process that has the packages ready, or start a new Python.",
)
@click.option(
    "--browser-reload/--no-browser-reload",
    default=True,
    help="Reload the pages in browsers when a new version responds.",
)
@click.option(
    "--with",
    "--also",  # its name up to version 0.2
    "command",
    metavar="NAME",
    envvar=["FLASK_DEV_WITH", "FLASK_DEV_ALSO"],
    help="Run another command beside the server: flask NAME.",
)
@pass_script_info
def dev(info: ScriptInfo, /, **options: Any) -> None:
    """Serve the application, and a new version as soon as a file is saved.

    The process that watches the files never imports the application, so nothing that
    the application does can stop the reload.
    """
    if sys.platform == "win32":
        message = "flask dev runs on Linux and macOS: use flask run --debug here."
        raise click.ClickException(message)
    from .supervisor import WebSupervisor

    supervisor = WebSupervisor(info.app_import_path, **options, created=CREATED)
    if version := supervisor.run():  # in a fork, which is to serve it
        version.run()
