"""`flask serve`: the production server, which is granian."""

import atexit
import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing import parent_process, util
from threading import Thread, get_ident
from types import SimpleNamespace
from typing import Any

import click
from flask import Flask
from flask.cli import ScriptInfo, pass_script_info

MAX_CONNECTIONS = 65536  # per process, unless the system allows fewer open files
# Seconds for an idle connection, and for the headers of a request. The load balancer
# must be the first to close one, or it sends a request into a closed connection and
# returns a 502. Load balancers wait for up to 600 seconds.
IDLE_TIMEOUT = 650
MAX_HEADERS = 65536  # bytes; Werkzeug takes seconds to parse some of 400 KB
STOP_TIMEOUT = 30  # seconds that requests have to finish when the server stops

ENDING = (signal.SIGTERM, signal.SIGINT)

_option = partial(click.option, show_default=True, show_envvar=True)


@click.command("serve")
@click.option("--host", help="127.0.0.1 by default, or all interfaces if PORT is set.")
@_option("--port", envvar="PORT", type=click.IntRange(1, 65535), default=8000)
@_option("--workers", envvar="WEB_CONCURRENCY", type=click.IntRange(1), default=2)
@click.option("--threads", type=click.IntRange(1), help="POOL_SIZE by default, or 8.")
@pass_script_info
def serve_command(
    info: ScriptInfo, host: str | None, port: int, workers: int, threads: int | None
) -> None:
    """Serve the application in production."""
    # No other command should wait for this import.
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings

    app = info.load_app()
    if app.debug or app.testing:
        name = "FLASK_DEBUG" if app.debug else "FLASK_TESTING"
        raise click.ClickException(f"{name} is on: set it to 0 in production.")
    address = host or ("0.0.0.0" if os.environ.get("PORT") else "127.0.0.1")  # noqa: S104
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        # granian takes no host name. It would share the port with another granian, and
        # then old code might respond.
        with socket.create_server((address, port), family=family) as probe:
            address = probe.getsockname()[0]
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # The rest is the address.
        message = f"Cannot listen on {address}, port {port}: {reason}."
        raise click.ClickException(message) from error
    # Until granian handles SIGTERM in a worker, the handler of its parent would lose
    # the signal.
    end_forks_at_signals()
    # granian's advice on the number of threads is for code that computes, not waits.
    logging.getLogger("_granian").addFilter(_is_not_about_threads)
    stop_timeout = STOP_TIMEOUT
{%- if cookiecutter.worker == 'thread' %} + int(app.config["WORKER_DEADLINE"]){% endif %}
    Granian(
        info.app_import_path or "",
        address=address,
        port=port,
        interface=Interfaces.WSGI,
        http=HTTPModes.http1,
        websockets=False,
        workers=workers,
        blocking_threads=threads or app.config.get("POOL_SIZE", 8),
        backpressure=MAX_CONNECTIONS,
        http1_settings=HTTP1Settings(
            header_read_timeout=1000 * IDLE_TIMEOUT, max_buffer_size=MAX_HEADERS
        ),
        respawn_failed_workers=True,
        workers_kill_timeout=stop_timeout,
        # The root logger's handler writes granian's lines, as the application's.
        log_dictconfig={"loggers": {"_granian": {}}},
    ).serve(target_loader=partial(_load_app, stop_timeout))


def end_forks_at_signals() -> None:
    """Let SIGTERM and SIGINT end forked processes, instead of running our handlers."""
    if sys.platform != "win32":
        masks: dict[int, Any] = {}  # by thread

        def block() -> None:  # Otherwise a signal before the reset would be lost.
            masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

        def unblock() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop(get_ident()))

        def reset() -> None:
            for number in ENDING:
                signal.signal(number, signal.SIG_DFL)
            unblock()

        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=reset)


def _is_not_about_threads(record: logging.LogRecord) -> bool:
    return "Python threads" not in str(record.msg)


def _load_app(stop_timeout: int, path: str) -> Flask:
    from granian import wsgi

    if sys.platform != "win32":
        # Ctrl-C must reach the parent alone: granian hangs in a worker that also gets
        # the parent's signal.
        os.setpgid(0, 0)
        # After `stty tostop`, a terminal stops a background process that writes.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    # granian would add the environment to what the application knows of a request. So
    # error reports would contain secrets, and HTTP_ORIGIN would act as a header.
    wsgi.os = SimpleNamespace(environ={})  # type: ignore[assignment, attr-defined]
    Thread(target=_stop_with_parent, args=[stop_timeout], daemon=True).start()
    app = ScriptInfo(path or None).load_app()
    # If the parent made `app`, Python 3.13 and later drop its exit handlers here.
    atexit.register(app.extensions["pool"].close)
    if sys.version_info < (3, 13):  # A forked process runs no exit handlers.
        util.Finalize(None, atexit._run_exitfuncs, exitpriority=0)
    return app


def _stop_with_parent(stop_timeout: int) -> None:
    # Otherwise a worker whose parent was killed keeps the port and serves old code.
    if parent := parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        # granian ignores a signal that comes before its worker waits for one.
        time.sleep(stop_timeout)
        os._exit(1)
