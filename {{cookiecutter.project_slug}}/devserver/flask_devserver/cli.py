"""The command `flask dev`, and the shutdown guard of `flask run --debug`.

Flask imports this module for each of its commands, before it loads the application.
That makes it the place to guard the child process of `flask run --debug`. Production
never starts that command, and does not install this package.
"""

import os
import sys
import time
from copy import copy
from typing import Any

import click
from flask.cli import ScriptInfo, pass_script_info, run_command

from . import shutdown

CREATED = time.time()
FORK = "Fork a process that has imported the packages, or start a new Python."
BROWSER = "Reload the pages in browsers when a new version responds."

if os.environ.get("WERKZEUG_RUN_MAIN") == "true" and "run" in sys.argv:
    shutdown.guard()


@click.command("dev", context_settings={"show_default": True})
@click.option("--deadline", default=1.0, help="Seconds that a process has to exit.")
@click.option("--fork/--no-fork", default=sys.platform == "linux", help=FORK)
@click.option("--browser-reload/--no-browser-reload", default=True, help=BROWSER)
@click.option("--watch", multiple=True, help="Also watch this file or folder.")
@click.option(
    "--with",
    "--also",  # its name up to version 0.2
    "command",
    metavar="NAME",
    envvar=["FLASK_DEV_WITH", "FLASK_DEV_ALSO"],
    help="Run one other command beside the server, instead of FLASK_DEV_WITH.",
)
@pass_script_info
def dev(info: ScriptInfo, /, **options: Any) -> None:
    """Run a server that reloads when a file is saved.

    The process that watches the files never imports the application, so nothing that
    the application does can stop the reload. The options of `flask run` work, too.
    """
    if sys.platform == "win32":
        message = "flask dev runs on Linux and macOS: use flask run --debug here."
        raise click.ClickException(message)
    if info.create_app:
        message = "flask dev needs the name of the application: flask --app NAME dev."
        raise click.ClickException(message)
    from .supervisor import Supervisor  # It needs what Windows does not have.

    if not options["host"].startswith(("127.", "localhost", "::1", "unix:")):
        warning = " * Others on the network can use the application and its debugger."
        click.secho(warning, err=True, fg="yellow")
    supervisor = Supervisor(info.app_import_path, CREATED, options)
    # A trial only checks the options, the settings and the address.
    if "_FLASK_DEV_CHECK" not in os.environ:
        supervisor.run()


def _option_of_run(option: click.Parameter) -> click.Parameter:
    """Return an option of `flask run`, which takes FLASK_RUN_… here, too."""
    option = copy(option)
    if isinstance(option, click.Option) and option.name != "debug":
        name = str(option.name).upper()
        option.envvar = [f"FLASK_DEV_{name}", f"FLASK_RUN_{name}"]
        if option.name == "port":
            option.type = click.IntRange(0, 65535)
    return option


dev.params[:0] = map(_option_of_run, run_command.params)
