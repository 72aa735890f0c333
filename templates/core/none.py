"""The machinery of the project. `cruft update` maintains it: put your code outside."""

from flask import Flask

from . import cli, config, db, errors, health, log, pool, security
from .config import Overrides, Settings

SETTINGS: Settings = {**security.SETTINGS, **db.SETTINGS, **pool.SETTINGS}


def init_app(app: Flask, overrides: Overrides = None, *settings: Settings) -> None:
    """Set up `app`. Raises `ConfigError` if settings are missing or invalid.

    `overrides` are values of settings. `settings` are tables of the application's own,
    such as `{"NOTES_PER_PAGE": number_setting(100)}`.
    """
    config.init_app(app, overrides, SETTINGS, *settings)
    if app.debug or app.testing:
        # Production has no development server and no embedded PostgreSQL to import.
        from . import dev

        dev.init_app(app)
    # The log and the headers come later, because they also wrap health checks.
    health.init_app(app)
    log.init_app(app)
    security.init_app(app)
    errors.init_app(app)
    db.init_app(app)
    pool.init_app(app)
    cli.init_app(app)
