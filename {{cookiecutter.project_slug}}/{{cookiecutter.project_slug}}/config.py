"""Settings: read from the environment and checked once, when the app is created."""

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click
import psycopg2
from flask import Flask
from psycopg2.extensions import parse_dsn

Number = TypeVar("Number", int, float)

EXAMPLES = {
    "DATABASE_URL": "postgresql://user:password@localhost:5432/name",
    "SECRET_KEY": "what `python -c 'import secrets; print(secrets.token_hex())'` says",
}


FLAGS = {"0": False, "1": True, "False": False, "True": True}


class ConfigError(click.ClickException):
    """A setting stops the start: the `flask` command prints its one sentence."""


def load_config(app: Flask, overrides: Mapping[str, Any] | None) -> None:
    """Fill `app.config` from the environment, then from `overrides`, and check it.

    In debug and testing an absent `DATABASE_URL` means the embedded PostgreSQL, and
    an absent `SECRET_KEY` a random one, kept in the instance folder. Elsewhere
    either absence raises `ConfigError`.
    """
    for name in EXAMPLES:
        app.config[name] = os.environ.get(name, "")
    app.config.update(overrides or {})
    if app.debug or app.testing:
        app.config["SECRET_KEY"] = app.config["SECRET_KEY"] or _development_key(app)
    else:
        _require_all(app)
    _check_url(app.config["DATABASE_URL"])


def number(app: Flask, name: str, default: Number) -> Number:
    """Settle the setting `name`, a number above 0 of the type of `default`.

    Raises `ConfigError` for anything else.
    """
    given = app.config.get(name, os.environ.get(name, default))
    try:
        value = type(default)(given)
        valid = 0 < value < 1e9 and value == float(given)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        kind = "a whole number" if isinstance(default, int) else "a number"
        message = f"{name} is {given!r}: set it to {kind} above 0, such as {default:g}."
        raise ConfigError(message)
    app.config[name] = value
    return value


def flag(app: Flask, name: str) -> bool:
    """Settle the setting `name`, which is 1, or 0 as long as it is not set.

    Raises `ConfigError` for anything else.
    """
    given = app.config.get(name, os.environ.get(name, "0"))
    if str(given) not in FLAGS:
        raise ConfigError(f"{name} is {given!r}: set it to 1 for yes, or to 0 for no.")
    app.config[name] = FLAGS[str(given)]
    return FLAGS[str(given)]


def _require_all(app: Flask) -> None:
    for name, example in EXAMPLES.items():
        if not app.config[name]:
            message = f"{name} is not set: set it to {example}"
            raise ConfigError(f"{message}, or use `flask --debug` in development.")


def _check_url(url: str) -> None:
    # What libpq says quotes the URL, and with it the password or what it takes for the
    # host when a password has an @ or a / in it.
    try:
        parts = parse_dsn(url)
        valid = "@" not in parts.get("host", "")[1:] + parts.get("dbname", "")
    except psycopg2.ProgrammingError:
        valid = False
    if not valid:
        like = f"{EXAMPLES['DATABASE_URL']}, with %40 for an @ in the password"
        raise ConfigError(f"DATABASE_URL is no PostgreSQL URL: write it like {like}.")


def _development_key(app: Flask) -> str:
    path = Path(app.instance_path) / "secret_key"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        # Of the processes that start together, one gets to name its draft the key.
        draft = path.with_suffix(f".{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_hex())
        with suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_text()
