"""Reloading: the new version responds, and nothing of the old one is left."""

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest
from psycopg2.extensions import connection

from .reload_server import (
    COMMANDS,
    DEV,
    RELOADS,
    Server,
    connects_only,
    constant_requests,
    has_backend,
    processes_connected,
    sleeping,
)

MEBIBYTE = 1024 * 1024

pytestmark = pytest.mark.reload


@pytest.fixture(params=COMMANDS, ids=" ".join)
def server(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str
) -> Iterator[Server]:
    command = request.param
    with Server(tmp_path, command=command, DATABASE_URL=database_url) as server:
        yield server


def test_many_reloads_leave_nothing_behind(server: Server, db: connection) -> None:
    server.wait_for(partial(has_imported, server, "psycopg2"), "import of the packages")
    server.wait_for(partial(has_settled, server), "end of the imports")
    with constant_requests(server):
        for number in range(RELOADS):
            old = server.answer()["process"]
            new = server.reload()["process"]
            assert new != old
            assert not psutil.pid_exists(old)
            # Neither the old process nor the parent of both may be connected.
            server.wait_for(partial(connects_only, db, new), "end of other connections")
            if number == RELOADS // 2:
                memory, others = used_memory(server), used_descriptors(server)
    assert used_memory(server) - memory < 4 * MEBIBYTE
    # It may still read from the previous process.
    server.wait_for(lambda: used_descriptors(server) <= others, "closed pipe")
    assert server.process.num_threads() <= 2
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


def test_failing_requests_leave_no_transaction_open(
    server: Server, db: connection
) -> None:
    for _ in range(20):
        with pytest.raises(HTTPError, match="500"):
            server.request("/failure")
    idle = "state LIKE 'idle in transaction%'"
    server.wait_for(lambda: not has_backend(db, idle), "end of the transactions")


def test_open_transaction_is_rolled_back_by_the_reload(
    server: Server, db: connection
) -> None:
    server.request_in_background("/transaction")
    server.wait_for(lambda: sleeping(db), "transaction")
    server.reload()
    server.wait_for(lambda: not sleeping(db), "end of the transaction")
    with db.cursor() as cursor:
        cursor.execute("SELECT body FROM items")
        assert cursor.fetchall() == []
    assert server.unexpected() == []


def has_imported(server: Server, package: str) -> bool:
    """Return whether the watching process has imported a package, if it forks."""
    if server.command != DEV or sys.platform != "linux":
        return True
    return any(package in each.path for each in server.process.memory_maps())


def has_settled(server: Server) -> bool:
    """Return whether the memory of the watching process stays the same for a second."""
    before = used_memory(server)
    time.sleep(1)
    return used_memory(server) == before


def used_memory(server: Server) -> int:
    """Return the bytes of memory that the watching process uses."""
    return int(server.process.memory_info().rss)


def used_descriptors(server: Server) -> int:
    """Return how many files and sockets the watching process has open."""
    if sys.platform == "win32":
        return int(server.process.num_handles())
    return int(server.process.num_fds())
