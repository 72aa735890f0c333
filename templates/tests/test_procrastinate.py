from collections.abc import Iterator
from typing import Any

import pytest
from click import ClickException
from flask import Flask, current_app
from psycopg2 import OperationalError

from {{ cookiecutter.project_slug }}.core.db import get_db
from {{ cookiecutter.project_slug }}.core.jobs import queue, task
from {{ cookiecutter.project_slug }}.core.log import request_id
from {{ cookiecutter.project_slug }}.core.worker import Worker

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
def fail() -> None:
    raise RuntimeError("on purpose")


@task
def lose_the_connection() -> None:
    raise OperationalError("on purpose")


@pytest.fixture(autouse=True)
def context(app: Flask) -> Iterator[None]:
    results.clear()
    with app.app_context():
        yield


@pytest.fixture
def worker(app: Flask) -> Worker:
    found: Worker = app.extensions["worker"]
    return found


def test_task_is_still_a_function() -> None:
    assert add(1, b=2) == 3


def test_put_off_task_runs(worker: Worker) -> None:
    add.delay(1, b=2)
    assert results == []
    worker.run_waiting()
    assert results == [3]


def test_job_is_committed_with_the_transaction(worker: Worker) -> None:
    with get_db():
        add.delay(1, 2)
        worker.run_waiting()
        assert results == []
    worker.run_waiting()
    assert results == [3]


def test_job_is_rolled_back_with_the_transaction(worker: Worker) -> None:
    with pytest.raises(RuntimeError), get_db():
        add.delay(1, 2)
        raise RuntimeError
    assert worker.status()["waiting"] == 0


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'b'"):
        add.delay(1)  # type: ignore[call-arg]


def test_task_has_a_context_of_its_own(app: Flask, worker: Worker) -> None:
    mine = get_db().info.backend_pid
    use_database.delay()
    worker.run_waiting()
    [(name, backend)] = results
    assert name == app.name
    assert backend != mine


def test_task_knows_the_request_that_asked_for_it(app: Flask, worker: Worker) -> None:
    @app.post("/tell")
    def ask() -> str:
        tell_request.delay()
        return "asked"

    app.test_client().post("/tell", headers={"X-Request-ID": "mine"})
    worker.run_waiting()
    assert results == ["mine"]


def test_job_for_later_waits(worker: Worker) -> None:
    add.job.configure(schedule_in={"hours": 1}).defer(a=1, b=2)
    worker.run_waiting()
    status = {"waiting": 0, "later": 1, "oldest_seconds": 0}
    assert worker.status() | status == worker.status()


def test_waiting_job_can_be_cancelled(worker: Worker) -> None:
    job = add.job.defer(a=1, b=2)
    assert queue.job_manager.cancel_job_by_id(job)
    worker.run_waiting()
    assert results == []


def test_failed_job_is_listed_and_can_be_run_again(app: Flask, worker: Worker) -> None:
    fail.delay()
    worker.run_waiting()
    [(job, call)] = worker.failed().items()
    assert f"fail[{job}](" in call
    assert worker.status()["failed"] == 1
    app.test_cli_runner().invoke(args=["worker", "--retry", str(job)])
    assert worker.status() | {"waiting": 1, "failed": 0} == worker.status()


def test_unknown_job_is_refused(worker: Worker) -> None:
    with pytest.raises(ClickException, match="^No failed job has the id 7: see --fai"):
        worker.retry(7)


def test_job_that_lost_its_connection_waits_to_be_run_again(worker: Worker) -> None:
    lose_the_connection.delay()
    worker.run_waiting()
    assert worker.status() | {"later": 1, "failed": 0} == worker.status()


def test_command_counts_jobs_and_workers(app: Flask) -> None:
    add.delay(1, 2)
    output = app.test_cli_runner().invoke(args=["worker", "--status"]).output
    assert output.startswith("waiting: 1\nlater: 0\nrunning: 0\nfailed: 0\noldest")
    assert output.endswith("workers: 0\n")
