import os
import sys
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from {{ cookiecutter.project_slug }} import core
from {{ cookiecutter.project_slug }}.core import config
from {{ cookiecutter.project_slug }}.core.config import (
    Setting,
    bool_setting,
    number_setting,
    text_setting,
)

from .application import PRODUCTION, create_app

NAME = core.__name__.partition(".")[0]  # of the application


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PRODUCTION, "FLASK_DEBUG", "SIZE"):
        monkeypatch.delenv(name, raising=False)


def read(setting: Setting, **overrides: object) -> Any:
    """Return the value of the setting SIZE of an application in development."""
    app = Flask("app")
    config.init_app(app, {"TESTING": True} | overrides, {"SIZE": setting})
    return app.config["SIZE"]


@pytest.mark.parametrize("name", PRODUCTION)
def test_missing_setting_stops_the_start(name: str) -> None:
    message = f"^{name} is not set: set it to .*[.]\nFor debug mode, use .*[.]$"
    with pytest.raises(config.ConfigError, match=message):
        create_app(PRODUCTION | {name: ""})


@pytest.mark.parametrize(
    "key",
    [
        "0123456789abcdef",
        "changeme" * 4,
        config.KEY_EXAMPLE,
        "the output of python -c 'import secrets; print(secrets.token_hex())'",
    ],
)
def test_weak_key_stops_the_start(key: str) -> None:
    message = "^SECRET_KEY is (invalid|not set): set it to .*what `python"
    with pytest.raises(config.ConfigError, match=message):
        create_app(PRODUCTION | {"SECRET_KEY": key})


def test_invalid_settings_are_named_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRUSTED_HOSTS", "https://example.com")
    monkeypatch.setenv("MAX_CONTENT_LENGTH", "1 MB")
    with pytest.raises(config.ConfigError) as error:
        create_app()
    names = {sentence.split()[0] for sentence in str(error.value).splitlines()[:-1]}
    assert names == {"MAX_CONTENT_LENGTH", "TRUSTED_HOSTS", *PRODUCTION}
    assert "such as 1048576." in str(error.value)


def test_hosts_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUSTED_HOSTS", "Example.com, .example.org")
    overrides = {k: v for k, v in PRODUCTION.items() if k != "TRUSTED_HOSTS"}
    trusted = create_app(overrides).config["TRUSTED_HOSTS"]
    assert trusted == ["example.com", ".example.org"]


def test_any_host_is_trusted_only_when_set() -> None:
    app = create_app(PRODUCTION | {"TRUSTED_HOSTS": "*"})
    assert app.config["TRUSTED_HOSTS"] is None
    for hosts in (".", "example.com,.", "*,example.com", "example.com:80"):
        with pytest.raises(config.ConfigError, match="^TRUSTED_HOSTS is '.*or [*] for"):
            create_app(PRODUCTION | {"TRUSTED_HOSTS": hosts})


def test_url_of_another_database_stops_the_start() -> None:
    message = "^DATABASE_URL is invalid: write a PostgreSQL URL like "
    for url in ("mysql://user:hunter2@host/a", "postgresql://u:hun@hunter2@host/a"):
        with pytest.raises(config.ConfigError, match=message) as error:
            create_app(PRODUCTION | {"DATABASE_URL": url})
        assert "hunter2" not in str(error.value)


URL = "postgresql://user:hunter2@host/name"


@pytest.mark.parametrize(
    "url, hint",
    [
        ("postgresql://user:hunter2/name", "write a PostgreSQL URL like"),
        (f"{URL}?pgbouncer=true", "leave out pgbouncer, which libpq does not know[.]$"),
        (f"{URL}?sslmode=require&schema=public", "leave out schema, which"),
        (URL.replace(":", "+psycopg2:", 1), r"write it without \+psycopg2[.]$"),
        (f"{URL}?a@hunter2=b", "write a PostgreSQL URL like .* percent-encode @ / : #"),
        (f'"{URL}"', "write a PostgreSQL URL like .*, without quotes;"),  # by Docker
        ("host=a password=b+hunter2 c", "write a PostgreSQL URL like"),
    ],
)
def test_invalid_url_is_explained_without_its_password(url: str, hint: str) -> None:
    with pytest.raises(
        config.ConfigError, match=f"^DATABASE_URL is invalid: {hint}"
    ) as e:
        create_app(PRODUCTION | {"DATABASE_URL": url})
    assert "hunter2" not in str(e.value)


@pytest.mark.parametrize("count", ["-1", "1.5", "two"])
def test_impossible_count_of_proxies_stops_the_start(count: str) -> None:
    hint = "set it to a whole number of 0 or more, such as 0"
    message = f"^TRUSTED_PROXIES is '{count}': {hint}[.]$"
    with pytest.raises(config.ConfigError, match=message):
        create_app(PRODUCTION | {"TRUSTED_PROXIES": count})


def test_help_needs_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["flask", "--help"])
    assert "migrate" in create_app({"MAX_CONTENT_LENGTH": "1 MB"}).cli.commands


def test_mounted_secret_may_end_with_a_newline() -> None:
    mounted = {name: f"{value}\n" for name, value in PRODUCTION.items()}
    found, expected = create_app(mounted).config, create_app(PRODUCTION).config
    assert {n: found[n] for n in PRODUCTION} == {n: expected[n] for n in PRODUCTION}


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PRODUCTION.items():
        monkeypatch.setenv(name, value)
    found = create_app().config
    assert found["DATABASE_URL"] == PRODUCTION["DATABASE_URL"]
    assert found["SECRET_KEY"] == PRODUCTION["SECRET_KEY"]
    assert found["TRUSTED_HOSTS"] == [PRODUCTION["TRUSTED_HOSTS"]]


def test_fallback_keys_come_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["a1b2c3d4" * 4, "e5f6g7h8" * 4]
    monkeypatch.setenv("SECRET_KEY_FALLBACKS", ", ".join(keys))
    assert create_app(PRODUCTION).config["SECRET_KEY_FALLBACKS"] == keys
    monkeypatch.setenv("SECRET_KEY_FALLBACKS", "short")
    with pytest.raises(config.ConfigError, match="^SECRET_KEY_FALLBACKS is invalid: "):
        create_app(PRODUCTION)


def test_debug_stops_the_start_of_another_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    monkeypatch.delenv("FLASK_RUN_FROM_CLI", raising=False)
    with pytest.raises(config.ConfigError, match="^FLASK_DEBUG is on: unset it"):
        create_app()
    monkeypatch.setenv("FLASK_RUN_FROM_CLI", "true")
    assert create_app().debug


def test_development_key_persists_and_is_private(tmp_path: Path) -> None:
    keys = set()
    for _ in range(2):
        app = Flask("app", instance_path=str(tmp_path / "instance"))
        core.init_app(app, {"TESTING": True})
        keys.add(app.config["SECRET_KEY"])
    [key] = keys
    assert len(key) == 64
    if sys.platform != "win32":
        for path in (tmp_path / "instance", tmp_path / "instance" / "secret_key"):
            assert path.stat().st_mode & 0o077 == 0


def test_secret_key_is_kept_where_files_have_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    app = Flask("app", instance_path=str(tmp_path))
    core.init_app(app, {"TESTING": True})
    assert (tmp_path / "secret_key").read_text() == app.config["SECRET_KEY"]
    assert [path.name for path in tmp_path.iterdir()] == ["secret_key"]


def test_folder_of_another_user_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Flask("app", instance_path=str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(config.ConfigError, match=f"^{tmp_path} is not writable"):
        core.init_app(app, {"TESTING": True})


def test_debug_without_a_database_and_its_package_is_a_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Flask("app", instance_path=str(tmp_path))
    monkeypatch.setitem(sys.modules, "flask_devserver", None)
    core.init_app(app, {"TESTING": True})
    response = app.test_client().get("/readyz")
    assert (response.status_code, response.json) == (503, {"status": "unavailable"})


def test_session_cookie_is_secure_unless_debug_is_overridden() -> None:
    secure = "SESSION_COOKIE_SECURE"
    assert create_app(PRODUCTION).config[secure]
    assert not create_app({"DEBUG": True}).config[secure]
    assert not create_app(PRODUCTION | {secure: False}).config[secure]


@pytest.mark.parametrize(
    "settings, name",
    [
        ({}, f"__Host-{NAME}"),
        ({"SESSION_COOKIE_SECURE": False}, NAME),
        ({"SESSION_COOKIE_DOMAIN": "example.com"}, NAME),
        ({"APPLICATION_ROOT": "/app"}, NAME),
        ({"SESSION_COOKIE_NAME": "mine"}, "mine"),
    ],
    ids=str,
)
def test_session_cookie_has_the_prefix_that_browsers_check(
    settings: dict[str, object], name: str
) -> None:
    assert create_app(PRODUCTION | settings).config["SESSION_COOKIE_NAME"] == name


def test_prefixed_variable_sets_any_setting_of_flask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASK_SESSION_COOKIE_NAME", "mine")
    monkeypatch.setenv("FLASK_SESSION_COOKIE_SECURE", "False")
    monkeypatch.setenv("FLASK_MAX_CONTENT_LENGTH", "1000")
    found = create_app(PRODUCTION).config
    assert found["SESSION_COOKIE_NAME"] == "mine"
    assert found["SESSION_COOKIE_SECURE"] is False
    assert found["MAX_CONTENT_LENGTH"] == 1000


@pytest.mark.parametrize(
    ("text", "found"),
    [("0", False), ("no", False), ("FALSE", False), ("yes", True), ("", True)],
)
def test_prefixed_variable_for_a_boolean_becomes_one(
    monkeypatch: pytest.MonkeyPatch, text: str, found: bool
) -> None:
    monkeypatch.setenv("FLASK_SESSION_COOKIE_SECURE", text)
    app = create_app(PRODUCTION)
    assert app.config["SESSION_COOKIE_SECURE"] is found
    assert app.config["SESSION_COOKIE_NAME"].startswith("__Host-") is found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SESSION_COOKIE_SECURE", "perhaps"),
        ("MAX_FORM_MEMORY_SIZE", "2MB"),
        ("MAX_FORM_PARTS", "x"),
        ("MAX_FORM_PARTS", "[1]"),
        ("PERMANENT_SESSION_LIFETIME", "31 days"),
        ("SEND_FILE_MAX_AGE_DEFAULT", "1h"),
    ],
)
def test_prefixed_variable_of_the_wrong_type_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"FLASK_{name}", text)
    with pytest.raises(config.ConfigError) as raised:
        create_app(PRODUCTION)
    assert str(raised.value).replace("'", "").startswith(f"FLASK_{name} is {text}: set")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("SESSION_COOKIE_SAMESITE", "laxx", "SameSite must be"),
        ("PERMANENT_SESSION_LIFETIME", 10**12, "out of range"),
        ("PERMANENT_SESSION_LIFETIME", 10**14, "days="),
        ("PERMANENT_SESSION_LIFETIME", None, "NoneType"),
        ("SESSION_COOKIE_SAMESITE", False, "bool"),
    ],
)
def test_cookie_that_cannot_be_set_stops_the_start(
    name: str, value: object, error: str
) -> None:
    names = "SESSION_COOKIE_SAMESITE or PERMANENT_SESSION_LIFETIME"
    message = f"{names} is invalid: .*{error}"
    with pytest.raises(config.ConfigError, match=message):
        create_app(PRODUCTION | {name: value})


def test_key_may_be_bytes_or_contain_spaces() -> None:
    for key in (bytes(range(32)), "correct horse battery staple, and more"):
        settings = PRODUCTION | {"SECRET_KEY": key, "SECRET_KEY_FALLBACKS": [key]}
        assert create_app(settings).config["SECRET_KEY"] == key


def test_owner_parses_a_setting_of_flask(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PERMANENT_SESSION_LIFETIME"
    monkeypatch.setenv(f"FLASK_{name}", "31 days")
    app = Flask("app")
    core.init_app(app, PRODUCTION, {name: Setting(len, "set it to days.")})
    assert app.config[name] == 7


def test_empty_prefixed_variable_keeps_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASK_SEND_FILE_MAX_AGE_DEFAULT", "")
    assert create_app(PRODUCTION).config["SEND_FILE_MAX_AGE_DEFAULT"] is None


def test_form_may_have_any_number_of_parts() -> None:
    settings = PRODUCTION | {"MAX_FORM_PARTS": None, "MAX_COOKIE_SIZE": 0}
    found = create_app(settings).config
    assert (found["MAX_FORM_PARTS"], found["MAX_COOKIE_SIZE"]) == (None, 0)


@pytest.mark.parametrize("text", ["0", "False", "no"])
def test_debug_that_is_off_gives_no_default_of_development(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", text)
    with pytest.raises(config.ConfigError, match="SECRET_KEY is not set"):
        create_app()


@pytest.mark.parametrize("host, trusted", [("a.example", True), ("0.0.0.0", None)])
def test_host_of_flask_dev_is_trusted(
    monkeypatch: pytest.MonkeyPatch, host: str, trusted: bool | None
) -> None:
    monkeypatch.setenv("FLASK_RUN_HOST", host)
    hosts = create_app({"DEBUG": True}).config["TRUSTED_HOSTS"]
    assert (hosts and host in hosts) is trusted


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECRET_KEY_FALLBACKS", "SLOW_QUERY"):
        monkeypatch.setenv(name, "")
    assert create_app(PRODUCTION).config["SLOW_QUERY"] == 0.5


def test_owner_declares_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_SERVER", "mail.example")
    app = Flask("app")
    table = {"MAIL_SERVER": text_setting("localhost"), "SIZE": number_setting(8)}
    core.init_app(app, PRODUCTION, table)
    assert (app.config["MAIL_SERVER"], app.config["SIZE"]) == ("mail.example", 8)


@pytest.mark.parametrize(
    "given, found", [(None, False), ("0", False), ("1", True), ("on", True)]
)
def test_boolean_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, given: str | None, found: bool
) -> None:
    if given:
        monkeypatch.setenv("SIZE", given)
    assert read(bool_setting()) is found


@pytest.mark.parametrize("value", ["perhaps", 2])
def test_invalid_boolean_stops_the_start(value: object) -> None:
    message = "^SIZE is .*: set it to 1 for yes, or to 0 for no[.]$"
    with pytest.raises(config.ConfigError, match=message):
        read(bool_setting(), SIZE=value)


def test_number_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIZE", "3")
    assert read(number_setting(8)) == 3
    monkeypatch.setenv("SIZE", "5000000000")
    assert read(number_setting(8)) == 5_000_000_000


@pytest.mark.parametrize("value", ["abc", "0", "-1", "2.5", "nan", "inf"])
def test_invalid_number_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SIZE", value)
    message = f"^SIZE is '{value}': set it to a whole number above 0, such as 8[.]$"
    with pytest.raises(config.ConfigError, match=message):
        read(number_setting(8))


@pytest.mark.parametrize("value", [0, 2.5, float("inf"), "1e3"])
def test_override_is_validated(value: object) -> None:
    with pytest.raises(config.ConfigError, match="^SIZE is "):
        read(number_setting(8), SIZE=value)
