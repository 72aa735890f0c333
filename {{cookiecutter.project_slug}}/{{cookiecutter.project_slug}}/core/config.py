"""Settings: declared by each module in a table, read and validated once."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import psycopg2
from flask import Flask
from flask.cli import NoAppException
from flask.helpers import get_debug_flag
from psycopg2.extensions import parse_dsn
from werkzeug.http import dump_cookie

BOOLEANS = dict.fromkeys(["0", "false", "no", "off"], False)
BOOLEANS |= dict.fromkeys(["1", "true", "yes", "on"], True)
# Flask's own settings that may be numbers of seconds.
SECONDS = ("PERMANENT_SESSION_LIFETIME", "SEND_FILE_MAX_AGE_DEFAULT")
URL_EXAMPLE = "postgresql://user:password@localhost:5432/name"
URL_HINT = f"write a PostgreSQL URL like {URL_EXAMPLE}, without quotes; "
URL_HINT += "percent-encode @ / : # ? %."
KEY_EXAMPLE = "what `python -c 'import secrets; print(secrets.token_hex())'` prints"
KEY_HINT = f"set it to 32 random bytes or more, such as {KEY_EXAMPLE}."
DEBUG_HINT = 'For debug mode, use `flask --debug` or create_app({"DEBUG": True}).'


class ConfigError(NoAppException, RuntimeError):
    """Settings are missing or invalid. The message has one line for each of them.

    `flask` prints `NoAppException` without a traceback, and gunicorn `RuntimeError`.
    """

    def format_message(self) -> str:
        """Exit with the message."""
        # Otherwise `flask` also claims that the command does not exist.
        raise SystemExit(f"Error: {self.message}")


class Setting(NamedTuple):
    """How to read one setting.

    `parse` converts the given value, or raises an error such as `ValueError`; `hint`
    then says what to do. Production does not start without a setting that has an
    `example`. The value of a `secret` is in no message.
    """

    parse: Callable[[Any], Any]
    hint: str
    default: Any = None
    example: str = ""
    secret: bool = False


Settings = Mapping[str, Setting]
Overrides = Mapping[str, Any] | None


def number_setting(default: float) -> Setting:
    """Return a setting that is a number above 0, of the type of `default`.

    If `default` is 0, the number may be 0.
    """
    kind = "a whole number" if isinstance(default, int) else "a number"
    range_ = "above 0" if default else "of 0 or more"
    limit = 1e15 if isinstance(default, int) else 1e9  # Python cannot wait longer.

    def parse(raw: Any) -> float:
        value = type(default)(raw)
        if not ((value > 0 or value == default) and value == float(raw) < limit):
            raise ValueError
        return value

    return Setting(parse, f"set it to {kind} {range_}, such as {default}.", default)


def bool_setting(default: bool = False) -> Setting:
    """Return a setting that is true or false."""
    hint = "set it to 1 for yes, or to 0 for no."
    return Setting(lambda raw: BOOLEANS[str(raw).lower()], hint, default)


def text_setting(default: str = "", example: str = "", secret: bool = False) -> Setting:
    """Return a setting that is text. With an `example`, production requires it."""
    return Setting(str, "set it to text.", default, example, secret)


def split(raw: Any) -> list[str]:
    """Return the parts of a text that are separated by commas, or a list itself."""
    return re.split(r"\s*,\s*", raw) if isinstance(raw, str) else list(raw)


def check_url(url: str) -> str:
    """Return a valid URL. Raises `ValueError` with a hint."""
    if driver := re.match(r"\w+\+(\w+):", url):
        raise ValueError(f"write it without +{driver[1]}.")
    hint = URL_HINT
    try:
        # libpq reads part of a password that contains @ or / as the host or the port.
        parts = {"host": "", "dbname": "", "port": ""} | parse_dsn(url)
        is_whole = "@" not in parts["host"][1:] + parts["dbname"]
        if is_whole and re.fullmatch(r"[\d,]*", parts["port"]):
            return url
    except (psycopg2.ProgrammingError, ValueError) as error:
        # libpq's own message may quote the URL with the password. A password that
        # contains a ? ends in the query, but no parameter has an @.
        unknown = re.search(r'invalid URI query parameter: "(\w+)"', str(error))
        if unknown and "@" not in url.partition("?")[2]:
            hint = f"leave out {unknown[1]}, which libpq does not know."
    raise ValueError(hint)


def _parse_key(raw: str) -> str:
    # This rejects "changeme" four times, and the command itself.
    if len(raw) < 32 or len(set(raw)) < 8 or "token_hex(" in str(raw):
        raise ValueError
    return raw


SETTINGS: Settings = {
    "DATABASE_URL": Setting(check_url, URL_HINT, "", URL_EXAMPLE, secret=True),
    "SECRET_KEY": Setting(_parse_key, KEY_HINT, "", KEY_EXAMPLE, secret=True),
    "SECRET_KEY_FALLBACKS": Setting(
        lambda raw: [_parse_key(key) for key in split(raw)],
        "write former values of SECRET_KEY, with commas between them.",
        secret=True,
    ),
}


def init_app(app: Flask, overrides: Overrides, *tables: Settings) -> None:
    """Fill `app.config` and validate the settings of all `tables`.

    A value comes from `overrides`, else from the environment variable of its name. Else
    it comes from one with the prefix `FLASK_`, as Flask's own settings do. Raises one
    `ConfigError` for all settings that are missing or invalid.
    """
    given = overrides or {}
    secure = not given.get("DEBUG", app.debug)
    app.config.update(SESSION_COOKIE_SAMESITE="Lax", SESSION_COOKIE_SECURE=secure)
    # Applications on other ports or paths of the host must not replace the cookie.
    app.config["SESSION_COOKIE_NAME"] = app.name
    defaults = app.config.copy()
    app.config.from_prefixed_env(loads=_load)
    app.config["DEBUG"] = get_debug_flag()  # Flask also reads "no" as False.
    app.config.update(given)
    settings = {**_flask_settings(app, defaults), **SETTINGS}
    for table in tables:
        settings |= table
    errors = [error for item in settings.items() if (error := _set(app, given, *item))]
    cookie = app.config.get_namespace("SESSION_COOKIE_")
    # Browsers accept the prefix `__Host-` only on a cookie with these settings.
    own = {"name": app.name, "domain": None, "path": None, "secure": True}
    if own.items() <= cookie.items() and app.config["APPLICATION_ROOT"] == "/":
        # With this prefix, browsers let no other host set the cookie.
        app.config["SESSION_COOKIE_NAME"] = f"__Host-{app.name}"
    try:  # Otherwise each response with a session would be an error.
        expires = datetime.now(UTC) + app.permanent_session_lifetime
        dump_cookie("a", expires=expires, samesite=cookie["samesite"])
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        names = "SESSION_COOKIE_SAMESITE or PERMANENT_SESSION_LIFETIME"
        errors.append(f"{names} is invalid: {error}.")
    by_flask = "FLASK_RUN_FROM_CLI" in os.environ or given.get("TESTING")
    for name in ("DEBUG", "TESTING"):
        if app.config[name] and name not in given and not by_flask:
            errors.append(f"FLASK_{name} is on: unset it.")
    if errors and "--help" not in sys.argv:
        hints = [DEBUG_HINT] if re.search(" is (not set|on): ", str(errors)) else []
        raise ConfigError("\n".join(errors + hints))


def _flask_settings(app: Flask, defaults: Mapping[str, Any]) -> Settings:
    """Return those of Flask's own settings whose values have the wrong type."""
    # They would only raise errors later, in each request.
    found: dict[str, Setting] = {}
    for name in app.default_config:
        value, default = app.config[name], defaults[name]
        if isinstance(default, bool) and not isinstance(value, bool | None):
            found[name] = bool_setting(default)
        elif isinstance(default, int) or name in SECONDS:
            if not isinstance(value, int | float | timedelta | None):
                found[name] = Setting(int, "set it to a whole number.", default)
    return found


def _load(raw: str) -> Any:
    """Read JSON, or `True` and `False` as Python writes them."""
    return BOOLEANS[raw.lower()] if raw in ("True", "False") else json.loads(raw)


def _set(app: Flask, given: Mapping[str, Any], name: str, setting: Setting) -> str:
    """Set `app.config[name]`. Return an error message, or an empty string."""
    raw = given.get(name, os.environ.get(name, app.config.get(name)))
    if isinstance(raw, str):
        raw = raw.strip()  # A mounted secret ends with a newline.
    app.config[name] = setting.default
    if setting.example and raw in (None, "", setting.example):
        missing = f"{name} is not set: set it to {setting.example}."
        return "" if app.debug or app.testing else missing
    try:
        if raw not in (None, ""):
            app.config[name] = setting.parse(raw)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        shown = "invalid" if setting.secret else repr(raw)
        hint = str(error) if setting.secret and str(error) else setting.hint
        # Name the variable that is set, so that its user finds it.
        is_plain = name in {*given, *os.environ} or f"FLASK_{name}" not in os.environ
        return f"{name if is_plain else f'FLASK_{name}'} is {shown}: {hint}"
    return ""
