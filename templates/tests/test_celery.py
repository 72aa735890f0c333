import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import celery
import pytest
from celery.contrib.testing.worker import start_worker
from celery.utils.log import get_task_logger
from flask import Flask, current_app
from kombu.utils.json import dumps

from {{ cookiecutter.project_slug }}.core.config import ConfigError
from {{ cookiecutter.project_slug }}.core.db import get_db
from {{ cookiecutter.project_slug }}.core.engine import Worker
from {{ cookiecutter.project_slug }}.core.jobs import get_celery, task
from {{ cookiecutter.project_slug }}.core.log import request_id
from {{ cookiecutter.project_slug }}.core.worker import get_worker

from .application import create_app
from .reload_server import poll

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
def add_all(numbers: list[int]) -> None:
    results.append(sum(numbers))


@task
def use_database() -> None:
    results.append((current_app.name, get_db().info.backend_pid))


@task
def tell_request() -> None:
    results.append(request_id.get())


@task
def log_a_line() -> None:
    get_task_logger(__name__).info("told by a task")


@task(bind=True)
def tell_job(self: Any, a: int) -> None:
    results.append((self.request.id, a))


@task(autoretry_for=(OSError,), max_retries=1, default_retry_delay=0)
def fail_to_connect() -> None:
    raise OSError


@task(autoretry_for=(OSError,), max_retries=1, default_retry_delay=0)
def empty_and_fail(values: list[int]) -> None:
    results.append(len(values))
    values.clear()
    raise OSError


@task(bind=True, max_retries=1, default_retry_delay=0)
def retry_again(self: Any, secret: str) -> None:
    raise self.retry()


@task(bind=True, autoretry_for=(OSError,), retry_backoff=True)
def fail_once(self: Any) -> None:
    if not self.request.retries:
        raise OSError
    results.append("retried")


@task
def fail(value: object) -> None:
    raise RuntimeError("on purpose")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@task
def raise_unprintable() -> None:
    raise Unprintable


@task
def use_closed_cursor() -> None:
    cursor = get_db().cursor()
    cursor.close()
    cursor.execute("SELECT 1")


@task
def query_slowly() -> None:
    get_db().cursor().execute("SET statement_timeout = 1; SELECT pg_sleep(1)")


@task
def lose_a_deadlock() -> None:
    get_db().cursor().execute("DO $$BEGIN RAISE 'no' USING ERRCODE = '40P01'; END$$")


@task
def write_after_a_failover() -> None:
    cursor = get_db().cursor()
    cursor.execute("SET default_transaction_read_only = on")
    cursor.execute("CREATE TABLE never (a int)")


@task
def write_in_a_read_only_session() -> None:
    get_db().set_session(readonly=True)
    get_db().cursor().execute("CREATE TABLE never (a int)")


@task
def lose_the_connection() -> None:
    cursor = get_db().cursor()
    try:
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    finally:
        cursor.execute("SELECT 1")  # It raises that the cursor is closed.


@pytest.fixture(autouse=True)
def context(app: Flask) -> Iterator[None]:
    results.clear()
    with app.app_context():
        yield


@pytest.fixture
def worker(app: Flask) -> Worker:
    return get_worker()


def waiting() -> int:
    with get_celery().connection_for_read() as conn:
        channel: Any = conn.default_channel
        return int(channel.queue_declare(current_app.name).message_count)


def test_task_is_still_a_function() -> None:
    mine = get_db().info.backend_pid
    assert add(1, b=2) == 3
    use_database()
    assert results[1] == (current_app.name, mine)


def test_task_is_the_engines_own() -> None:
    assert isinstance(add, celery.Task)
    assert add.s(1, 2).apply().get() == 3


def test_enqueued_task_runs(run_jobs: Callable[[], None]) -> None:
    add.delay(1, b=2)
    assert results == []
    run_jobs()
    assert results == [3]


def test_run_jobs_runs_what_jobs_enqueue(run_jobs: Callable[[], None]) -> None:
    add_twice.delay(1, 2)
    run_jobs()
    assert results == [3, 3]


def test_run_jobs_runs_a_chain(run_jobs: Callable[[], None]) -> None:
    (add.s(1, 2) | add.s(4)).apply_async()
    run_jobs()
    assert results == [3, 7]


def test_task_of_another_base_has_a_context(app: Flask) -> None:
    class Base(celery.Task[Any, Any]):
        def on_success(self, *args: object) -> None:
            results.append("success")

    task(base=Base, name="based")(use_database.run).delay()
    with start_worker(get_celery(), perform_ping_check=False):
        assert poll(lambda: "success" in results)
    assert results[0][0] == app.name


def test_result_is_stored_in_a_backend(app: Flask) -> None:
    get_celery().conf.update(result_backend=lambda: "cache+memory://")
    job = add.delay(1, 2)
    with start_worker(get_celery(), perform_ping_check=False):
        assert job.get(timeout=10) == 3


def test_delay_returns_the_id_of_the_job(run_jobs: Callable[[], None]) -> None:
    job = tell_job.delay(1).id
    run_jobs()
    assert results == [(job, 1)]


@pytest.mark.parametrize("arguments", [[{1, 2}, 3], [1]], ids=str)
def test_delay_rejects_arguments_before_the_commit(
    worker: Worker, arguments: list[Any]
) -> None:
    with pytest.raises(TypeError), get_db() as db:
        db.cursor().execute("INSERT INTO items (body) VALUES ('unfinished')")
        add.delay(*arguments)
    with get_db().cursor() as cursor:
        cursor.execute("SELECT FROM items")
        assert cursor.rowcount == 0
    assert waiting() == 0


def test_delay_copies_the_arguments(run_jobs: Callable[[], None]) -> None:
    numbers = [1, 2]
    with get_db():
        add_all.delay(numbers)
        numbers.append(3)
    run_jobs()
    assert results == [3]


async def wait() -> None:
    pass


def count() -> Iterator[int]:
    yield 1


async def count_slowly() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("function", [wait, count, count_slowly])
def test_function_that_is_not_plain_is_rejected(function: Callable[..., Any]) -> None:
    message = f"^Task {function.__name__} is a coroutine or generator.*: write a plain"
    with pytest.raises(TypeError, match=message):
        task(function)


@pytest.mark.parametrize("option", ["time_limit", "soft_time_limit", "queue"])
def test_option_that_has_no_effect_is_rejected(option: str) -> None:
    with pytest.raises(TypeError, match=f"^Task print has {option}, "):
        task(**{option: 5})(print)


def test_task_is_sent_once_the_transaction_is_committed(worker: Worker) -> None:
    with get_db():
        add.delay(1, 2)
        assert waiting() == 0
    assert waiting() == 1


def test_task_is_not_sent_when_the_transaction_is_rolled_back(worker: Worker) -> None:
    with pytest.raises(RuntimeError), get_db():
        add.delay(1, 2)
        raise RuntimeError
    assert waiting() == 0


def test_environment_does_not_replace_the_broker(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    add.delay(1, 2)
    assert waiting() == 1


def test_projects_on_one_broker_do_not_share_jobs(
    worker: Worker, broker_url: str, run_jobs: Callable[[], None]
) -> None:
    add.delay(1, 2)
    other = celery.Celery("other", broker=broker_url, set_as_current=False)
    other.send_task("other.tasks.work")
    assert waiting() == 1
    before = worker.status()["unacknowledged"]
    with other.connection_for_read() as conn:
        assert other.amqp.queues["celery"](conn.default_channel).get()
        assert worker.status()["unacknowledged"] == before
    run_jobs()
    assert results == [3]
    other.control.purge()


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
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app.add_url_rule("/tell", view_func=lambda: tell_request.delay().id)
    job = app.test_client().get("/tell").text
    assert f"Enqueued job {job}: {__name__}.tell_request" in caplog.messages
    with start_worker(get_celery(), perform_ping_check=False):
        line = f"Job {job} ({__name__}.tell_request) succeeded in "
        assert poll(lambda: line in caplog.text)
    assert results == [f"job-{job}"]


def test_lines_of_celerys_own_logger_reach_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log_a_line.delay()
    with start_worker(get_celery(), perform_ping_check=False):
        assert poll(lambda: "told by a task" in caplog.messages)
    handlers = logging.getLogger("celery.task").handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]


def test_eager_task_keeps_the_id_of_the_request(app: Flask) -> None:
    get_celery().conf.task_always_eager = True
    app.add_url_rule("/tell", view_func=lambda: tell_request.delay().id)
    app.test_client().get("/tell", headers={"X-Request-ID": "mine"})
    assert results == ["mine"]


@pytest.mark.parametrize(
    "value",
    ["\0", float("nan"), "\ud800", [1], "x" * 9999],
    ids=["nul", "nan", "surrogate", "list", "long"],
)
def test_failed_job_is_listed_and_can_be_sent_again(
    app: Flask, worker: Worker, run_jobs: Callable[[], None], value: object
) -> None:
    job = fail.delay(value).id
    run_jobs()
    [(id, call)] = worker.failed().items()
    assert id == job
    assert f"{__name__}.fail [" in call
    assert call.startswith("20") and call.endswith(" 'RuntimeError: on purpose'")
    assert len(call) < 400
    retried = app.test_cli_runner().invoke(args=["worker", "--retry", id])
    assert retried.output == f"Job {id} waits again\n"
    assert (waiting(), worker.failed()) == (1, {})


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (raise_unprintable, "<exception str() failed>"),
        (use_closed_cursor, "cursor already closed"),
        (query_slowly, "due to statement timeout"),
        (write_in_a_read_only_session, "in a read-only transaction"),
    ],
)
def test_error_that_is_not_an_outage_is_listed(
    worker: Worker, job: Any, error: str
) -> None:
    job.delay()
    with start_worker(get_celery(), perform_ping_check=False):
        [call] = poll(worker.failed).values()
    assert error in call


@pytest.mark.parametrize(
    "job", [lose_a_deadlock, lose_the_connection, write_after_a_failover]
)
def test_outage_is_retried_without_limit(
    worker: Worker, caplog: pytest.LogCaptureFixture, job: Any
) -> None:
    job.delay()
    line = f"Retrying a job of {job.name} in 2 s: "
    with start_worker(get_celery(), perform_ping_check=False):
        assert poll(lambda: line in caplog.text)
    assert worker.failed() == {}


def test_run_jobs_runs_a_retry(run_jobs: Callable[[], None]) -> None:
    fail_once.delay()
    run_jobs()
    assert results == ["retried"]


def test_jobs_of_a_routed_queue_are_counted_and_run(
    app: Flask, worker: Worker, run_jobs: Callable[[], None]
) -> None:
    slow = f"{app.name}.slow"
    get_celery().conf.update(task_routes={add.name: {"queue": slow}})
    before = worker.status()["waiting"]
    add.delay(1, 2)
    assert worker.status()["waiting"] == before + 1
    run_jobs()
    assert results == [3]


def test_run_jobs_runs_what_another_queue_enqueues(
    app: Flask, run_jobs: Callable[[], None]
) -> None:
    routes = {add_twice.name: {"queue": f"{app.name}.slow"}}
    get_celery().conf.update(task_routes=routes)
    add_twice.delay(1, 2)
    run_jobs()
    assert results == [3, 3]


def test_worker_runs_every_routed_queue(app: Flask, worker: Worker) -> None:
    get_celery().conf.update(task_routes={add.name: {"queue": "slow"}})
    queues = worker.get_ready().amqp.queues
    assert {*queues.consume_from} == {app.name, "slow"}
    queues.select(["slow"])
    assert {*queues.consume_from} == {"slow"}


def test_router_that_needs_arguments_does_not_stop_the_worker(worker: Worker) -> None:
    def route(name: str, args: list[int], *rest: object, **options: object) -> str:
        return f"queue{args[0]}"

    get_celery().conf.update(task_routes=[route])
    assert {*worker.get_ready().amqp.queues.consume_from} == {current_app.name}
    assert worker.status()["waiting"] == 0


def test_retry_names_the_error_in_the_log(
    run_jobs: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    job = fail_to_connect.delay().id
    run_jobs()
    name = f"{__name__}.fail_to_connect"
    assert f"Job {job} ({name}) is retried after OSError" in caplog.messages


def test_retry_gets_the_arguments_as_they_were_sent(
    run_jobs: Callable[[], None], worker: Worker
) -> None:
    job = empty_and_fail.delay([1, 2]).id
    run_jobs()
    assert results == [2, 2]  # the first run, and one retry
    assert "[[1, 2]]" in worker.failed()[job]


def test_last_retry_quotes_no_argument(
    run_jobs: Callable[[], None], worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    job = retry_again.delay("hunter2").id
    run_jobs()
    assert "All retries have failed" in worker.failed()[job]
    assert "All retries have failed" in caplog.text
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


def test_unknown_task_is_listed_as_failed(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    get_celery().send_task("removed", ["hunter2"], task_id="7")
    with start_worker(get_celery(), perform_ping_check=False):
        [(id, call)] = poll(worker.failed).items()
    assert id == "7" and call.endswith(' removed ["hunter2"] {}')
    assert "unregistered task of type 'removed'" in caplog.text
    assert "hunter2" not in caplog.text


def test_status_counts_a_message_without_a_time(worker: Worker) -> None:
    with get_celery().connection_for_write() as conn:
        queue = conn.SimpleQueue(current_app.name)
        queue.put({})
        queue.close()
    assert worker.status() | {"waiting": 1, "failed": 0} == worker.status()


SENT = time.time() - 60


@pytest.mark.parametrize(
    ("entry", "sent"),
    [
        (b"\xff", None),
        (b"7", None),
        (b"{}", None),
        (b'{"sent_at": 1.2.3}', 1),
        (dumps({"headers": {"sent_at": SENT}}), SENT),
    ],
    ids=["bytes", "number", "empty", "broken", "job"],
)
def test_status_accepts_an_entry_that_is_not_a_job(
    worker: Worker, entry: object, sent: float | None
) -> None:
    with get_celery().connection_for_write() as conn:
        channel: Any = conn.default_channel
        channel.client.lpush(current_app.name, entry)
    status = worker.status()
    assert status["waiting"] == 1
    waited = time.time() - sent if sent else 0.0
    assert abs(status["oldest_seconds"] - waited) < 30


def test_status_has_the_time_of_the_oldest_job_of_any_priority(worker: Worker) -> None:
    with get_celery().connection_for_write() as conn:
        channel: Any = conn.default_channel
        queue = channel._q_for_pri(current_app.name, 6)
        channel.client.lpush(queue, dumps({"headers": {"sent_at": SENT}}))
    assert abs(worker.status()["oldest_seconds"] - (time.time() - SENT)) < 30


@pytest.mark.parametrize(
    "url",
    [
        "redis://:12#34@host/0",
        "redis://:12?34@host/0",
        "other+socket:///34.sock",
        "redis://host/name12",
    ],
)
def test_invalid_url_of_the_broker_is_not_quoted(database_url: str, url: str) -> None:
    settings = {"DATABASE_URL": database_url, "CELERY_BROKER_URL": url}
    with pytest.raises(ConfigError) as caught:
        create_app({"TESTING": True, **settings})
    assert "CELERY_BROKER_URL is invalid" in str(caught.value)
    assert "12" not in str(caught.value) and "34" not in str(caught.value)


def test_broker_may_listen_on_a_unix_socket(database_url: str) -> None:
    url = "redis+socket:///tmp/x.sock"
    settings = {"DATABASE_URL": database_url, "CELERY_BROKER_URL": url}
    app = create_app({"TESTING": True, **settings})
    with app.app_context(), get_celery().connection_for_write() as conn:
        assert conn.as_uri() == url


def test_command_does_not_show_the_password_of_the_broker(database_url: str) -> None:
    broker = "redis://:hunter2@127.0.0.1:1/0"
    settings = {"DATABASE_URL": database_url, "CELERY_BROKER_URL": broker}
    app = create_app({"TESTING": True, **settings})
    with app.app_context():
        found = app.test_cli_runner().invoke(args=["worker", "--status"])
    assert found.exit_code == 1 and found.output.startswith("Error: ")
    assert "hunter2" not in found.output
