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


def _require_all(app: Flask) -> None:
    for name, example in EXAMPLES.items():
        if not app.config[name]:
            message = f"{name} is not set: set it to {example}"
            raise ConfigError(f"{message}, or use `flask --debug` in development.")


def _check_url(url: str) -> None:
    try:
        parse_dsn(url)
    except psycopg2.ProgrammingError:
        # libpq's own message quotes the URL, and with it the password.
        example = EXAMPLES["DATABASE_URL"]
        message = f"DATABASE_URL is no PostgreSQL URL: write it like {example}."
        raise ConfigError(message) from None


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
