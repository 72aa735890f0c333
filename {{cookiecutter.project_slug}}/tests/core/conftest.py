import pytest
from flask import Flask

from .items import bp, create_table


@pytest.fixture
def database_url(database_url: str) -> str:
    """A database for one test, with a table that no application knows."""
    create_table(database_url)
    return database_url


@pytest.fixture
def app(app: Flask) -> Flask:
    """An application with routes to that table."""
    app.register_blueprint(bp)
    return app
