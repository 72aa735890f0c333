"""Defaults of development and tests: the embedded PostgreSQL and a secret key."""

import os
import re
import secrets
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import click
import psycopg2
from flask import Flask
from werkzeug.exceptions import BadRequest
from werkzeug.sansio.utils import host_is_trusted

from .config import ConfigError
from .db import DatabaseUnavailable, connect
from .migrate import MigrationError, find_problem, migrate

ADDRESS = re.compile(r"([\d.]+|\[[\da-f:.]+\])(:\d+)?")


def init_app(app: Flask) -> None:
    """Fill in `DATABASE_URL` and `SECRET_KEY` where they are not set.

    The embedded PostgreSQL starts when the first connection is opened, or before `flask
    dev` serves. The host that `flask dev` or `flask run` binds to is trusted, too. If
    that is 0.0.0.0 or an IPv6 address, every address is.
    """
    context = click.get_current_context(silent=True)
    host = context.params.get("host") if context else os.environ.get("FLASK_RUN_HOST")
    if host and app.config["TRUSTED_HOSTS"]:
        app.config["TRUSTED_HOSTS"] = trusted = [*app.config["TRUSTED_HOSTS"], host]
        # Flask's own check knows no IPv6 address, and no client names 0.0.0.0.
        if ":" in host or host == "0.0.0.0":  # noqa: S104
            app.wsgi_app = partial(_reject_names, app.wsgi_app, trusted)  # type: ignore[method-assign]
            app.config["TRUSTED_HOSTS"] = None
    if not app.config["SECRET_KEY"]:
        app.config["SECRET_KEY"] = _secret_key(Path(app.instance_path) / "secret_key")
    url = app.config["DATABASE_URL"]
    if app.debug or not url:
        app.config["DATABASE_URL"] = partial(_resolve_url, app, url, RLock())
        app.extensions["problem"] = _find_problem
    if not url:
        app.extensions["prepare"] = app.config["DATABASE_URL"]


def _reject_names(
    wsgi_app: Any, trusted: list[str], environ: dict[str, Any], start_response: Any
) -> Any:
    # A site whose name leads to this machine could read its data.
    host = environ.get("HTTP_HOST", "")
    if ADDRESS.fullmatch(host) or host_is_trusted(host, trusted):
        return wsgi_app(environ, start_response)
    error = BadRequest(f"The host {host} is not in TRUSTED_HOSTS: add it in .env.")
    return error(environ, start_response)


def _find_problem() -> str:
    """Return what is wrong with the database, or an empty string."""
    with closing(connect()) as conn:
        return find_problem(conn)


def _resolve_url(app: Flask, url: str, lock: Any) -> str:
    """Return `url`, or that of the embedded PostgreSQL. Warn of pending migrations."""
    with lock:  # Several first requests may come at once.
        if not url:
            return _start_database(app)
        if callable(app.config["DATABASE_URL"]):
            app.config["DATABASE_URL"] = url
            # The query that follows raises these errors.
            with suppress(DatabaseUnavailable, MigrationError):
                if not _is_migrating() and (problem := _find_problem()):
                    app.logger.warning(problem)
        return url


def _start_database(app: Flask) -> str:
    """Start the embedded PostgreSQL, apply the migrations and return the URL.

    If somebody has removed its folder since the last connection, start another one.
    """
    try:
        from flask_devserver import postgres
    except ModuleNotFoundError as error:
        # A project with a server of its own needs no `devserver`.
        message = "DATABASE_URL is not set, and flask-devserver is not installed."
        raise DatabaseUnavailable(message) from error
    folder = Path(app.instance_path) / "postgres"
    if not folder.exists():
        app.logger.info("Creating a PostgreSQL in %s", folder)
    elif known := app.extensions.get("database_url"):
        return str(known)
    url: str = postgres.ensure_database(folder, app.name)
    if not _is_migrating():
        with closing(psycopg2.connect(url)) as conn:
            conn.autocommit = True
            try:
                names = migrate(conn)
            except MigrationError as error:  # A worker retries until it is fixed.
                raise DatabaseUnavailable(str(error)) from error
        if names:
            app.logger.info("Applied the migrations up to %s", names[-1])
    app.extensions["database_url"] = url
    return url


def _is_migrating() -> bool:
    """Return whether this is `flask migrate`, which applies the migrations itself."""
    command = click.get_current_context(silent=True)
    return command is not None and command.info_name == "migrate"


def _secret_key(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        message = "is not writable: run this as its owner, or move it away."
        raise ConfigError(f"{path.parent} {message}")
    # Several processes may start together: the first link wins. Without links, the last
    # file wins, and the others use their key until they start again.
    draft = path.with_suffix(f".{os.getpid()}")
    draft.touch(mode=0o600)
    draft.write_text(secrets.token_hex())
    with suppress(OSError):  # Some file systems have no hard links.
        os.link(draft, path)
    if not path.exists():
        draft.replace(path)
    draft.unlink(missing_ok=True)
    return path.read_text()
