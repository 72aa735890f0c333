import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from inspect import signature
from queue import Queue
from tempfile import SpooledTemporaryFile
from threading import Event, Lock, Thread, Timer
from typing import Any
from unittest.mock import Mock

import pytest
from flask import Flask, current_app
from psycopg2.extensions import connection
from werkzeug.datastructures import FileStorage

from {{ cookiecutter.project_slug }}.core.db import get_db
from {{ cookiecutter.project_slug }}.core.jobs import QueueFull, Worker, task
from {{ cookiecutter.project_slug }}.core.log import TEXT, RequestIdFilter
from {{ cookiecutter.project_slug }}.core.serve import STOP_TIMEOUT

from .application import create_app
from .reload_server import _free_port, poll, sleeping

SETTINGS = {"TESTING": True, "WORKER_QUEUE_SIZE": 2, "WORKER_TIMEOUT": 0.1}
SETTINGS |= {"WORKER_DEADLINE": 0.1}

results: Queue[Any] = Queue()
gate = Event()


@task
def add(a: int, b: int) -> int:
    results.put(a + b)
    return a + b


@task
def add_all(numbers: list[int]) -> None:
    results.put(sum(numbers))


@task
def wait_at_the_gate() -> None:
    results.put("waiting")
    gate.wait(10)


@task
def fail(error: BaseException) -> None:
    raise error


@task
def use_database() -> None:
    results.put((current_app.name, get_db().info.backend_pid))


@task
def write_and_sleep() -> None:
    with get_db() as db, db.cursor() as cursor:
        cursor.execute("INSERT INTO items (body) VALUES ('unfinished')")
        cursor.execute("SELECT pg_sleep(60)")


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    app = create_app(SETTINGS | {"DATABASE_URL": database_url})
    gate.clear()
    with app.app_context():
        yield app
    gate.set()
    app.extensions["worker"].stop()


def test_task_is_still_a_function(app: Flask) -> None:
    assert add(1, b=2) == 3
    assert results.get_nowait() == 3


def test_task_describes_itself_as_its_function() -> None:
    assert (add.__name__, list(signature(add).parameters)) == ("add", ["a", "b"])  # type: ignore[attr-defined]


def test_enqueued_task_runs(app: Flask) -> None:
    add.delay(1, b=2)
    assert results.get(timeout=10) == 3


@task
def add_twice(a: int, b: int) -> None:
    add.delay(a, b)
    add.delay(a, b)


def test_run_jobs_runs_what_jobs_enqueue(
    app: Flask, run_jobs: Callable[[], None]
) -> None:
    add_twice.delay(1, 2)
    run_jobs()
    assert [results.get_nowait(), results.get_nowait()] == [3, 3]


def test_option_is_rejected() -> None:
    with pytest.raises(TypeError, match="^@task has time_limit, but a thread has no"):
        task(time_limit=5)


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


def test_task_starts_once_the_transaction_is_committed(app: Flask) -> None:
    with get_db():
        add.delay(1, 2)
        assert app.extensions["worker"].thread is None
    assert results.get(timeout=10) == 3


def test_delay_copies_the_arguments(app: Flask) -> None:
    numbers = [1, 2]
    with get_db():
        add_all.delay(numbers)
        numbers.append(3)
    assert results.get(timeout=10) == 3


def test_delay_rejects_arguments_that_do_not_fit(app: Flask) -> None:
    unchecked: Any = add
    with pytest.raises(TypeError, match="missing a required argument: 'b'"):
        unchecked.delay(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "thing", [Lock(), FileStorage(SpooledTemporaryFile())], ids=["lock", "file"]
)
def test_delay_rejects_what_cannot_be_copied(app: Flask, thing: object) -> None:
    message = "^An argument of fail cannot be copied .*: pass ids, text or bytes.$"
    with pytest.raises(TypeError, match=message), get_db() as db:
        db.cursor().execute("INSERT INTO items (body) VALUES ('unfinished')")
        fail.delay(RuntimeError(thing))
    with get_db().cursor() as cursor:
        cursor.execute("SELECT FROM items")
        assert cursor.rowcount == 0


def test_task_of_a_transaction_that_is_rolled_back_never_runs(app: Flask) -> None:
    with pytest.raises(RuntimeError), get_db():
        add.delay(1, 2)
        raise RuntimeError
    assert app.extensions["worker"].thread is None


def test_thread_starts_with_the_first_task_and_is_a_daemon(app: Flask) -> None:
    worker = app.extensions["worker"]
    assert worker.thread is None
    add.delay(1, 2)
    assert results.get(timeout=10) == 3
    assert isinstance(worker.thread, Thread)
    assert worker.thread.daemon


def test_task_has_a_context_of_its_own(app: Flask) -> None:
    mine = get_db().info.backend_pid
    use_database.delay()
    name, backend = results.get(timeout=10)
    assert name == app.name
    assert backend != mine


def test_task_is_logged_with_the_id_of_its_request(
    app: Flask, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.post("/fail")
    def ask() -> str:
        fail.delay(RuntimeError("on purpose"))
        add.delay(1, 2)
        return "asked"

    monkeypatch.setattr(caplog.handler, "formatter", logging.Formatter(TEXT))
    monkeypatch.setattr(caplog.handler, "filters", [RequestIdFilter()])
    caplog.set_level(logging.INFO)
    app.test_client().post("/fail", headers={"X-Request-ID": "mine"})
    assert results.get(timeout=10) == 3
    assert "Task fail failed [mine]" in caplog.text
    line = re.compile(r"Task add succeeded in \d+\.\d ms \[mine\]")
    assert poll(lambda: bool(line.search(caplog.text)))


@pytest.mark.parametrize("error", [RuntimeError("on purpose"), SystemExit(1)])
def test_failed_task_is_logged_and_the_next_one_runs(
    app: Flask, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    fail.delay(error)
    add.delay(1, 2)
    assert results.get(timeout=10) == 3
    assert "Task fail failed" in caplog.text
    assert repr(error).split("(")[0] in caplog.text


def test_thread_that_could_not_start_starts_with_the_next_task(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", Mock(side_effect=RuntimeError("no thread")))
        with pytest.raises(RuntimeError, match="no thread"):
            add.delay(1, 2)
    add.delay(3, 4)
    assert results.get(timeout=10) == 7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_handler_of_the_log_that_raises_stops_no_task(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.logger, "exception", Mock(side_effect=OSError))
    fail.delay(RuntimeError("on purpose"))
    app.extensions["worker"].run_waiting()
    app.extensions["worker"].thread.join()
    add.delay(1, 2)
    assert results.get(timeout=10) == 3


@pytest.mark.parametrize(("reloads", "deadline"), [("true", 0.0), ("", 0.1)])
def test_only_a_server_that_reloads_gives_jobs_no_time(
    app: Flask, monkeypatch: pytest.MonkeyPatch, reloads: str, deadline: float
) -> None:
    monkeypatch.setenv("WERKZEUG_RUN_MAIN", reloads)
    app.debug = True
    assert Worker(app).deadline == deadline


def test_full_queue_is_an_error_that_names_the_settings(app: Flask) -> None:
    wait_at_the_gate.delay()
    assert results.get(timeout=10) == "waiting"
    add.delay(1, 2)
    add.delay(3, 4)
    message = "^add found no place in the queue in 0.1 s: raise WORKER_QUEUE_SIZE"
    with pytest.raises(QueueFull, match=message):
        add.delay(5, 6)
    gate.set()
    assert [results.get(timeout=10), results.get(timeout=10)] == [3, 7]


def test_status_counts_waiting_and_running_jobs(app: Flask) -> None:
    worker = app.extensions["worker"]
    assert worker.status() == {"waiting": 0, "running": 0}
    wait_at_the_gate.delay()
    assert results.get(timeout=10) == "waiting"
    add.delay(1, 2)
    assert worker.status() == {"waiting": 1, "running": 1}
    gate.set()
    assert results.get(timeout=10) == 3
    assert poll(lambda: worker.status() == {"waiting": 0, "running": 0})


def test_stop_waits_for_waiting_and_running_tasks(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    worker = app.extensions["worker"]
    worker.deadline = 10.0
    wait_at_the_gate.delay()
    assert results.get(timeout=10) == "waiting"
    fail.delay(RuntimeError("on purpose"))
    add.delay(1, 2)
    Timer(0.2, gate.set).start()
    worker.stop()
    assert results.get_nowait() == 3
    assert "Task fail failed" in caplog.text
    assert "lost at exit" not in caplog.text


def test_stop_of_a_full_queue_loses_only_late_tasks(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    wait_at_the_gate.delay()
    assert results.get(timeout=10) == "waiting"
    add.delay(1, 2)
    add.delay(3, 4)
    app.extensions["worker"].stop()
    assert "Jobs lost at exit: wait_at_the_gate, add, add\n" in caplog.text


def test_stop_names_lost_tasks(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    wait_at_the_gate.delay()
    assert results.get(timeout=10) == "waiting"
    add.delay(1, b=2)
    app.extensions["worker"].stop()
    add.delay(3, b=4)
    assert "Jobs lost at exit: wait_at_the_gate, add\n" in caplog.text
    assert "Jobs lost at exit: add\n" in caplog.text
    assert results.empty()


def test_stop_cuts_off_a_query_and_rolls_it_back(
    app: Flask, db: connection, caplog: pytest.LogCaptureFixture
) -> None:
    write_and_sleep.delay()
    assert poll(lambda: sleeping(db))
    app.extensions["worker"].stop()
    assert not app.extensions["worker"].thread.is_alive()
    assert "Jobs lost at exit: write_and_sleep" in caplog.text
    assert poll(lambda: not sleeping(db))
    with db.cursor() as cursor:
        cursor.execute("SELECT FROM items")
        assert cursor.rowcount == 0


def test_server_is_not_killed_before_its_jobs_have_had_their_time(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.config.update(WORKER_DEADLINE=60.0, TESTING=False)
    server = Mock()
    monkeypatch.setattr("granian.Granian", server)
    args = ["serve", "--port", str(_free_port())]
    app.test_cli_runner().invoke(args=args, catch_exceptions=False)
    assert server.call_args.kwargs["workers_kill_timeout"] == STOP_TIMEOUT + 60


def test_stop_without_a_task_is_silent(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    app.extensions["worker"].stop()
    assert caplog.text == ""
