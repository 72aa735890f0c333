"""Reloading with a worker: a task runs once, or leaves nothing and is named."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from psycopg2.extensions import connection

from .reload_server import (
    COMMANDS,
    RELOADS,
    Server,
    connects_only,
    constant_requests,
    sleeping,
)

pytestmark = pytest.mark.reload


@pytest.fixture(params=COMMANDS, ids=" ".join)
def server(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str
) -> Iterator[Server]:
    app, command = "tests.core.reload_app_tasks", request.param
    with Server(tmp_path, app, command, DATABASE_URL=database_url) as server:
        yield server


def test_each_task_runs_once_across_reloads(server: Server, db: connection) -> None:
    tasks = [f"task {number}" for number in range(5)]
    for task in tasks:
        server.request(f"/tasks/{task[5:]}/0.0", "POST")
        server.wait_for(partial(has_run, db, task), task)
        server.reload()
    assert ran(db) == tasks
    assert server.unexpected() == []


@pytest.mark.parametrize("server", COMMANDS[1:], indirect=True, ids=" ".join)
def test_each_of_many_tasks_has_run_or_is_named(server: Server, db: connection) -> None:
    with constant_requests(server):
        for number in range(RELOADS):
            for task in range(5):
                server.request(f"/tasks/{number}{task}/0.01", "POST")
            server.reload()
    lost = server.unexpected()
    assert all("Jobs lost at exit: record" in line for line in lost)
    assert len(ran(db)) == len(set(ran(db)))
    # If a job is aborted while the server commits it, it is named although it has run.
    named = sum(line.count("record") for line in lost)
    assert 5 * RELOADS <= len(ran(db)) + named <= 6 * RELOADS


def test_running_task_is_rolled_back_and_named(server: Server, db: connection) -> None:
    old = server.request("/tasks/1/60.0", "POST")["process"]
    server.request("/tasks/2/0.0", "POST")
    server.wait_for(lambda: sleeping(db), "task")
    new = server.reload()["process"]
    assert not psutil.pid_exists(old)
    server.wait_for(partial(connects_only, db, new), "end of the connection")
    assert ran(db) == []
    [line] = server.unexpected()
    assert line.endswith("Jobs lost at exit: record, record")


def has_run(db: connection, task: str) -> bool:
    return task in ran(db)


def ran(db: connection) -> list[str]:
    with db.cursor() as cursor:
        cursor.execute("SELECT body FROM items ORDER BY body")
        return [body for (body,) in cursor.fetchall()]
