"""The Celery application, for Celery's own commands."""

from . import create_app
from .core.worker import get_worker

with create_app().app_context():
    celery = get_worker().get_ready()
