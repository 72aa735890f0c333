"""Jobs of a baked project, with workers that are killed and servers that restart."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from uuid import uuid4

import pytest
from flask import Flask
from flask_devserver.welcome import Welcome
from werkzeug.test import Client

from .brokers import Broker, RabbitMQ, Redis
from .core.reload_server import ROOT, poll
from .test_faults import SETTINGS, Database
from .working import TABLES, create_app, fail, work

JOBS = int(os.environ.get("JOBS", "1000"))
CELERY = not hasattr(work, "defer")
SECONDS = 30.0  # within which the jobs of a killed worker are taken up again
KILLS = 10
AGAIN = (
    "(SELECT at - lag(at) OVER (PARTITION BY number ORDER BY at) AS after FROM runs) x"
)
RABBITMQ = os.environ.get("BROKER") == "rabbitmq"
# Kombu takes a task off Redis' list before it notes that the task is not acknowledged,
# and so loses one when its worker is killed just then.
MAY_BE_LOST = KILLS if CELERY and not RABBITMQ else 0

celery = pytest.mark.skipif(not CELERY, reason="the broker is PostgreSQL itself")
procrastinate = pytest.mark.skipif(CELERY, reason="no job is in the database")


class Workers:
    """Processes of `flask worker`, each with an environment of its own."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.log = folder / "worker.log"
        self.environ = environ
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, **environ: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flask", "--app", "tests.working", "worker"],
                cwd=ROOT,
                env=os.environ | self.environ | environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = Database(tmp_path / "instance" / "postgres")
    yield found
    found.proxy.end()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker | None]:
    if CELERY:
        found = RabbitMQ(tmp_path) if RABBITMQ else Redis(tmp_path)
        yield found
        found.stop()
    else:
        yield None


@pytest.fixture
def server(database: Database, broker: Broker | None) -> Broker | Database:
    """What the jobs wait at."""
    return broker or database


@pytest.fixture
def settings(database: Database, broker: Broker | None) -> dict[str, str]:
    found = SETTINGS | {"DATABASE_URL": database.direct}
    return found | ({"CELERY_BROKER_URL": broker.url} if broker else {})


@pytest.fixture
def app(settings: dict[str, str], database: Database) -> Iterator[Flask]:
    app = create_app(settings | {"TESTING": True})
    app.test_cli_runner().invoke(args=["migrate"], catch_exceptions=False)
    database.query(TABLES + "SELECT 1")
    yield app
    app.extensions["pool"].close()


@pytest.fixture
def workers(tmp_path: Path, app: Flask, settings: dict[str, str]) -> Iterator[Workers]:
    found = Workers(tmp_path, settings)
    yield found
    found.kill()
    print(found.log.read_text()[-5000:])


def count(database: Database, query: str) -> int:
    [(found,)] = database.query(f"SELECT count(*) FROM {query}")
    return int(found)


def give(app: Flask, number: int, seconds: float) -> None:
    with app.app_context():
        work.delay(number, seconds)


def status(app: Flask) -> dict[str, int]:
    with app.app_context():
        return dict(app.extensions["worker"].status())


def restart(server: Broker | Database, seconds: float) -> None:
    """Stop the server, and start it after so many seconds."""
    server.stop()
    time.sleep(seconds)
    server.start()


def all_done(app: Flask, database: Database) -> bool:
    """Say whether each job has left its effect, and none waits, runs or has failed."""
    found = status(app)
    left = sum(found.get(name, 0) for name in ("waiting", "later", "running", "failed"))
    return count(database, "effects") == JOBS and left == 0


def test_no_job_is_lost_whoever_is_killed(
    app: Flask, database: Database, server: Broker | Database, workers: Workers
) -> None:
    random = Random(0)
    for number in range(JOBS):
        give(app, number, 0.01)
    workers.start()
    for moment in range(1, KILLS + 1):
        wanted = JOBS * moment // 12 + random.randrange(JOBS // 20)
        assert poll(lambda n=wanted: count(database, "effects") >= n), moment
        time.sleep(random.random() / 20)  # any moment will do
        workers.kill()
        if moment in (3, 7):
            server.stop()
            workers.start()
            time.sleep(1)  # in which the worker finds nobody
            server.start()
        else:
            workers.start()
    poll(lambda: all_done(app, database), 2 * SECONDS)
    lost = JOBS - count(database, "effects")
    assert lost <= MAY_BE_LOST
    found = status(app)
    assert found | {"waiting": 0, "running": 0, "failed": 0} == found
    late = count(database, f"{AGAIN} WHERE after > interval '{SECONDS} seconds'")
    twice = count(database, "runs") - JOBS + lost
    print(f"Of {JOBS} jobs {lost} were lost, {twice} ran twice, {late} of them late")
    assert late == 0


def test_worker_outlives_a_restart_of_its_server(
    app: Flask, database: Database, server: Broker | Database, workers: Workers
) -> None:
    worker = workers.start()
    give(app, 1, 0.0)
    assert poll(lambda: count(database, "effects") == 1)
    for number in (2, 3):
        restart(server, 1)
        give(app, number, 0.0)
        assert poll(lambda n=number: count(database, "effects") == n), number
    assert worker.poll() is None


def test_worker_with_a_job_outlives_a_restart_of_its_server(
    app: Flask, database: Database, server: Broker | Database, workers: Workers
) -> None:
    worker = workers.start()
    give(app, 1, 8.0)
    assert poll(lambda: count(database, "runs") == 1)
    restart(server, 2)
    for number in (2, 3, 4):
        give(app, number, 0.0)
    others = "effects WHERE number > 1"
    assert poll(lambda: count(database, others) == 3, 7)  # while the first one runs
    assert poll(lambda: count(database, "effects") == 4, SECONDS + 8)
    assert worker.poll() is None


@celery
def test_failures_that_cannot_be_noted_do_not_stop_the_worker(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start()
    database.query("ALTER TABLE failed_tasks RENAME TO elsewhere; SELECT 1")
    with app.app_context():
        for _ in range(4):
            fail.delay(uuid4())
    give(app, 1, 0.0)
    assert poll(lambda: count(database, "effects") == 1)
    database.query("ALTER TABLE elsewhere RENAME TO failed_tasks; SELECT 1")
    assert workers.log.read_text().count("could not be noted") == 4
    with app.app_context():
        fail.delay(uuid4())
    assert poll(lambda: count(database, "failed_tasks") == 1)


def test_end_of_a_worker_waits_for_its_job_and_takes_no_other(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = workers.start(WORKER_CONCURRENCY="1")
    for number in range(3):
        give(app, number, 1.5)
    assert poll(lambda: count(database, "runs") == 1)
    worker.terminate()
    assert worker.wait(10) == 0
    assert count(database, "effects") == count(database, "runs") == 1
    assert poll(lambda: status(app)["waiting"] == 2)


def test_job_that_does_not_end_is_cut_off_and_begun_again(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = workers.start(WORKER_DEADLINE="1")
    give(app, 1, 8.0)
    assert poll(lambda: count(database, "runs") == 1)
    worker.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert worker.wait(10) == 1
    assert time.monotonic() - start < 7  # the job would take 8 s
    assert count(database, "effects") == 0
    workers.start()
    assert poll(lambda: count(database, "effects") == 1, SECONDS + 8)


def test_welcome_page_counts_the_jobs(app: Flask, settings: dict[str, str]) -> None:
    for number in range(3):
        give(app, number, 0.0)
    browser = Client(Welcome(create_app(settings | {"DEBUG": True}), "save a file"))
    page = browser.get("/", headers={"Accept": "text/html"}).text
    assert '<dd data-figure="worker.waiting">3</dd>' in page
    figures = browser.get("/_flask_dev/status").json
    assert figures and figures["worker"]["waiting"] == 3
    assert "problem" not in figures


@procrastinate
def test_worker_that_is_cut_off_from_the_database_is_relieved_by_others(
    app: Flask, database: Database, workers: Workers
) -> None:
    with ExitStack() as stack:
        stack.callback(database.proxy.speak)
        cut_off = workers.start(DATABASE_URL=database.url)
        for number in range(4):
            give(app, number, 3.0)
        assert poll(lambda: count(database, "runs") == 4)
        database.proxy.fall_silent()
        workers.start(WORKER_CONCURRENCY="1")
        workers.start(WORKER_CONCURRENCY="2")
        assert poll(lambda: count(database, "effects") == 4, SECONDS + 40)
    others = f"runs WHERE process <> {cut_off.pid}"
    assert count(database, others) == 4
