"""A clean database for each test, on the server of `DATABASE_URL` if it is set."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

import psycopg2
import pytest
from dotenv import dotenv_values
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from psycopg2.extensions import connection, cursor, make_dsn

from {{ cookiecutter.project_slug }} import core, create_app
from {{ cookiecutter.project_slug }}.core.cli import DROP_ALL
from {{ cookiecutter.project_slug }}.core.db import get_pool
{%- if cookiecutter.worker == 'thread' %}
from {{ cookiecutter.project_slug }}.core.jobs import get_worker
{%- elif cookiecutter.worker == 'celery' %}
from {{ cookiecutter.project_slug }}.core.jobs import get_celery
from {{ cookiecutter.project_slug }}.core.worker import get_worker
{%- elif cookiecutter.worker == 'procrastinate' %}
from {{ cookiecutter.project_slug }}.core.worker import get_worker
{%- endif %}

# DROP DATABASE WITH (FORCE) would also end an autovacuum, which needs a superuser.
DISCONNECT = """
SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity
WHERE datname = %s AND pg_has_role(usesysid, 'USAGE') AND pid <> pg_backend_pid()
"""

# The tables and materialized views with rows since they were created or truncated, and
# the sequences that were used, even for rejected rows.
USED = """
SELECT oid::regclass::text, relkind FROM pg_class
WHERE relnamespace::regnamespace::text !~ '^(pg_|information_schema)' AND CASE
    WHEN NOT pg_has_role(relowner, 'USAGE') THEN false
    WHEN relkind = 'S' THEN pg_sequence_last_value(oid) IS NOT NULL
    ELSE relkind IN ('r', 'm') AND pg_relation_size(oid) > 0 END
ORDER BY oid
"""
SEQUENCES = """
SELECT oid::regclass::text FROM pg_class
WHERE relkind = 'S' AND pg_has_role(relowner, 'USAGE')
"""

# PostgreSQL 14 and later would otherwise end the session that has the lock.
UNLIMITED = """
SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout'
"""

# The databases of killed test runs. The others are locked.
LEFT = """
SELECT datname FROM pg_database WHERE starts_with(datname, %s)
AND pg_get_userbyid(datdba) = current_user AND pg_try_advisory_lock(hashtext(datname))
"""


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    """Drop the settings of development, because an editor may load `.env`."""
    names = {f"FLASK_{name}" for name in Flask.default_config}
    names.update(core.SETTINGS, core.config.SETTINGS)
    own = dotenv_values(Path(__file__).parents[1] / ".env").items() & os.environ.items()
    names.update(name for name, _ in own if not name.startswith("PG"))
    for name in names - {"DATABASE_URL"}:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def server_url() -> str:
    """The URL of the server: `DATABASE_URL`, or the embedded server."""
    if url := os.environ.get("DATABASE_URL"):
        return url
    from flask_devserver.postgres import ensure_database

    folder = Path(__file__).parents[1] / "instance" / "postgres"
    embedded: str = ensure_database(folder, "{{ cookiecutter.project_slug }}")
    return embedded


@pytest.fixture(scope="session")
def migrated_url(server_url: str) -> Iterator[str]:
    """The URL of a database with all migrations."""
    with scratch_database(server_url) as url:
        migrate(url)
        yield url


@pytest.fixture(scope="session")
def filled(migrated_url: str) -> set[str]:
    """The tables that migrations fill."""
    with closing(connect(migrated_url)) as conn, conn.cursor() as cursor:
        cursor.execute(USED)
        return {name for name, kind in cursor if kind == "r"}


@pytest.fixture(scope="session")
def sequences(migrated_url: str) -> dict[str, Any]:
    """The value of each sequence after the migrations, and whether it was returned."""
    values = {}
    with closing(connect(migrated_url)) as conn, conn.cursor() as cursor:
        cursor.execute(SEQUENCES)
        for (name,) in cursor.fetchall():
            cursor.execute(f"SELECT last_value, is_called FROM {name}")
            values[name] = cursor.fetchone()
    return values


@pytest.fixture
def database_url(migrated_url: str, filled: set[str], sequences: dict[str, Any]) -> str:
    """The URL of the database as the migrations leave it, without other connections."""
    with closing(connect(migrated_url)) as conn, conn.cursor() as cursor:
        cursor.execute(DISCONNECT, [conn.info.dbname])
        if filled != {"schema_migrations"} or not empty(cursor, sequences):
            cursor.execute(DROP_ALL)
            migrate(migrated_url)
    return migrated_url


@pytest.fixture
def db(database_url: str) -> Iterator[connection]:
    """A connection for the test itself."""
    with closing(connect(database_url)) as conn:
        yield conn


@pytest.fixture
def app_factory() -> Callable[..., Flask]:
    """The function that creates the application of a test."""
    return create_app

{% if cookiecutter.worker == 'celery' %}
@pytest.fixture(scope="session")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A broker for the tests, so that their jobs do not reach another worker."""
    from flask_devserver.valkey import ensure_broker

    return ensure_broker(tmp_path_factory.mktemp("valkey"))


@pytest.fixture
def app(
    app_factory: Callable[..., Flask], database_url: str, broker_url: str
) -> Iterator[Flask]:
    """An application on the test's database, without jobs."""
    settings = {"DATABASE_URL": database_url, "CELERY_BROKER_URL": broker_url}
    app = app_factory({"TESTING": True, **settings})
    with app.app_context():
        get_celery().control.purge()
    yield app
    with app.app_context():
        get_pool().close()
{% else %}
@pytest.fixture
def app(app_factory: Callable[..., Flask], database_url: str) -> Iterator[Flask]:
    """An application on the test's database."""
    app = app_factory({"TESTING": True, "DATABASE_URL": database_url})
    yield app
    with app.app_context():
{%- if cookiecutter.worker == 'thread' %}
        get_worker().stop()  # Its jobs would change the data of the next test.
{%- endif %}
        get_pool().close()
{% endif %}

@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A client of the application."""
    return app.test_client()


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    """A runner for the commands of the application."""
    return app.test_cli_runner()

{%- if cookiecutter.worker != 'none' %}


@pytest.fixture
def run_jobs(app: Flask) -> Callable[[], None]:
    """A function that runs the waiting jobs, and the jobs that they enqueue."""

    def run() -> None:
        with app.app_context():
            get_worker().run_waiting()

    return run
{%- endif %}


def migrate(url: str) -> None:
    """Apply all migrations to the database."""
    app = create_app({"TESTING": True, "DATABASE_URL": url})
    result = app.test_cli_runner().invoke(args=["migrate"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with app.app_context():
        get_pool().close()


def empty(cursor: cursor, sequences: dict[str, Any]) -> bool:
    """Empty the tables, much faster than the migrations, and return whether it worked.

    `sequences` has the value of each sequence, and whether it was returned.
    """
    try:
        cursor.execute(USED)
        used = {name: kind for name, kind in cursor if name != "schema_migrations"}
        if tables := [name for name, kind in used.items() if kind == "r"]:
            cursor.execute(f"TRUNCATE {', '.join(tables)} CASCADE")
        for name, kind in used.items():
            if kind == "m":
                cursor.execute(f"REFRESH MATERIALIZED VIEW {name}")
            elif kind == "S" and name in sequences:
                cursor.execute("SELECT setval(%s, %s, %s)", [name, *sequences[name]])
    except psycopg2.Error:  # A trigger may forbid it.
        return False
    return True


@contextmanager
def scratch_database(server_url: str) -> Iterator[str]:
    """Create a database, yield its URL and drop it."""
    with closing(connect(server_url)) as conn, conn.cursor() as cursor:
        cursor.execute(UNLIMITED)
        # Locks belong to this database.
        cursor.execute(
            "SELECT oid::text FROM pg_database WHERE datname = current_database()"
        )
        [[oid]] = cursor.fetchall()
        cursor.execute(LEFT, [f"test_{oid}_"])
        for (left,) in cursor.fetchall():
            with suppress(psycopg2.Error):  # Somebody may look at it.
                cursor.execute(DISCONNECT, [left])
                cursor.execute(f"DROP DATABASE {left}")
        name = f"test_{oid}_{token_hex(8)}"
        cursor.execute("SELECT pg_advisory_lock(hashtext(%s))", [name])
        cursor.execute(f"CREATE DATABASE {name}")
        # Nothing here has to survive a crash.
        cursor.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
        try:
            yield make_dsn(server_url, dbname=name)
        finally:
            cursor.execute(DISCONNECT, [name])
            cursor.execute(f"DROP DATABASE {name}")


def connect(url: str) -> connection:
    """Open a connection in autocommit."""
    conn = psycopg2.connect(url)
    conn.autocommit = True
    return conn
