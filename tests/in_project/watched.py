"""An application whose broker is found by Sentinel."""

from flask import Flask

from . import working


def create_app() -> Flask:
    """Create the application, and name the Redis that Sentinel watches."""
    app = working.create_app()
    options = {"master_name": "mymaster"}
    app.extensions["celery"].conf.update(broker_transport_options=options)
    return app
