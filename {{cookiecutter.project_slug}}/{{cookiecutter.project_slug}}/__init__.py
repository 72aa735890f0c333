"""A Flask application on PostgreSQL."""

from collections.abc import Mapping
from typing import Any

from flask import Flask

from .core.config import check_config, load_config


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Create the application; connections and threads wait for their first use.

    `config` overrides what the environment says, as a test does. Raises
    `ConfigError` when settings are missing or malformed.
    """
    app = Flask(__name__)
    load_config(app, config)

    from .core import log

    log.init_app(app)

    from .core import security

    security.init_app(app)

    from .core import db

    db.init_app(app)
{%- if cookiecutter.pool != 'none' %}

    from .core import pool

    pool.init_app(app)
{%- endif %}
{%- if cookiecutter.worker != 'none' %}

    from .core import jobs

    jobs.init_app(app)
{%- endif %}

    from .core import migrate

    migrate.init_app(app)

    from .core import health

    app.register_blueprint(health.bp)

    from . import notes

    app.register_blueprint(notes.bp)

    check_config(app)
    return app
