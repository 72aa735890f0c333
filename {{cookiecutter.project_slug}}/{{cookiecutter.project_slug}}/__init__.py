"""A Flask application on PostgreSQL."""

from collections.abc import Mapping
from typing import Any

from flask import Flask

from . import core, notes


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Create the application. Connections and threads wait for their first use.

    `config` overrides settings, for tests. Raises `ConfigError` if any are invalid.
    """
    app = Flask(__name__)
    core.init_app(app, config)
    app.register_blueprint(notes.bp)
    return app
