from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from flask import Flask

from {{ cookiecutter.project_slug }}.core.cli import DROP_ALL

from ..conftest import connect, scratch_database
from .application import bp, create_app, create_table


@pytest.fixture(scope="session")
def scratch_url(server_url: str) -> Iterator[str]:
    """The URL of a database that tests change at will."""
    with scratch_database(server_url) as url:
        yield url


@pytest.fixture
def empty_url(scratch_url: str) -> str:
    """The URL of the database, without tables and other connections."""
    with closing(connect(scratch_url)) as conn, conn.cursor() as cursor:
        cursor.execute(DROP_ALL)
    return scratch_url


@pytest.fixture
def database_url(database_url: str) -> str:
    """A database with the table of the tests."""
    create_table(database_url)
    return database_url


@pytest.fixture(autouse=True)
def _push_request_context() -> None:
    """Replace the fixture of pytest-flask, which gives every test a request."""


@pytest.fixture
def app_factory() -> Callable[..., Flask]:
    """The function that creates an application without anything of the project's."""
    return create_app


@pytest.fixture
def app(app: Flask) -> Flask:
    """An application with the routes of the tests."""
    app.register_blueprint(bp)
    return app
