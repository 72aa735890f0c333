"""An application with a schedule: one job every two seconds."""

from app.core import jobs
from app.core.db import get_db
from app.core.jobs import task
from flask import Flask

from . import working


@task
def tick(timestamp: int) -> None:
    """Record the run with the time that it was scheduled for."""
    with get_db().cursor() as cursor:
        cursor.execute("INSERT INTO runs (number) VALUES (%s)", [timestamp])


if hasattr(jobs, "queue"):
    jobs.queue.periodic(cron="* * * * * */2")(tick)


def create_app() -> Flask:
    """Create the application, and put the schedule into Celery's configuration."""
    app = working.create_app()
    if celery := app.extensions.get("celery"):
        schedule = {"task": tick.name, "schedule": 2.0, "args": [0]}
        celery.conf.beat_schedule = {"tick": schedule}
    return app
