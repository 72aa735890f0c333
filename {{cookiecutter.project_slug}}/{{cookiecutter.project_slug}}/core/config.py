"""Settings: read from the environment and checked once, when the app is created."""

import os
import re
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


class ConfigError(click.ClickException, RuntimeError):
    """Settings stop the start: `flask` and gunicorn print a sentence on each.

    Of a `RuntimeError`, gunicorn prints no traceback.
    """


def load_config(app: Flask, overrides: Mapping[str, Any] | None) -> None:
    """Fill `app.config` from the environment, then from `overrides`.

    In debug and testing an absent `DATABASE_URL` means the embedded PostgreSQL, and
    an absent `SECRET_KEY` a random one, kept in the instance folder.
    """
    app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
    app.config["SESSION_COOKIE_SECURE"] = not app.debug
    for name in EXAMPLES:
        app.config[name] = os.environ.get(name, "")
    app.config.update(overrides or {})
    if app.debug or app.testing:
        app.config["SECRET_KEY"] = app.config["SECRET_KEY"] or _development_key(app)
    else:
        _check_for_production(app)
    _check_url(app)


def check_config(app: Flask) -> None:
    """Raise `ConfigError` if any setting is missing or malformed: one for them all."""
    if errors := app.extensions.get("config"):
        raise ConfigError("\n".join(errors))


def number(app: Flask, name: str, default: Number) -> Number:
    """Settle the setting `name`, a number above 0 of the type of `default`.

    Anything else is left to `check_config`.
    """
    given = _given(app, name, default)
    try:
        value = type(default)(given)
        valid = 0 < value < 1e9 and value == float(given)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        kind = "a whole number" if isinstance(default, int) else "a number"
        hint = f"set it to {kind} above 0, such as {default}."
        refuse(app, f"{name} is {given!r}: {hint}")
        value = default
    app.config[name] = value
    return value


def flag(app: Flask, name: str) -> bool:
    """Settle the setting `name`, which is 1, or 0 as long as it is not set.

    Anything else is left to `check_config`.
    """
    given = _given(app, name, "0")
    if str(given) not in FLAGS:
        refuse(app, f"{name} is {given!r}: set it to 1 for yes, or to 0 for no.")
    app.config[name] = FLAGS.get(str(given), False)
    return bool(app.config[name])


def hosts(app: Flask, name: str) -> None:
    """Settle the setting `name`, hosts with commas between them, or none at all.

    Anything else is left to `check_config`.
    """
    given = _given(app, name, None)
    found = re.split(r"\s*,\s*", given) if isinstance(given, str) else given
    if found and not all(re.fullmatch(r"[\w.-]+", host) for host in found):
        hint = "write hosts like example.com,.example.org with nothing else."
        refuse(app, f"{name} is {given!r}: {hint}")
    app.config[name] = found


def refuse(app: Flask, sentence: str) -> None:
    """Have `check_config` say the sentence on a setting that is wrong."""
    app.extensions.setdefault("config", []).append(sentence)


def _given(app: Flask, name: str, default: Any) -> Any:
    given = app.config.get(name)
    return os.environ.get(name, default) if given is None else given


def _check_for_production(app: Flask) -> None:
    for name, example in EXAMPLES.items():
        if app.config[name] in ("", example):
            hint = f"set it to {example}, or use `flask --debug` in development."
            refuse(app, f"{name} is not set: {hint}")
    if 0 < len(app.config["SECRET_KEY"]) < 16:
        hint = f"set it to {EXAMPLES['SECRET_KEY']}."
        refuse(app, f"SECRET_KEY is shorter than 16 bytes: {hint}")


def _check_url(app: Flask) -> None:
    # What libpq says quotes the URL, and with it the password or what it takes for the
    # host when a password has an @ or a / in it.
    try:
        parts = parse_dsn(app.config["DATABASE_URL"])
        valid = "@" not in parts.get("host", "")[1:] + parts.get("dbname", "")
    except psycopg2.ProgrammingError:
        valid = False
    if not valid:
        like = f"{EXAMPLES['DATABASE_URL']}, with %40 for an @ in the password"
        refuse(app, f"DATABASE_URL is no PostgreSQL URL: write it like {like}.")


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
