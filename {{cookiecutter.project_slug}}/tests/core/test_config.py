import sys
from pathlib import Path

import pytest
from flask import Flask

from {{ cookiecutter.project_slug }} import create_app
from {{ cookiecutter.project_slug }}.core import config

from ..conftest import PRODUCTION


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PRODUCTION, "FLASK_DEBUG", "SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", PRODUCTION)
def test_missing_setting_stops_the_start(name: str) -> None:
    message = f"^{name} is not set: set it to .*, or use `flask --debug` .*[.]$"
    with pytest.raises(config.ConfigError, match=message):
        create_app(PRODUCTION | {name: ""})


@pytest.mark.parametrize("key", ["0" * 15, config.EXAMPLES["SECRET_KEY"]])
def test_weak_key_stops_the_start(key: str) -> None:
    message = "^SECRET_KEY is (shorter than 16 bytes|not set): set it to what `python"
    with pytest.raises(config.ConfigError, match=message):
        create_app(PRODUCTION | {"SECRET_KEY": key})
    create_app({"TESTING": True, "SECRET_KEY": key})


def test_settings_that_are_wrong_are_named_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRUSTED_HOSTS", "https://example.com")
    monkeypatch.setenv("MAX_CONTENT_LENGTH", "1 MB")
    with pytest.raises(config.ConfigError) as error:
        create_app()
    names = {sentence.split()[0] for sentence in str(error.value).splitlines()}
    assert names == {"MAX_CONTENT_LENGTH", "TRUSTED_HOSTS", *PRODUCTION}
    assert "such as 1048576." in str(error.value)


def test_hosts_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUSTED_HOSTS", "example.com, .example.org")
    trusted = create_app(PRODUCTION).config["TRUSTED_HOSTS"]
    assert trusted == ["example.com", ".example.org"]


def test_other_database_stops_the_start_without_its_password() -> None:
    message = "^DATABASE_URL is no PostgreSQL URL: write it like "
    for url in ("mysql://user:hunter2@host/a", "postgresql://u:hun@hunter2@host/a"):
        with pytest.raises(config.ConfigError, match=message) as error:
            create_app(PRODUCTION | {"DATABASE_URL": url})
        assert "hunter2" not in str(error.value)


def test_environment_gives_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PRODUCTION.items():
        monkeypatch.setenv(name, value)
    found = create_app().config
    assert {name: found[name] for name in PRODUCTION} == PRODUCTION


def test_development_key_stays_the_same_and_private(tmp_path: Path) -> None:
    keys = set()
    for _ in range(2):
        app = Flask("app", instance_path=str(tmp_path))
        config.load_config(app, {"TESTING": True})
        keys.add(app.config["SECRET_KEY"])
    [key] = keys
    assert len(key) == 64
    if sys.platform != "win32":
        assert (tmp_path / "secret_key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("value, found", [(None, False), ("0", False), ("1", True)])
def test_flag_is_off_unless_it_is_set_to_1(
    monkeypatch: pytest.MonkeyPatch, value: str | None, found: bool
) -> None:
    if value:
        monkeypatch.setenv("SIZE", value)
    assert config.flag(Flask("app"), "SIZE") is found


@pytest.mark.parametrize("value", ["", "yes", 2])
def test_flag_of_another_value_stops_the_start(value: object) -> None:
    app = Flask("app")
    app.config["SIZE"] = value
    config.flag(app, "SIZE")
    message = "^SIZE is .*: set it to 1 for yes, or to 0 for no[.]$"
    with pytest.raises(config.ConfigError, match=message):
        config.check_config(app)


def test_number_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIZE", "3")
    assert config.number(Flask("app"), "SIZE", 8) == 3


@pytest.mark.parametrize("value", ["abc", "", "0", "-1", "2.5", "nan", "inf"])
def test_other_than_a_whole_number_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SIZE", value)
    app = Flask("app")
    config.number(app, "SIZE", 8)
    message = f"^SIZE is '{value}': set it to a whole number above 0, such as 8[.]$"
    with pytest.raises(config.ConfigError, match=message):
        config.check_config(app)


@pytest.mark.parametrize("value", [0, 2.5, float("inf"), "1e3"])
def test_override_is_checked_as_well(value: object) -> None:
    app = Flask("app")
    app.config["SIZE"] = value
    config.number(app, "SIZE", 8)
    with pytest.raises(config.ConfigError, match="^SIZE is "):
        config.check_config(app)
