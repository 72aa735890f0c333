from collections.abc import Iterator
from typing import Any

import pytest
from celery.contrib.testing.worker import start_worker
from click import ClickException
from flask import Flask, current_app
from kombu.exceptions import EncodeError
from psycopg2 import OperationalError

from {{ cookiecutter.project_slug }} import create_app
from {{ cookiecutter.project_slug }}.core.db import get_db
from {{ cookiecutter.project_slug }}.core.jobs import Task, task
from {{ cookiecutter.project_slug }}.core.log import request_id
from {{ cookiecutter.project_slug }}.core.worker import Worker

from .reload_server import poll

results: list[Any] = []


@task
def add(a: int, b: int) -> int:
    results.append(a + b)
    return a + b


@task
def use_database() -> None:
    results.append((current_app.name, get_db().info.backend_pid))


@task
def tell_request() -> None:
    results.append(request_id.get())


@task
def fail(number: int) -> None:
    raise RuntimeError("on purpose")


@task(autoretry_for=(OSError,))
def wait() -> None:
    results.append("waited")


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    settings = {"DATABASE_URL": database_url, "CELERY_BROKER_URL": "memory://"}
    app = create_app({"TESTING": True, **settings})
    results.clear()
    with app.app_context():
        yield app
    app.extensions["celery"].control.purge()
    app.extensions["pool"].close()


@pytest.fixture
def worker(app: Flask) -> Worker:
    found: Worker = app.extensions["worker"]
    return found


def run(app: Flask, task: Task[..., Any], *args: object) -> None:
    """Run a task as a worker does."""
    app.extensions["celery"].tasks[task.job.name].apply(args)


def waiting(worker: Worker) -> int:
    return worker.status()["waiting"]


@pytest.mark.parametrize("arguments", [[{1, 2}, 3], [1]], ids=str)
def test_arguments_that_cannot_be_sent_are_refused_before_the_commit(
    app: Flask, worker: Worker, arguments: list[Any]
) -> None:
    with pytest.raises((TypeError, EncodeError)), get_db() as db:
        db.cursor().execute("INSERT INTO items (body) VALUES ('unfinished')")
        add.delay(*arguments)
    with get_db().cursor() as cursor:
        cursor.execute("SELECT FROM items")
        assert cursor.rowcount == 0
    assert worker.status()["waiting"] == 0


def test_lost_connection_is_a_reason_to_try_again_whatever_else_is(app: Flask) -> None:
    again = app.extensions["celery"].tasks[wait.job.name].autoretry_for
    assert {OSError, OperationalError} <= set(again)


def test_task_is_still_a_function() -> None:
    assert add(1, b=2) == 3


def test_task_is_sent_once_the_transaction_is_committed(worker: Worker) -> None:
    with get_db():
        add.delay(1, 2)
        assert waiting(worker) == 0
    assert waiting(worker) == 1


def test_task_of_a_transaction_that_is_rolled_back_is_not_sent(worker: Worker) -> None:
    with pytest.raises(RuntimeError), get_db():
        add.delay(1, 2)
        raise RuntimeError
    assert waiting(worker) == 0


def test_task_has_a_context_of_its_own(app: Flask) -> None:
    mine = get_db().info.backend_pid
    run(app, use_database)
    [(name, backend)] = results
    assert name == app.name
    assert backend != mine


def test_task_knows_the_request_that_asked_for_it(app: Flask) -> None:
    @app.post("/tell")
    def ask() -> str:
        tell_request.delay()
        return "asked"

    celery = app.extensions["celery"]
    app.test_client().post("/tell", headers={"X-Request-ID": "mine"})
    with start_worker(celery, perform_ping_check=False):
        assert poll(lambda: results) == ["mine"]


def test_failed_task_is_listed_and_can_be_sent_again(
    app: Flask, worker: Worker
) -> None:
    run(app, fail, 7)
    [(id, call)] = worker.failed().items()
    assert call.endswith(".fail [7] {}")
    app.test_cli_runner().invoke(args=["worker", "--retry", id])
    assert worker.status() | {"waiting": 1, "failed": 0} == worker.status()


def test_unknown_task_is_refused(worker: Worker) -> None:
    with pytest.raises(ClickException, match="^No failed task has the id 7: see --fai"):
        worker.retry("7")
