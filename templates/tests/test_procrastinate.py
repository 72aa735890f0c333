import logging
from collections.abc import AsyncIterator, Callable, Iterator
from signal import SIGINT, SIGTERM, getsignal, signal
from typing import Any
from unittest.mock import Mock

import pytest
from flask import Flask, current_app
from procrastinate import JobContext, tasks
from procrastinate.exceptions import AlreadyEnqueued, ConnectorException
from procrastinate.periodic import PeriodicRegistry
from psycopg.errors import UndefinedFunction
from psycopg2 import OperationalError

from {{ cookiecutter.project_slug }}.core import engine
from {{ cookiecutter.project_slug }}.core.db import get_db
from {{ cookiecutter.project_slug }}.core.engine import Worker
from {{ cookiecutter.project_slug }}.core.jobs import queue, task
from {{ cookiecutter.project_slug }}.core.log import request_id
from {{ cookiecutter.project_slug }}.core.migrate import MigrationError
from {{ cookiecutter.project_slug }}.core.worker import get_worker

results: list[Any] = []


@task
def add(a: int, b: int) -> int:
    results.append(a + b)
    return a + b


@task
def add_twice(a: int, b: int) -> None:
    add.delay(a, b)
    add.delay(a, b)


@task
def use_database() -> None:
    results.append((current_app.name, get_db().info.backend_pid))


@task
async def tell_request() -> None:
    results.append(request_id.get())


@task
def collect(a: int, **others: int) -> None:
    results.append((a, others))


@task(pass_context=True)
def tell_job(context: JobContext, a: int) -> None:
    results.append((context.job.id, a))


@task
def run_at(timestamp: int) -> None:
    results.append(timestamp)


@task(queueing_lock="one")
def run_alone() -> None:
    results.append("alone")


@task
def reject(token: str) -> None:
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
    return get_worker()


def test_task_is_still_a_function() -> None:
    assert add(1, b=2) == 3


def test_task_is_the_engines_own() -> None:
    assert isinstance(add, tasks.Task)
    assert queue.tasks[f"{__name__}.add"] is add


def test_enqueued_task_runs(run_jobs: Callable[[], None]) -> None:
    add.delay(1, b=2)
    assert results == []
    run_jobs()
    assert results == [3]


def test_run_jobs_runs_what_jobs_enqueue(run_jobs: Callable[[], None]) -> None:
    add_twice.delay(1, 2)
    run_jobs()
    assert results == [3, 3]


def test_run_jobs_enqueues_no_periodic_job(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = PeriodicRegistry()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(queue, "periodic_registry", registry)
    queue.periodic(cron="* * * * * *")(run_at)
    worker.run_waiting()
    worker.run_waiting()
    assert results == []
    assert worker.status()["waiting"] == 0


def test_job_is_committed_with_the_transaction(run_jobs: Callable[[], None]) -> None:
    with get_db():
        add.delay(1, 2)
        run_jobs()
        assert results == []
    run_jobs()
    assert results == [3]


def test_job_is_rolled_back_with_the_transaction(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError), get_db():
        add.delay(1, 2)
        raise RuntimeError
    assert worker.status()["waiting"] == 0
    assert "Enqueued" not in caplog.text


@pytest.mark.parametrize("arguments", [[1], [1, 2, 3]], ids=str)
def test_delay_rejects_arguments_that_do_not_fit(
    worker: Worker, arguments: list[int]
) -> None:
    with pytest.raises(TypeError):
        add.delay(*arguments)
    assert worker.status()["waiting"] == 0


def test_job_joins_a_transaction_without_a_block(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    for end in ("ROLLBACK", "COMMIT"):
        with get_db().cursor() as cursor:
            cursor.execute("BEGIN")
            add.delay(1, 2)
            cursor.execute(end)
    assert worker.status()["waiting"] == 1
    assert "Enqueued" not in caplog.text


def test_delay_keeps_other_keyword_arguments(run_jobs: Callable[[], None]) -> None:
    collect.delay(1, b=2)
    run_jobs()
    assert results == [(1, {"b": 2})]


def test_task_gets_its_context(run_jobs: Callable[[], None]) -> None:
    job = tell_job.delay(1)
    run_jobs()
    assert results == [(job, 1)]


@pytest.mark.parametrize("function", [lambda *numbers: 0, lambda a, /: a])
def test_parameter_without_a_name_is_rejected(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="so give each one a name"):
        task(function)


def count() -> Iterator[int]:
    yield 1


async def count_slowly() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("function", [count, count_slowly])
def test_generator_is_rejected(function: Callable[..., Any]) -> None:
    message = f"^Task {function.__name__} is a generator, which nobody runs: write a"
    with pytest.raises(TypeError, match=message):
        task(function)


def test_transaction_goes_on_when_a_job_is_already_enqueued(
    run_jobs: Callable[[], None],
) -> None:
    run_alone.delay()
    with get_db() as db, db.cursor() as cursor:
        with pytest.raises(AlreadyEnqueued, match="queueing lock one"):
            run_alone.delay()
        cursor.execute("INSERT INTO items (body) VALUES ('committed')")
    with pytest.raises(AlreadyEnqueued):
        run_alone.delay()
    run_jobs()
    with get_db().cursor() as cursor:
        cursor.execute("SELECT body FROM items")
        assert cursor.fetchall() == [("committed",)]
    assert results == ["alone"]


def test_task_has_a_context_of_its_own(
    app: Flask, run_jobs: Callable[[], None]
) -> None:
    mine = get_db().info.backend_pid
    use_database.delay()
    run_jobs()
    [(name, backend)] = results
    assert name == app.name
    assert backend != mine


def test_lines_of_a_job_have_the_id_that_the_request_logged(
    app: Flask, run_jobs: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app.add_url_rule("/tell", view_func=lambda: str(tell_request.delay()))
    job = app.test_client().get("/tell").text
    assert f"Enqueued job {job}: {__name__}.tell_request" in caplog.messages
    run_jobs()
    assert results == [f"job-{job}"]
    assert f"Job {job} ({__name__}.tell_request) succeeded in " in caplog.text


def test_coroutine_enqueues_in_its_transaction(run_jobs: Callable[[], None]) -> None:
    deferring = add.defer_async(a=1, b=2)
    with pytest.raises(StopIteration), get_db():
        deferring.send(None)  # It awaits nothing, so it ends here.
    run_jobs()
    assert results == []


@task
async def enqueue(fails: bool) -> None:
    with get_db():
        await add.defer_async(a=1, b=2)
        if fails:
            raise RuntimeError("on purpose")


def test_coroutine_of_a_job_enqueues_in_its_transaction(
    run_jobs: Callable[[], None],
) -> None:
    enqueue.delay(fails=True)
    run_jobs()
    assert results == []
    enqueue.delay(fails=False)
    run_jobs()
    assert results == [3]


def test_job_for_later_waits(worker: Worker) -> None:
    add.configure(schedule_in={"hours": 1}).defer(a=1, b=2)
    worker.run_waiting()
    status = {"waiting": 0, "later": 1, "oldest_seconds": 0}
    assert worker.status() | status == worker.status()


def test_waiting_job_can_be_cancelled(run_jobs: Callable[[], None]) -> None:
    assert queue.job_manager.cancel_job_by_id(add.delay(1, 2))
    run_jobs()
    assert results == []


def test_failed_job_is_listed_and_can_be_requeued(app: Flask, worker: Worker) -> None:
    reject.delay(token="x" * 9999)
    worker.run_waiting()
    [(job, call)] = worker.failed().items()
    assert call.startswith("20") and '.reject {"token": "x' in call
    assert len(call) < 400
    assert worker.status()["failed"] == 1
    retried = app.test_cli_runner().invoke(args=["worker", "--retry", job])
    assert retried.output == f"Job {job} waits again\n"
    assert worker.status() | {"waiting": 1, "failed": 0} == worker.status()


def test_arguments_of_a_failed_job_are_not_logged(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    reject.delay(token="hunter2")
    worker.run_waiting()
    assert "reject[" in caplog.text
    assert "hunter2" not in caplog.text


def test_worker_has_a_connection_for_each_job(app: Flask) -> None:
    app.config["POOL_SIZE"] = 8
    found = app.test_cli_runner().invoke(args=["worker", "--concurrency", "9"])
    hint = "set it to at most POOL_SIZE (8)."
    assert found.output == f"Error: WORKER_CONCURRENCY is 9: {hint}\n"


def test_command_takes_one_option(app: Flask) -> None:
    found = app.test_cli_runner().invoke(args=["worker", "--status", "--failed"])
    assert found.output.endswith("Error: Use only one option.\n")


def test_retry_rejects_an_unknown_job(app: Flask) -> None:
    found = app.test_cli_runner().invoke(args=["worker", "--retry", "7"])
    assert found.output == "Error: No failed job has the id 7: see --failed.\n"


def test_job_is_retried_when_its_connection_was_lost(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.app.debug = True
    job = lose_the_connection.delay()
    worker.run_waiting()
    assert worker.status() | {"later": 1, "failed": 0} == worker.status()
    name = f"{__name__}.lose_the_connection"
    warning = f"Job {job} ({name}) is retried after OperationalError"
    [record] = [found for found in caplog.records if "retried" in found.message]
    assert (record.message, bool(record.exc_info)) == (warning, True)


def test_worker_waits_while_the_database_is_reset(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ConnectorException()
    error.__cause__ = UndefinedFunction()
    work = Mock(side_effect=[error, None])
    monkeypatch.setattr(engine.WorkerQueue, "run_worker", work)
    monkeypatch.setattr(engine, "RECONNECT_DELAY", 0.0)
    monkeypatch.setattr(engine.WorkerQueue, "handle_signals", Mock())
    worker.run(("--one-shot",))
    assert work.call_count == 2


def test_rejected_migration_is_one_line(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "status", Mock(side_effect=MigrationError("edited")))
    found = app.test_cli_runner().invoke(args=["worker", "--status"])
    assert (found.exit_code, found.output) == (1, "Error: edited\n")


def test_command_counts_jobs_and_workers(app: Flask) -> None:
    add.delay(1, 2)
    output = app.test_cli_runner().invoke(args=["worker", "--status"]).output
    assert output.startswith("waiting: 1\nlater: 0\nrunning: 0\nfailed: 0\noldest")
    assert output.endswith("workers: 0\n")


def test_command_passes_its_arguments_on(app: Flask, worker: Worker) -> None:
    add.delay(1, 2)
    runner = app.test_cli_runner()
    handlers = {number: getsignal(number) for number in (SIGINT, SIGTERM)}
    try:
        runner.invoke(args=["worker", "--one-shot", "--queues", "slow"])
        assert results == []
        runner.invoke(args=["worker", "--one-shot", "--concurrency", "1"])
    finally:
        for number, handler in handlers.items():
            signal(number, handler)
    assert results == [3]
