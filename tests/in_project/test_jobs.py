"""Jobs of a baked project, with workers that are killed and servers that restart."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from uuid import uuid4

import psutil
import pytest
from app.tasks import count_words
from flask import Flask
from flask_devserver import postgres
from flask_devserver.welcome import Welcome
from werkzeug.test import Client

from .brokers import Broker, RabbitMQ, Redis, Sentinel
from .core.reload_server import ROOT, poll
from .test_connections import refuse_options
from .test_faults import SETTINGS, Database
from .working import (
    TABLES,
    create_app,
    fail,
    fail_with,
    fork,
    kill_worker,
    record_last_character,
    work,
)

JOBS = int(os.environ.get("JOBS", "1000"))
CELERY = not hasattr(work, "defer")
NO_BODY = (
    b'{"headers": {"task": "tests.working.work"}, "properties": {"delivery_tag": "7",'
    b' "delivery_info": {"exchange": "", "routing_key": "app"}}}'
)
# Within which a killed worker's jobs run again, with 15 s for the start of a worker.
SECONDS = 30.0
KILLS = 10
AGAIN = (
    "(SELECT number, at - lag(at) OVER (PARTITION BY number ORDER BY at) AS after"
    " FROM runs) x"
)
# Seconds for which a server is away: at least two minutes in a long run.
OUTAGE = float(os.environ.get("OUTAGE", "1"))
VISIBILITY = 4  # seconds
# A killed worker's jobs run again sooner with these.
SOON = {"CELERY_VISIBILITY_TIMEOUT": "2", "STALLED_AFTER": "5"}
RABBITMQ = os.environ.get("BROKER") == "rabbitmq"

# A job whose worker was killed nine times.
INTERRUPTED = (
    "INSERT INTO procrastinate_events (job_id, type)"
    " SELECT id, 'aborted' FROM procrastinate_jobs, generate_series(1, 9) RETURNING id"
)
if CELERY:
    INTERRUPTED = "INSERT INTO redelivered_tasks VALUES ('{id}', 9) RETURNING id"

SCHEDULES = [["flask", "--app", "tests.scheduled", "worker"]]
if CELERY:
    celery_beat = ["celery", "--app", "tests.scheduled", "beat", "--pidfile="]
    SCHEDULES = [[*SCHEDULES[0], "--beat"], celery_beat]

celery = pytest.mark.skipif(not CELERY, reason="the broker is PostgreSQL itself")
procrastinate = pytest.mark.skipif(CELERY, reason="no job is in the database")


class Workers:
    """Processes of `flask worker`, each with an environment of its own."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.log = folder / "worker.log"
        self.environ = environ
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, *command: str, arguments: Sequence[str] = (), **environ: str
    ) -> subprocess.Popen[bytes]:
        command = command or ("flask", "--app", "tests.working", "worker")
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, *arguments],
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


@pytest.fixture(scope="module")
def server_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the PostgreSQL of all tests."""
    folder = tmp_path_factory.mktemp("jobs") / "instance" / "postgres"
    yield folder
    postgres.stop(folder)
    shutil.rmtree(folder.resolve())


@pytest.fixture
def database(server_dir: Path) -> Iterator[Database]:
    """A database of the test's own."""
    found = Database(server_dir, f"jobs_{uuid4().hex}")
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
    """The server that holds the waiting jobs."""
    return broker or database


@pytest.fixture
def settings(database: Database, broker: Broker | None) -> dict[str, str]:
    found = SETTINGS | {"DATABASE_URL": database.direct}
    if broker:
        found |= {"CELERY_BROKER_URL": broker.url}
        found |= {"CELERY_VISIBILITY_TIMEOUT": str(VISIBILITY)}
    return found


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
    found.log.touch()
    print(found.log.read_text()[-5000:])


def count(database: Database, query: str) -> int:
    [(found,)] = database.query(f"SELECT count(*) FROM {query}")
    return int(found)


def give(app: Flask, number: int, seconds: float) -> None:
    with app.app_context():
        work.delay(number, seconds)


def start_working(
    app: Flask, database: Database, workers: Workers, **environ: str
) -> subprocess.Popen[bytes]:
    """Start a worker, and wait until it has run a job."""
    worker = workers.start(**environ)
    give(app, 1, 0.0)
    assert poll(lambda: count(database, "effects") == 1)
    return worker


def status(app: Flask) -> dict[str, int]:
    with app.app_context():
        return dict(app.extensions["worker"].status())


def restart(server: Broker | Database, seconds: float) -> None:
    """Stop the server, and start it after that many `seconds`."""
    server.stop()
    time.sleep(seconds)
    server.start()


def configure(app: Flask, name: str, value: str) -> None:
    """Set a configuration parameter of the Redis."""
    with app.extensions["celery"].connection_for_write() as conn:
        conn.default_channel.client.config_set(name, value)


def all_done(app: Flask, database: Database, jobs: int = JOBS) -> bool:
    """Return whether each job left its effect, and none waits, runs or failed."""
    found = status(app)
    left = sum(found.get(name, 0) for name in ("waiting", "later", "running", "failed"))
    return count(database, "effects") == jobs and left == 0


def test_no_job_is_lost_when_processes_are_killed(
    app: Flask, database: Database, server: Broker | Database, workers: Workers
) -> None:
    random = Random(0)
    for number in range(JOBS):
        give(app, number, 0.01)
    workers.start(**SOON)
    began = time.monotonic()
    for moment in range(1, KILLS + 1):
        wanted = JOBS * moment // 12 + random.randrange(JOBS // 20)
        assert poll(lambda n=wanted: count(database, "effects") >= n), moment
        time.sleep(random.random() / 20)  # any moment will do
        workers.kill()
        if moment in (3, 7):
            server.stop()
            workers.start(**SOON)
            time.sleep(1)  # in which the worker finds nobody
            server.start()
        else:
            workers.start(**SOON)
    # No worker may have lived long enough to notice what the one before it left.
    limit = time.monotonic() - began + SECONDS
    assert poll(lambda: all_done(app, database), 2 * SECONDS)
    print(f"Of {JOBS} jobs, {count(database, 'runs') - JOBS} ran again")
    late = f"{AGAIN} WHERE after > interval '{limit} seconds'"
    assert database.query(f"SELECT number, after::text FROM {late}") == []


def test_worker_outlives_a_restart_of_its_server(
    app: Flask, database: Database, server: Broker | Database, workers: Workers
) -> None:
    worker = start_working(app, database, workers)
    for number, seconds in ((2, 1), (3, OUTAGE)):
        restart(server, seconds)
        give(app, number, 0.0)
        assert poll(lambda n=number: count(database, "effects") == n), number
    assert worker.poll() is None
    assert "psycopg.pool" not in workers.log.read_text()  # It would warn each second.


@procrastinate
def test_worker_does_without_rejected_startup_options(
    app: Flask, database: Database, workers: Workers
) -> None:
    database.proxy.refuse_startup = refuse_options
    workers.start(DATABASE_URL=database.url)
    give(app, 1, 0.0)
    assert poll(lambda: count(database, "effects") == 1, 15)


def test_worker_waits_for_migrations(
    app: Flask, database: Database, workers: Workers
) -> None:
    returned = "WHERE name = '0001_notes.sql' RETURNING name, checksum"
    [row] = database.query(f"DELETE FROM schema_migrations {returned}")
    workers.start()
    give(app, 1, 0.0)
    assert poll(lambda: "0001_notes.sql is pending" in workers.log.read_text())
    assert not poll(lambda: count(database, "runs") > 0, 4)
    database.query(f"INSERT INTO schema_migrations VALUES {row} RETURNING name")
    assert poll(lambda: count(database, "effects") == 1)


def test_worker_names_a_database_that_is_away_when_it_starts(
    app: Flask, database: Database, workers: Workers
) -> None:
    database.stop()
    try:
        workers.start()
        assert poll(lambda: "Connection refused" in workers.log.read_text())
    finally:
        database.start()
    give(app, 1, 0.0)
    assert poll(lambda: count(database, "effects") == 1, SECONDS)


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


@procrastinate
def test_worker_with_a_long_job_runs_others_after_an_outage(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start()
    give(app, 1, 30.0)
    assert poll(lambda: count(database, "runs") == 1)
    restart(database, 8)  # longer than the worker waits for a connection
    give(app, 2, 0.0)
    assert poll(lambda: count(database, "effects WHERE number = 2") == 1, 10)


def test_job_that_ends_during_an_outage_of_its_server_is_not_lost(
    app: Flask, database: Database, server: Broker | Database, workers: Workers
) -> None:
    workers.start(**SOON)
    give(app, 1, 3.0)
    assert poll(lambda: count(database, "runs") == 1)
    restart(server, 5)
    assert poll(lambda: all_done(app, database, jobs=1), 4 * SECONDS)


@procrastinate
def test_job_ends_when_its_connection_is_cut_during_the_record(
    app: Flask, database: Database, workers: Workers
) -> None:
    database.query(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN PERFORM pg_sleep(2); RETURN OLD; END';"
        " CREATE TRIGGER wait BEFORE DELETE ON procrastinate_jobs"
        " FOR EACH ROW EXECUTE FUNCTION wait(); SELECT 1"
    )
    workers.start()
    give(app, 1, 0.0)
    assert poll(lambda: database.terminate("query LIKE '%procrastinate_finish_job%'"))
    assert poll(lambda: all_done(app, database, jobs=1))
    assert count(database, "runs") == 1


def test_job_of_a_stopping_worker_is_not_taken_by_another(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = workers.start(WORKER_DEADLINE="60", **SOON)
    give(app, 1, 12.0)
    assert poll(lambda: count(database, "runs") == 1)
    worker.terminate()
    workers.start(**SOON)
    assert worker.wait(20) == 0
    assert count(database, "runs") == 1
    assert all_done(app, database, jobs=1)


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
    assert workers.log.read_text().count("_note_failed") >= 4
    with app.app_context():
        fail.delay(uuid4())
    assert poll(lambda: count(database, "failed_tasks") == 1)


def test_stopping_worker_finishes_its_job_and_takes_no_other(
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


def test_endless_job_is_interrupted_and_restarted(
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
    workers.start(**SOON)
    assert poll(lambda: count(database, "effects") == 1, SECONDS + 8)


def test_jobs_that_end_before_the_deadline_are_not_restarted(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = workers.start(WORKER_DEADLINE="3")
    for number, seconds in ((1, 1.0), (2, 60.0)):
        give(app, number, seconds)
    assert poll(lambda: count(database, "runs") == 2)
    worker.terminate()
    assert worker.wait(10) == 1
    assert count(database, "effects") == 1
    workers.start(**SOON)
    assert poll(lambda: count(database, "runs WHERE number = 2") == 2, SECONDS)
    assert count(database, "runs WHERE number = 1") == 1


def test_welcome_page_counts_the_jobs(app: Flask, settings: dict[str, str]) -> None:
    for number in range(3):
        give(app, number, 0.0)
    browser = Client(Welcome(create_app(settings | {"DEBUG": True}), "save a file"))
    host = "http://127.0.0.1"
    page = browser.get("/", host, headers={"Accept": "text/html"}).text
    assert '<dd data-figure="worker.waiting">3</dd>' in page
    figures = browser.get("/_flask_dev/status", host).json
    assert figures and figures["worker"]["waiting"] == 3
    assert "problem" not in figures


@procrastinate
def test_jobs_of_a_disconnected_worker_are_taken_over(
    app: Flask, database: Database, workers: Workers
) -> None:
    with ExitStack() as stack:
        stack.callback(database.proxy.speak)
        cut_off = workers.start(DATABASE_URL=database.url)
        for number in range(4):
            give(app, number, 3.0)
        assert poll(lambda: count(database, "runs") == 4)
        database.proxy.fall_silent()
        database.terminate()  # TCP does so when a machine is gone.
        workers.start(WORKER_CONCURRENCY="1", **SOON)
        workers.start(WORKER_CONCURRENCY="2", **SOON)
        assert poll(lambda: count(database, "effects") == 4)
    others = f"runs WHERE process <> {cut_off.pid}"
    assert count(database, others) == 4


def test_second_signal_does_not_spoil_the_end(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = workers.start()
    give(app, 1, 2.0)
    assert poll(lambda: count(database, "runs") == 1)
    for _ in range(2):
        worker.terminate()
        time.sleep(0.2)  # `uv run` and systemd send the second one at once, too.
    assert worker.wait(10) == 0
    assert all_done(app, database, jobs=1)
    assert count(database, "runs") == 1


def test_job_that_kills_its_worker_fails_alone(
    app: Flask, database: Database, workers: Workers
) -> None:
    for number in (2, 3, 4):
        give(app, number, 3.0)
    with app.app_context():
        kill_worker.delay(1)
    worker = workers.start(**SOON)

    def failed() -> bool:
        nonlocal worker
        if worker.poll() is not None:
            worker = workers.start(**SOON)
        return status(app)["failed"] == 1

    assert poll(failed, 300)
    assert count(database, "runs WHERE number = 1") == 6
    assert poll(lambda: count(database, "effects") == 3)
    assert status(app)["failed"] == 1


def test_saves_during_a_long_job_do_not_fail_it(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start(FLASK_DEBUG="1", **SOON)
    with app.app_context():
        job = work.delay(1, 3.0)
    assert poll(lambda: count(database, "runs") == 1)
    database.query(INTERRUPTED.format(id=job))
    workers.kill()  # as `flask dev` does if a job outlasts the deadline of a reload
    workers.start(FLASK_DEBUG="1", **SOON)
    assert poll(lambda: all_done(app, database, jobs=1), SECONDS)
    assert count(database, "runs") == 2


@pytest.mark.parametrize(
    "error",
    [
        "SystemExit",
        "KeyboardInterrupt",
        "MemoryError",
        "GeneratorExit",
        "StopIteration",
        "asyncio.CancelledError",
        "concurrent.futures.CancelledError",
    ],
)
def test_job_fails_with_any_error_and_the_worker_goes_on(
    app: Flask, database: Database, workers: Workers, error: str
) -> None:
    worker = workers.start()
    with app.app_context():
        for _ in range(4):  # as many as the worker has threads
            fail_with.delay(error)
    give(app, 1, 0.0)
    assert poll(lambda: count(database, "effects") == 1)
    assert poll(lambda: status(app)["failed"] == 4)
    worker.terminate()
    assert worker.wait(10) == 0


@procrastinate
def test_coroutine_that_raises_cancelled_error_fails(
    app: Flask, database: Database, workers: Workers
) -> None:
    from .retrying import cancel  # Only such a project can import it.

    worker = workers.start("flask", "--app", "tests.retrying", "worker")
    with app.app_context():
        cancel.delay(1, 0.0)
    assert poll(lambda: status(app)["failed"] == 1)
    worker.terminate()
    assert worker.wait(10) == 0


@procrastinate
def test_running_coroutine_is_aborted(
    app: Flask, database: Database, workers: Workers
) -> None:
    from app.core.jobs import queue  # Only such a project has it.

    from .retrying import cancel

    workers.start("flask", "--app", "tests.retrying", "worker")
    with app.app_context():
        job = cancel.delay(1, 60.0)
        assert poll(lambda: count(database, "runs") == 1)
        queue.job_manager.cancel_job_by_id(job, abort=True)
    aborted = "procrastinate_jobs WHERE status = 'aborted'"
    assert poll(lambda: count(database, aborted) == 1, 20)


def test_process_that_a_job_forks_ends_at_sigterm(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start()
    give(app, 1, 6.0)
    assert poll(lambda: count(database, "runs") == 1)
    with app.app_context():
        fork.delay(2)
    # The handler of the worker would end it after the deadline, which is 10 seconds.
    assert poll(lambda: count(database, "effects WHERE number = 2") == 1, 5)
    assert poll(lambda: all_done(app, database, jobs=2))
    assert count(database, "runs") == 2


@procrastinate
def test_job_that_was_retried_often_is_requeued_when_its_worker_is_killed(
    app: Flask, database: Database, workers: Workers
) -> None:
    from .retrying import fail_slowly  # Only such a project can import it.

    command = ["flask", "--app", "tests.retrying", "worker"]
    workers.start(*command, **SOON)
    with app.app_context():
        fail_slowly.delay(1, failures=7)
    assert poll(lambda: count(database, "runs") == 8, SECONDS)
    workers.kill()
    workers.start(*command, **SOON)
    assert poll(lambda: count(database, "runs") == 9, SECONDS)
    assert status(app)["failed"] == 0


@procrastinate
def test_retried_job_fails_when_another_with_its_queueing_lock_waits(
    app: Flask, database: Database, workers: Workers
) -> None:
    from .retrying import fail_slowly  # Only such a project can import it.

    workers.start("flask", "--app", "tests.retrying", "worker")
    locks = {"lock": "one", "queueing_lock": "one"}
    with app.app_context():
        fail_slowly.configure(**locks).defer(number=1, failures=1)
        assert poll(lambda: count(database, "runs") == 1)
        fail_slowly.configure(**locks).defer(number=2, failures=0)
    assert poll(lambda: count(database, "runs WHERE number = 2") == 1)
    assert status(app) | {"running": 1, "failed": 1} == status(app)


@celery
def test_job_whose_process_is_killed_is_listed_as_failed(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start(arguments=["--pool", "prefork"])
    with app.app_context():
        kill_worker.delay(1)
    assert poll(lambda: status(app)["failed"] == 1, SECONDS)


@celery
@pytest.mark.parametrize("options", [{"priority": 6}, {"queue": "slow"}], ids=str)
def test_jobs_of_other_priorities_and_queues_are_not_slower(
    app: Flask, database: Database, workers: Workers, options: dict[str, object]
) -> None:
    with app.app_context():
        for number in range(100):
            work.apply_async([number, 0.0], **options)
    workers.start(arguments=["--queues", "app,slow"])
    assert poll(lambda: count(database, "effects") > 0)
    assert poll(lambda: count(database, "effects") == 100, 5)


@celery
def test_jobs_that_were_interrupted_once_run_side_by_side(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start()
    for number in range(4):
        give(app, number, 3.0)
    assert poll(lambda: count(database, "runs") == 4)
    workers.kill()
    workers.start()
    assert poll(lambda: count(database, "effects") == 4)
    together = "(SELECT max(at) - min(at) AS within FROM runs GROUP BY process) x"
    # One after the other, they would take 9 seconds.
    assert count(database, f"{together} WHERE within < interval '6 seconds'") == 2
    assert count(database, "redelivered_tasks") == 0


@celery
def test_job_that_a_killed_worker_has_just_taken_is_not_lost(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = start_working(app, database, workers)
    psutil.Process(worker.pid).suspend()  # It takes a job, and reads it no more.
    give(app, 2, 0.0)
    workers.kill()
    workers.start()
    assert poll(lambda: count(database, "effects") == 2)


@celery
@pytest.mark.skipif(RABBITMQ, reason="Sentinel is for Redis")
def test_job_that_a_killed_worker_took_by_sentinel_is_not_lost(
    app: Flask, broker: Broker, database: Database, tmp_path: Path, workers: Workers
) -> None:
    sentinel = Sentinel(tmp_path, broker.port)
    command = ["flask", "--app", "tests.watched", "worker"]
    try:
        worker = workers.start(*command, CELERY_BROKER_URL=sentinel.url)
        give(app, 1, 0.0)
        assert poll(lambda: count(database, "effects") == 1)
        psutil.Process(worker.pid).suspend()
        give(app, 2, 0.0)
        time.sleep(0.3)  # in which Redis responds to the worker
        workers.kill()
        workers.start(*command, CELERY_BROKER_URL=sentinel.url)
        assert poll(lambda: count(database, "effects") == 2)
    finally:
        workers.kill()
        sentinel.stop()


@celery
def test_worker_that_stops_without_a_signal_fails(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = start_working(app, database, workers)
    app.extensions["celery"].control.shutdown()
    assert worker.wait(10) == 1
    assert "Error: No signal stopped the worker" in workers.log.read_text()


@celery
def test_worker_outlives_a_failover_of_its_broker(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = start_working(app, database, workers)
    with app.extensions["celery"].connection_for_write() as conn:
        client = conn.default_channel.client
        client.replicaof("127.0.0.1", 1)
        assert poll(lambda: "read only replica" in workers.log.read_text())
        client.replicaof("no", "one")
    give(app, 2, 0.0)
    assert poll(lambda: count(database, "effects") == 2, SECONDS)
    assert worker.poll() is None


@celery
def test_second_broker_of_a_list_is_used_while_the_first_one_is_away(
    app: Flask, broker: Broker, database: Database, workers: Workers
) -> None:
    second = broker.url.replace("//127", "//default:any@127")
    url = f"{broker.url.replace(str(broker.port), '1')};{second}"
    workers.start(CELERY_BROKER_URL=url)
    app.config["CELERY_BROKER_URL"] = url
    give(app, 1, 0.0)
    assert poll(lambda: count(database, "effects") == 1, SECONDS)


@celery
@pytest.mark.skipif(RABBITMQ, reason="it sends the jobs of a lost connection again")
def test_jobs_of_a_lost_connection_run_once_and_in_time(
    app: Flask, database: Database, server: Broker | Database, workers: Workers
) -> None:
    hour = {"CELERY_VISIBILITY_TIMEOUT": "3600"}
    worker = start_working(app, database, workers, **hour)
    give(app, 2, 4.0)  # ends while the broker is away
    give(app, 3, 20.0)  # ends after the worker has a new connection
    assert poll(lambda: count(database, "runs") == 3)
    with app.app_context():
        work.apply_async([4, 0.0], countdown=10)
    assert poll(lambda: status(app)["waiting"] == 0)
    assert status(app)["unacknowledged"] == 3
    restart(server, 5)
    assert poll(lambda: count(database, "effects") == 4, 2 * SECONDS)
    assert poll(lambda: status(app)["unacknowledged"] == 0)
    assert count(database, "runs") == 4
    assert worker.poll() is None


@celery
@pytest.mark.parametrize("entry", [b"\xff", b"", b"7", b"{}", NO_BODY], ids=ascii)
def test_entry_that_is_not_a_job_is_put_aside(
    app: Flask, database: Database, workers: Workers, entry: bytes
) -> None:
    worker = start_working(app, database, workers)
    with app.extensions["celery"].connection_for_write() as conn:
        client = conn.default_channel.client
        client.lpush("app", entry)
        give(app, 2, 0.0)
        assert poll(lambda: count(database, "effects") == 2, SECONDS)
        assert client.lrange("app.invalid", 0, -1) == [entry]
    assert worker.poll() is None
    assert "An entry that is not a job is now in app.invalid" in workers.log.read_text()


@celery
def test_argument_with_half_of_an_emoji_is_accepted(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start()
    with app.app_context():
        record_last_character.delay('\\u \\\\ " caf\ud83d')
    assert poll(lambda: count(database, "effects WHERE number = 55357") == 1)
    assert all_done(app, database, jobs=1)


@celery
@pytest.mark.skipif(RABBITMQ, reason="it has no limit of its memory")
def test_job_is_kept_while_neither_its_broker_nor_the_database_accepts_it(
    app: Flask, database: Database, workers: Workers
) -> None:
    start_working(app, database, workers, **SOON)
    give(app, 2, 3.0)
    assert poll(lambda: count(database, "runs") == 2)
    configure(app, "maxmemory", "1")
    database.stop()
    retrying = "Retrying a job of tests.working.work in"
    assert poll(lambda: retrying in workers.log.read_text())
    time.sleep(4)  # until the worker has given up its attempts
    configure(app, "maxmemory", "0")
    database.start()
    workers.start(**SOON)  # The other one may have ended.
    assert poll(lambda: count(database, "effects") == 2, 2 * SECONDS)


@celery
def test_job_whose_result_cannot_be_stored_fails_and_others_run(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start(RESULT_BACKEND="redis://127.0.0.1:1/0")
    for number in range(5):  # one more than run at the same time
        give(app, number, 0.0)
    assert poll(lambda: count(database, "failed_tasks") == 5, SECONDS)
    assert count(database, "effects") == 5
    assert poll(lambda: status(app).get("unacknowledged", 0) == 0)


@celery
@pytest.mark.skipif(RABBITMQ, reason="it has no such settings")
def test_jobs_of_a_full_broker_run(
    app: Flask, broker: Broker, database: Database, workers: Workers
) -> None:
    for number in range(3):
        give(app, number, 1.0)
    configure(app, "maxmemory", "1")
    workers.start()
    assert poll(lambda: count(database, "effects") == 3, SECONDS)
    command = workers.start("flask", "--app", "tests.working", "worker", "--status")
    assert command.wait(60) == 1
    *_, line = workers.log.read_text().splitlines()
    assert line.startswith("Error: ") and "when used memory > 'maxmemory'" in line
    configure(app, "maxmemory", "0")
    assert poll(lambda: status(app)["unacknowledged"] == 0)


@celery
@pytest.mark.skipif(RABBITMQ, reason="it has no such settings")
def test_worker_outlives_a_broker_that_rejects_writes(
    app: Flask, database: Database, workers: Workers
) -> None:
    worker = start_working(app, database, workers)
    give(app, 2, 3.0)
    assert poll(lambda: count(database, "runs") == 2)
    configure(app, "min-replicas-to-write", "1")
    assert poll(lambda: "NOREPLICAS" in workers.log.read_text())
    assert poll(lambda: count(database, "effects") == 2)
    configure(app, "min-replicas-to-write", "0")
    give(app, 3, 0.0)
    assert poll(lambda: count(database, "effects") == 3, SECONDS)
    assert poll(lambda: status(app)["unacknowledged"] == 0)
    assert worker.poll() is None


@celery
@pytest.mark.skipif(RABBITMQ, reason="it has no list of unacknowledged jobs")
def test_responses_of_workers_are_not_jobs(
    app: Flask, database: Database, workers: Workers
) -> None:
    start_working(app, database, workers)
    command = ["celery", "--app", "app.worker", "inspect", "ping"]
    ping = workers.start(*command)
    assert ping.wait(60) == 0
    assert status(app)["unacknowledged"] == 0


@celery
def test_message_in_another_format_is_listed_as_failed(
    app: Flask, database: Database, workers: Workers
) -> None:
    start_working(app, database, workers)
    with app.app_context():
        job = work.apply_async([2, 0.0], serializer="pickle")
    assert poll(lambda: count(database, f"failed_tasks WHERE id = '{job.id}'") == 1)


@celery
def test_task_of_link_error_has_a_context(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start()
    with app.app_context():
        fail.apply_async([1], link_error=work.si(1, 0.0))
    assert poll(lambda: count(database, "effects") == 1)


@celery
def test_database_of_version_0_1_is_migrated(app: Flask, database: Database) -> None:
    database.query(
        "DROP TABLE redelivered_tasks;"
        " UPDATE schema_migrations SET name = '0002_failed_tasks.sql'"
        " WHERE name = 'celery.sql';"
        " INSERT INTO failed_tasks (id, name, args, kwargs)"
        " VALUES ('7', 'work', '\"[1]\"', '\"{}\"') RETURNING id"
    )
    output = app.test_cli_runner().invoke(args=["migrate"]).output
    assert "Applied celery.sql\n" in output
    with app.app_context():
        [call] = app.extensions["worker"].failed().values()
    assert call.endswith(" work [1] {}")
    assert count(database, "redelivered_tasks") == 0


@celery
def test_jobs_outlast_an_outage_of_the_database(
    app: Flask, database: Database, workers: Workers
) -> None:
    for number in range(20):
        give(app, number, 0.01)
    with app.app_context():
        fail.delay("\0")
    database.stop()
    workers.start()
    time.sleep(max(OUTAGE, 8))  # in which each job is retried several times
    database.start()
    assert poll(lambda: count(database, "effects") == 20, 90)
    assert poll(lambda: count(database, "failed_tasks") == 1, 90)


@celery
@pytest.mark.parametrize("seconds", [2.5 * VISIBILITY, 0.0], ids=["long", "later"])
def test_job_runs_once_however_long_it_takes_or_waits(
    app: Flask, database: Database, workers: Workers, seconds: float
) -> None:
    for _ in range(2):
        workers.start()
    later = datetime.now(UTC) + timedelta(seconds=2.5 * VISIBILITY - seconds)
    with app.app_context():
        work.apply_async([1, seconds], eta=later)
    assert poll(lambda: count(database, "effects") == 1, 5 * VISIBILITY)
    time.sleep(VISIBILITY)  # Nothing is to happen.
    assert count(database, "runs") == 1


@celery
def test_job_for_later_keeps_its_time_when_its_worker_stops(
    app: Flask, database: Database, workers: Workers
) -> None:
    hour = {"CELERY_VISIBILITY_TIMEOUT": "3600"}
    worker = start_working(app, database, workers, **hour)
    with app.app_context():
        work.apply_async([2, 0.0], countdown=6)
    assert poll(lambda: status(app)["waiting"] == 0)
    worker.terminate()
    assert worker.wait(10) == 0
    workers.start(**hour)
    assert poll(lambda: count(database, "effects") == 2)


@celery
def test_job_for_later_keeps_its_time_when_its_worker_gets_sighup(
    app: Flask, database: Database, workers: Workers
) -> None:
    hour = {"CELERY_VISIBILITY_TIMEOUT": "3600"}
    worker = start_working(app, database, workers, **hour)
    with app.app_context():
        work.apply_async([2, 0.0], countdown=6)
    assert poll(lambda: status(app)["waiting"] == 0)
    worker.send_signal(signal.SIGHUP)
    worker.wait(20)  # Celery restarts only a worker that was started by a script.
    workers.start(**hour)
    assert poll(lambda: count(database, "effects") == 2)
    assert "No signal stopped the worker" not in workers.log.read_text()


@celery
def test_silent_broker_costs_a_request_ten_seconds_at_most(
    app: Flask, broker: Broker, database: Database
) -> None:
    from kombu.exceptions import OperationalError  # Only such a project has it.

    give(app, 1, 0.0)
    server = psutil.Process(broker.process.pid)
    processes = [server, *server.children(recursive=True)]
    for each in processes:
        each.suspend()
    try:
        began = time.monotonic()
        with pytest.raises(OperationalError):
            give(app, 2, 0.0)
        assert time.monotonic() - began < 10
    finally:
        for each in processes:
            each.resume()


@procrastinate
def test_stalled_job_that_cannot_be_requeued_blocks_no_other(
    app: Flask, database: Database, workers: Workers
) -> None:
    with app.app_context():
        for number, lock in enumerate(["one", None]):
            work.configure(queueing_lock=lock).defer(number=number, seconds=0.0)
        database.query("UPDATE procrastinate_jobs SET status = 'doing' RETURNING 1")
        later = {"hours": 1}
        work.configure(queueing_lock="one", schedule_in=later).defer(
            number=2, seconds=0
        )
    workers.start()
    # A job writes its effect before the worker records that the job is done.
    done = {"failed": 1, "later": 1, "running": 0, "waiting": 0}
    assert poll(lambda: status(app).items() >= done.items())
    assert count(database, "effects WHERE number = 1") == 1
    assert "lost its worker and is now failed" in workers.log.read_text()


@procrastinate
def test_busy_worker_whose_connections_were_cut_keeps_its_jobs(
    app: Flask, database: Database, workers: Workers
) -> None:
    url = database.direct.replace("127.0.0.1", "localhost")
    workers.start(DATABASE_URL=url, WORKER_CONCURRENCY="2")
    for number in range(2):
        give(app, number, 12.0)
    assert poll(lambda: count(database, "runs") == 2)
    idle = "application_name = 'app' AND state = 'idle'"
    database.query(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {idle}"
    )
    workers.start(STALLED_AFTER="8")
    assert poll(lambda: count(database, "effects") == 2, SECONDS + 30)
    assert poll(lambda: status(app)["running"] == 0)
    assert count(database, "runs") == 2


def test_engines_own_command_runs_jobs(
    app: Flask, database: Database, workers: Workers
) -> None:
    if CELERY:
        command = ["celery", "--app", "app.worker", "worker", "--pool", "threads"]
    else:
        command = ["procrastinate", "--app", "app.worker.queue", "worker"]
    worker = workers.start(*command)
    database.query("INSERT INTO notes (body) VALUES ('two words') RETURNING id")
    with app.app_context():
        count_words.delay(1)
    assert poll(lambda: "Note 1 has 2 words" in workers.log.read_text())
    worker.terminate()
    assert worker.wait(10) == 0


def test_engines_own_command_needs_no_settings_in_development(
    database: Database,
) -> None:
    names = {"DATABASE_URL", "CELERY_BROKER_URL", "SECRET_KEY"}
    environ = {k: v for k, v in os.environ.items() if k not in names}
    command = "procrastinate --app app.worker.queue healthchecks"
    if CELERY:
        command = "celery --app app.worker purge --force"
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("beat", SCHEDULES, ids=" ".join)
def test_schedule_enqueues_each_job_once(
    tmp_path: Path, app: Flask, database: Database, workers: Workers, beat: list[str]
) -> None:
    worker = ["flask", "--app", "tests.scheduled", "worker"]
    file = ["--schedule", str(tmp_path / "beat")] if CELERY else []
    workers.start(*worker)
    scheduler = workers.start(*beat, arguments=file)
    assert poll(lambda: count(database, "runs") >= 6)
    children = psutil.Process(scheduler.pid).children(recursive=True)
    [(distinct, runs, seconds)] = database.query(
        "SELECT count(DISTINCT number), count(*),"
        " extract(epoch FROM max(at) - min(at))::float FROM runs"
    )
    assert runs <= 1.25 * seconds + 2  # It is due every second.
    assert CELERY or distinct == runs
    workers.kill()
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_worker_passes_the_options_of_the_engine_on(
    app: Flask, database: Database, workers: Workers
) -> None:
    workers.start(arguments=["--queues", "slow"])
    with app.app_context():
        work.delay(1, 0.0)
        if CELERY:
            work.apply_async([2, 0.0], queue="slow")
        else:
            work.configure(queue="slow").defer(number=2, seconds=0.0)
    assert poll(lambda: count(database, "effects") == 1)
    assert count(database, "effects WHERE number = 2") == 1
    assert status(app)["waiting"] == 1


def test_worker_without_permission_ends_with_a_sentence(
    app: Flask, database: Database, workers: Workers
) -> None:
    table = "failed_tasks" if CELERY else "procrastinate_jobs"
    database.query(f"REVOKE ALL ON {table} FROM dev; SELECT 1")
    commands: list[list[str]] = [["--failed"], ["--status"]]
    for arguments in commands if CELERY else [*commands, []]:
        worker = workers.start(arguments=arguments)
        assert worker.wait(60) == 1
    log = workers.log.read_text()
    assert log.count("Error: permission denied for table") == 2 + (not CELERY)
    assert "Traceback" not in log


@celery
@pytest.mark.parametrize(
    "url",
    [
        "nonsense://u:hunter2@h",
        "redis://u:hunter2@h:port",
        "redis://u:hunter2/x@h",
        "redis://u:x@hunter2/y@h:1/0",
    ],
)
def test_invalid_url_of_the_broker_ends_with_a_sentence(
    workers: Workers, url: str
) -> None:
    worker = workers.start(CELERY_BROKER_URL=url)
    assert worker.wait(60) != 0
    log = workers.log.read_text()
    assert "CELERY_BROKER_URL is invalid: write a URL like" in log
    assert "Traceback" not in log and "hunter2" not in log
