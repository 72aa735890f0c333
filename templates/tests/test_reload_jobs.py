"""Reloading with a worker beside the server: a job runs once, or leaves nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg2.extensions import connection

from .reload_server import (
    COMMANDS,
    RELOADS,
    ROOT,
    Server,
    constant_requests,
    poll,
    processes_connected,
    sleeping,
)

pytestmark = pytest.mark.reload

WITH_WORKER = [(*command, "--with", "worker") for command in COMMANDS[1:]]
AS_ROOT = "ignore:You're running the worker with superuser"


@pytest.fixture(params=WITH_WORKER, ids=" ".join)
def server(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str
) -> Iterator[Server]:
    shutil.copy(ROOT / ".flaskenv", tmp_path)
    app, command = "tests.core.reload_app_tasks", request.param
    environ = {"DATABASE_URL": database_url, "PYTHONWARNINGS": AS_ROOT}
    environ["WORKER_CONCURRENCY"] = "1"  # It runs one job at a time.
    with Server(tmp_path, app, command, **environ) as server:
        yield server


def test_each_job_runs_once_across_reloads(server: Server, db: connection) -> None:
    numbers = [str(1000 + number) for number in range(5 * RELOADS)]
    with constant_requests(server):
        for number in numbers:
            server.request(f"/tasks/{number}/0.01", "POST")
            if number.endswith(("0", "5")):
                server.reload()
            # The server, and never two generations of the worker.
            assert len(processes_connected(db)) <= 2
    server.wait_for(lambda: len(ran(db)) >= len(numbers), "end of the jobs")
    assert ran(db) == [f"task {number}" for number in numbers]
    lines = server.unexpected()
    assert [line for line in lines if "Warm shutdown" not in line] == []


@pytest.mark.parametrize("server", WITH_WORKER[:1], indirect=True, ids=" ".join)
def test_next_worker_waits_for_the_end_of_the_previous_one(
    server: Server, db: connection
) -> None:
    # The job takes longer than the start of a worker.
    server.request("/tasks/1/3.0", "POST")
    server.wait_for(lambda: sleeping(db), "job")
    server.request("/tasks/2/0.0", "POST")
    server.save_version()
    server.wait_for(lambda: "task 2" in ran(db), "second job")
    assert ran(db) == ["task 1", "task 2"]


def test_interrupted_job_leaves_nothing(server: Server, db: connection) -> None:
    server.request("/tasks/1/60.0", "POST")
    server.wait_for(lambda: sleeping(db), "job")
    server.reload()
    server.wait_for(lambda: not sleeping(db), "end of the job")
    assert ran(db) == []
    server.wait_for(lambda: "flask worker did not exit" in server.log, "line")


@pytest.mark.parametrize("server", WITH_WORKER[:1], indirect=True, ids=" ".join)
def test_interrupted_job_is_restarted(server: Server, db: connection) -> None:
    server.request("/tasks/1/60.0", "POST")
    server.wait_for(lambda: sleeping(db), "job")
    server.reload()
    server.wait_for(lambda: not sleeping(db), "end of the job")
    assert poll(lambda: sleeping(db), 40), server.log


def test_nothing_outlives_the_server(server: Server, db: connection) -> None:
    server.request("/tasks/1/60.0", "POST")
    server.wait_for(lambda: sleeping(db), "job")
    family = server.process.children(recursive=True)
    server.process.kill()
    assert poll(lambda: not any(each.is_running() for each in family))
    assert poll(lambda: not processes_connected(db))


def ran(db: connection) -> list[str]:
    with db.cursor() as cursor:
        cursor.execute("SELECT body FROM items ORDER BY body")
        return [body for (body,) in cursor.fetchall()]
