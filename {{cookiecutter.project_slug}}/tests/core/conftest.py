import pytest
from flask import Flask

from .items import bp, create_table


@pytest.fixture
def database_url(database_url: str) -> str:
    """A database with the table of the tests."""
    create_table(database_url)
    return database_url


@pytest.fixture
def app(app: Flask) -> Flask:
    """An application with the routes of the tests."""
    app.register_blueprint(bp)
    return app
