"""An application with a schedule: one job every second."""

from typing import Any

from app.core import jobs
from app.core.db import get_db
from app.core.jobs import task
from app.core.worker import get_worker
from flask import Flask

from . import working


@task
def tick(timestamp: int) -> None:
    """Record the run with the time that it was scheduled for."""
    with get_db().cursor() as cursor:
        cursor.execute("INSERT INTO runs (number) VALUES (%s)", [timestamp])


if hasattr(jobs, "queue"):
    jobs.queue.periodic(cron="* * * * * *")(tick)


def create_app() -> Flask:
    """Create the application, and put the schedule into Celery's configuration."""
    app = working.create_app()
    if celery := app.extensions.get("celery"):
        schedule = {"task": tick.name, "schedule": 1.0, "args": [0]}
        celery.conf.beat_schedule = {"tick": schedule}
    return app


def __getattr__(name: str) -> Any:
    """Return what Celery's own commands look for, as the module `worker` has it."""
    if name != "celery":
        raise AttributeError(name)
    with create_app().app_context():
        return get_worker().get_ready()
