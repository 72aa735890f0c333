"""Connections to servers that refuse options or become read-only.

These tests run in a baked project with each pool.
"""

from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from app import create_app
from app.core.db import get_db
from flask import Flask
from flask_devserver import postgres

from .core.reload_server import poll
from .proxy import Proxy

SETTINGS = {"TESTING": True, "POOL_SIZE": 4}

REFUSALS = {
    # PostgreSQL itself refuses the option on Windows.
    "client_connection_check_interval": "invalid value for parameter"
    ' "client_connection_check_interval": 500; "client_connection_check_interval"'
    " must be set to 0 on this platform.",
    # PgBouncer up to 1.19, and later versions.
    "options": "unsupported startup parameter: options",
    "options=": "unsupported startup parameter in options:"
    " client_connection_check_interval",
    "RDS Proxy": "Feature not supported: RDS Proxy currently doesn't support"
    " command-line options.",
    "Neon": "unsupported startup parameter: options. Please use unpooled connection or"
    " remove this parameter from the startup package.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("connections") / "instance" / "postgres"


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    url = postgres.ensure_database(folder, "connections")
    with closing(psycopg2.connect(url)) as conn, conn, conn.cursor() as cursor:
        cursor.execute("CREATE TABLE items (body text)")
    yield url
    postgres.stop(folder)


@pytest.mark.parametrize("message", REFUSALS.values(), ids=REFUSALS)
def test_rejected_startup_options_are_omitted_with_warning(
    url: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def refuse(parameters: dict[str, str]) -> str:
        attempts.append("options" in parameters)
        return message if "options" in parameters else ""

    with front(url, refuse) as app:
        for _ in range(3):
            with app.app_context():
                run("SELECT 1")
        [warning] = [text for text in caplog.messages if "rejects" in text]
        assert message.split(";")[0] in warning
        assert attempts.count(True) == 1


def test_migrations_run_without_rejected_startup_options(url: str) -> None:
    with front(url, refuse_options) as app:
        result = app.test_cli_runner().invoke(args=["migrate", "--status"])
        assert result.exit_code == 0, result.output


def test_other_connection_errors_are_not_retried(url: str) -> None:
    attempts = []

    def refuse(parameters: dict[str, str]) -> str:
        attempts.append(parameters)
        return "sorry, too many clients already"

    with front(url, refuse) as app, app.app_context():
        with pytest.raises(Exception, match="too many clients"):
            get_db()
    assert len(attempts) == 1


def test_operators_options_are_never_omitted(url: str) -> None:
    with front(url + "?options=-cstatement_timeout%3D1234", refuse_options) as app:
        with app.app_context(), pytest.raises(Exception, match="startup parameter"):
            get_db()


@pytest.mark.parametrize("transaction", [False, True])
def test_pool_leaves_a_demoted_server(
    url: str, folder: Path, transaction: bool
) -> None:
    """The server becomes read-only, like the old primary after a failover."""
    app = create_app(SETTINGS | {"DATABASE_URL": url})
    add_route(app, transaction)
    client = app.test_client()
    assert client.post("/write").status_code == 200
    with app.app_context():
        kept = app.extensions["pool"].getconn()  # Two connections are idle later.
        run("SELECT 1")
        app.extensions["pool"].putconn(kept)
    alter_system(folder, "SET default_transaction_read_only = on")
    try:
        assert poll(lambda: client.post("/write").status_code == 503)
        # In a real failover, the name of the server now leads to the new primary.
    finally:
        alter_system(folder, "RESET default_transaction_read_only")
    assert client.post("/write").status_code == 200
    assert app.extensions["pool"].stats()["in_use"] == 0


def test_own_read_only_session_is_not_a_failover(url: str) -> None:
    app = create_app(SETTINGS | {"DATABASE_URL": url})
    app.register_error_handler(psycopg2.Error, lambda error: ("mine", 418))

    @app.get("/by-session")
    def by_session() -> str:
        get_db().set_session(readonly=True)
        run("INSERT INTO items VALUES (1)")
        return "written"

    @app.get("/by-transaction")
    def by_transaction() -> str:
        with get_db():
            run("SET TRANSACTION READ ONLY")
            run("INSERT INTO items VALUES (1)")
        return "written"

    client = app.test_client()
    assert client.get("/by-session").status_code == 418
    assert client.get("/by-transaction").status_code == 418


def test_reset_that_fails_changes_nothing(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    app = create_app(SETTINGS | {"DATABASE_URL": url})
    with closing(connect_as_admin(folder, "connections")) as conn:
        conn.cursor().execute("SELECT FROM items")  # This locks the table.
        result = app.test_cli_runner().invoke(args=["migrate", "--reset"], input="y")
    [_, sentence] = result.output.splitlines()
    assert sentence.startswith("Error: canceling statement due to lock timeout")
    with app.app_context():
        run("SELECT FROM items")


def test_reset_keeps_the_schemas_of_other_roles(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    app = create_app(SETTINGS | {"DATABASE_URL": url})
    with closing(connect_as_admin(folder, "connections")) as conn, conn.cursor() as by:
        by.execute("CREATE SCHEMA theirs; COMMIT")
        result = app.test_cli_runner().invoke(args=["migrate", "--reset"], input="y")
        assert "Applied " in result.output
        by.execute("SELECT to_regnamespace('theirs'), to_regclass('items')")
        assert by.fetchone() == ("theirs", None)
        by.execute("DROP SCHEMA theirs; CREATE TABLE items (body text)")
        by.execute("ALTER TABLE items OWNER TO dev; COMMIT")


def add_route(app: Flask, transaction: bool) -> None:
    @app.post("/write")
    def write() -> str:
        if transaction:
            with get_db():
                run("INSERT INTO items VALUES (1)")
        else:
            run("INSERT INTO items VALUES (1)")
        return "written"


def refuse_options(parameters: dict[str, str]) -> str:
    return REFUSALS["options"] if "options" in parameters else ""


@contextmanager
def front(url: str, refuse: Callable[[dict[str, str]], str]) -> Iterator[Flask]:
    """Yield an application that reaches the server at `url` through a proxy."""
    port = urlsplit(url).port
    assert port
    proxy = Proxy("127.0.0.1", port, refuse)
    try:
        url = url.replace(f":{port}/", f":{proxy.port}/")
        yield create_app(SETTINGS | {"DATABASE_URL": url})
    finally:
        proxy.end()


def alter_system(folder: Path, change: str) -> None:
    """Change the configuration of the server, and wait until it applies."""
    run_as_admin(folder, f"ALTER SYSTEM {change}")
    run_as_admin(folder, "SELECT pg_reload_conf()")
    state = "on" if change.startswith("SET") else "off"
    show = "SHOW default_transaction_read_only"
    assert poll(lambda: run_as_admin(folder, show) == [(state,)])


def connect_as_admin(folder: Path, name: str = "postgres") -> Any:
    services = ConfigParser(interpolation=None)
    services.read(folder / "pg_service.conf")
    return psycopg2.connect(**dict(services["admin"]) | {"dbname": name})


def run_as_admin(folder: Path, query: str) -> list[Any]:
    """Execute a query as the administrator of the server, and return the rows."""
    with closing(connect_as_admin(folder)) as conn:
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall() if cursor.description else []


def run(query: str) -> None:
    with get_db().cursor() as cursor:
        cursor.execute(query)
