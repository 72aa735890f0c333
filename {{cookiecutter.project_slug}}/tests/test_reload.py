"""Reloading: the new version answers, and nothing of the old one is left."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from psycopg2.extensions import connection

from .live import (
    DEV,
    DEV_WITHOUT_FORK,
    RUN,
    Server,
    processes_connected,
    sleeping,
)


@pytest.fixture(params=[RUN, DEV, DEV_WITHOUT_FORK], ids=" ".join)
def server(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str
) -> Iterator[Server]:
    command = request.param
    with Server(tmp_path, command=command, DATABASE_URL=database_url) as server:
        yield server


def test_ten_reloads_leave_nothing_behind(server: Server, db: connection) -> None:
    for _ in range(10):
        old = server.answer()["process"]
        new = server.reload()["process"]
        assert new != old
        assert not psutil.pid_exists(old)
        # Not the old process, and not the parent of both, which only watches.
        server.wait_for(partial(connects_only, db, new), "end of other connections")
    assert server.unexpected() == []


def test_port_is_free_after_the_stop(server: Server, db: connection) -> None:
    server.reload()
    server.interrupt()
    assert server.port_is_free()
    server.wait_for(lambda: not processes_connected(db), "end of the connections")
    assert server.unexpected() == []


def test_syntax_error_is_repaired_by_the_next_save(server: Server) -> None:
    good = server.module.read_text()
    server.save(good + "\ndef broken(:\n")
    server.wait_for(lambda: "SyntaxError" in server.log, "syntax error")
    server.save(good)
    server.reload()


def test_query_of_a_slow_request_does_not_outlive_the_reload(
    server: Server, db: connection
) -> None:
    server.request_in_background("/query")
    server.wait_for(lambda: sleeping(db), "query")
    new = server.reload()["process"]
    server.wait_for(lambda: not sleeping(db), "end of the query")
    server.wait_for(partial(connects_only, db, new), "end of other connections")
    assert server.unexpected() == []


def test_open_transaction_is_rolled_back_by_the_reload(
    server: Server, db: connection
) -> None:
    server.request_in_background("/transaction")
    server.wait_for(lambda: sleeping(db), "transaction")
    server.reload()
    server.wait_for(lambda: not sleeping(db), "end of the transaction")
    with db.cursor() as cursor:
        cursor.execute("SELECT body FROM notes")
        assert cursor.fetchall() == []
    assert server.unexpected() == []


def connects_only(db: connection, process: int) -> bool:
    return processes_connected(db) <= {process}
