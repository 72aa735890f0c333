"""Connections of a baked project under load and through faults, on its server.

These tests run in a baked project with each pool.
"""

import json
import os
import re
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any, Self
from urllib.parse import urlsplit

import psutil
import psycopg2
import pytest
from app.core import pool
from app.core.migrate import migrate
from flask_devserver import postgres

from .core.reload_server import _free_port, poll
from .proxy import Proxy

ROOT = Path(__file__).parents[1]
POOLED = "POOL_SIZE" in pool.SETTINGS
SECONDS = float(os.environ.get("SECONDS", "20"))  # of the soak
SIZE = 4
SETTINGS = {"SECRET_KEY": "0123456789abcdef" * 2, "TRUSTED_HOSTS": "127.0.0.1"}
SETTINGS["FLASK_DEBUG"] = "0"  # .flaskenv has 1
SLEEPING = "wait_event = 'PgSleep'"

pooled = pytest.mark.skipif(not POOLED, reason="needs a pool")


class Database:
    """A database on a PostgreSQL that tests stop and start, and a proxy to it."""

    def __init__(self, folder: Path, name: str = "faults") -> None:
        self.folder = folder
        self.name = name
        self.direct = postgres.ensure_database(folder, name)
        port = urlsplit(self.direct).port
        assert port
        self.proxy = Proxy("127.0.0.1", port)
        options = "?connect_timeout=2"
        self.url = self.direct.replace(f":{port}/", f":{self.proxy.port}/") + options

    def stop(self) -> None:
        postgres.stop(self.folder)

    def start(self) -> None:
        assert postgres.ensure_database(self.folder, self.name) == self.direct

    def query(self, query: str) -> list[Any]:
        with closing(psycopg2.connect(self.direct)) as conn, conn.cursor() as cursor:
            conn.autocommit = True
            cursor.execute(query)
            return cursor.fetchall()

    def backends(self, condition: str = "true") -> list[int]:
        """Return the ids of the application's backends."""
        return self._of_backends("pid", condition)

    def terminate(self, condition: str = "true") -> int:
        """Terminate the application's backends, and return their number."""
        return len(self._of_backends("pg_terminate_backend(pid, 5000)", condition))

    def _of_backends(self, what: str, condition: str) -> list[Any]:
        query = (
            f"SELECT {what} FROM pg_stat_activity WHERE application_name = 'app'"
            f" AND datname = current_database() AND {condition}"
        )
        return [found for (found,) in self.query(query)]


class Server:
    """The application on the production server, with settings of its own."""

    prefix: tuple[str, ...] = ()

    def __init__(self, folder: Path, url: str, *options: str, **environ: str) -> None:
        self.port = _free_port()
        self.log = folder / "server.log"
        settings = {**SETTINGS, "DATABASE_URL": url, "POOL_SIZE": str(SIZE)}
        self.output = self.log.open("w")
        self.process = psutil.Popen(
            [*self.prefix, sys.executable, "-m", *self.command(), *options],
            cwd=Path(__file__).parents[1],
            env=os.environ | settings | environ,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )

    def command(self) -> list[str]:
        """Return the command that starts one worker with 8 threads."""
        options = ["--port", str(self.port), "--workers", "1", "--threads", "8"]
        return ["flask", "--app", "tests.served", "serve", *options]

    def __enter__(self) -> Self:
        assert poll(self.responds), self.log.read_text()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)
        self.output.close()
        print(self.log.read_text())

    def responds(self) -> bool:
        try:
            return self.get("/healthz")[0] == 200
        except OSError:
            return False

    def get(self, path: str, **headers: str) -> tuple[int, Any, Any]:
        """Return status, body and headers of the response, within 20 seconds."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=20)) as conn:
            conn.request("GET", path, headers=headers)
            response = conn.getresponse()
            body = response.read()
            kind = response.headers.get_content_type()
            found = json.loads(body) if kind == "application/json" else body
            return response.status, found, response.headers

    def send(self, request: bytes) -> str:
        """Send raw bytes, and return the start of the response."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as conn:
            conn.sendall(request)
            return conn.recv(4096).decode("latin1")

    def get_all(self, paths: list[str], threads: int) -> list[tuple[int, Any, Any]]:
        """Return the responses in the order of the paths."""
        with ThreadPoolExecutor(threads) as executor:
            return list(executor.map(self.get, paths))


class Gunicorn(Server):
    """The application on gunicorn, which forks an application that is in use."""

    def command(self) -> list[str]:
        """Return the command that forks three workers from one application."""
        options = ["--bind", f"127.0.0.1:{self.port}", "--threads", "8", "--preload"]
        return ["gunicorn", *options, "--workers", "3", "tests.served:app"]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    folder = tmp_path_factory.mktemp("faults") / "instance" / "postgres"
    database = Database(folder)
    with closing(psycopg2.connect(database.direct)) as conn:
        conn.autocommit = True
        migrate(conn, ROOT / "app" / "migrations")
    yield database
    database.proxy.end()
    database.stop()
    shutil.rmtree(folder.resolve())


@pytest.fixture
def server(tmp_path: Path, database: Database) -> Iterator[Server]:
    with Server(tmp_path, database.url) as server:
        yield server
    assert "InterfaceError" not in server.log.read_text()


@pooled
def test_requests_beyond_pool_size_wait_then_get_503(
    tmp_path: Path, database: Database
) -> None:
    with Server(tmp_path, database.url, POOL_TIMEOUT="1") as server:
        responses = server.get_all(["/sleep/3.0"] * 8, threads=8)
        statuses = Counter(status for status, _, _ in responses)
        assert statuses == {200: SIZE, 503: 8 - SIZE}
        assert all(h["Retry-After"] == "1" for s, _, h in responses if s == 503)
        lines = [line for line in server.log.read_text().splitlines() if line]
        named = f"raise POOL_SIZE ({SIZE}) or return connections sooner."
        assert sum(named in line for line in lines) == 8 - SIZE
        responses = server.get_all(["/sleep/0.2"] * 8, threads=8)
        assert {status for status, _, _ in responses} == {200}
        took_long = r"It took \d+ ms to get a connection"
        assert re.search(took_long, server.log.read_text())


def test_killed_idle_connections_fail_no_request(
    server: Server, database: Database
) -> None:
    statuses: Counter[int] = Counter()
    ended = 0
    for _ in range(20):
        responses = server.get_all(["/value/1"] * 50, threads=4)
        statuses.update(status for status, _, _ in responses)
        ended += database.terminate()
        # The final messages of the server have arrived, too.
        assert poll(lambda: not database.proxy.clients)
    assert statuses == {200: 1000}
    assert ended >= 20 or not POOLED


def test_outage_gives_503_until_the_server_is_back(
    server: Server, database: Database
) -> None:
    server.get_all(["/value/1"] * 20, threads=4)
    for _ in range(3):
        database.stop()
        responses = [timed(server.get, "/value/1") for _ in range(10)]
        database.start()
        assert {status for status, _ in responses} == {503}
        assert max(seconds for _, seconds in responses) < 5
        assert server.get("/value/1")[0] == 200


@pytest.mark.parametrize(
    "disconnect",
    [
        lambda database: database.terminate(SLEEPING),
        lambda database: database.proxy.reset(),
    ],
    ids=["by-server", "in-transit"],
)
def test_interrupted_query_gives_503(
    server: Server, database: Database, disconnect: Callable[[Database], Any]
) -> None:
    with ThreadPoolExecutor(1) as thread:
        response = thread.submit(server.get, "/sleep/20.0")
        assert poll(lambda: database.backends(SLEEPING))
        disconnect(database)
        assert response.result()[0] == 503
    assert server.get("/value/1")[0] == 200


def test_forked_processes_share_no_connection(
    tmp_path: Path, database: Database
) -> None:
    with Gunicorn(tmp_path, database.url, USE_BEFORE_FORK="1") as server:
        paths = [f"/value/{number}" for number in range(600)]
        responses = server.get_all(paths, threads=12)
    assert [status for status, _, _ in responses] == [200] * 600
    assert [body["value"] for _, body, _ in responses] == list(range(600))
    used = {(body["backend"], body["process"]) for _, body, _ in responses}
    assert len({process for _, process in used}) == 3
    assert len(used) == len({backend for backend, _ in used})


@pytest.mark.parametrize(
    "what", ["transaction", "session", "cursor", "failure", "failure_in_with"]
)
def test_next_request_gets_a_clean_connection(
    server: Server, database: Database, what: str
) -> None:
    as_new = server.get("/found")
    for _ in range(20):
        status, _, _ = server.get(f"/leave/{what}")
        assert status == (500 if "failure" in what else 200)
        assert server.get("/found")[:2] == as_new[:2]
    idle = "state LIKE 'idle in transaction%'"
    assert poll(lambda: database.backends(idle) == [])


@pooled
def test_pool_reset_undoes_changes_of_a_session(
    tmp_path: Path, database: Database
) -> None:
    with Server(tmp_path, database.url, POOL_RESET="1") as server:
        as_new = server.get("/found")
        for _ in range(20):
            assert server.get("/leave/setting")[0] == 200
            assert server.get("/found")[:2] == as_new[:2]


@pooled
def test_read_costs_one_round_trip(server: Server, database: Database) -> None:
    server.get("/value/1")
    before = len(database.proxy.messages)
    for number in range(100):
        server.get(f"/value/{number}")
    assert database.proxy.messages[before:] == ["Q"] * 100


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shutdown_waits_for_requests_and_closes_connections(
    tmp_path: Path, database: Database, method: str
) -> None:
    # macOS, Windows, and Python 3.14 spawn the workers.
    text = f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n"
    (tmp_path / "sitecustomize.py").write_text(text)
    with Server(tmp_path, database.url, PYTHONPATH=str(tmp_path)) as server:
        server.get("/at-exit")
        server.get_all(["/value/1"] * 40, threads=8)
        # Without a pool, the last of these connections may still be closing.
        assert POOLED or poll(lambda: database.backends() == [])
        before = database.proxy.messages.count("X")
        with ThreadPoolExecutor(2) as threads:
            paths = ["/sleep/1.0", "/sleep/2.0"]
            responses = [threads.submit(server.get, path) for path in paths]
            assert poll(lambda: len(database.backends(SLEEPING)) == 2)
            connections = len(database.backends())
            server.process.terminate()
            assert [response.result()[0] for response in responses] == [200, 200]
        assert server.process.wait(10) == 0
    assert poll(lambda: database.backends() == [])
    assert database.proxy.messages.count("X") - before == connections
    assert server.log.read_text().count("exit handler") == 1
    assert "Error" not in server.log.read_text()


def test_readyz_costs_one_round_trip_and_hides_the_pool(
    server: Server, database: Database
) -> None:
    server.get("/value/1")
    before = len(database.proxy.messages)
    assert server.get("/readyz")[:2] == (200, {"status": "ok"})
    assert database.proxy.messages[before:].count("Q") == 1


def test_refused_connection_gives_503(server: Server, database: Database) -> None:
    server.get_all(["/value/1"] * 8, threads=4)
    database.proxy.refuse()
    status, seconds = timed(server.get, "/value/1")
    database.proxy.accept()
    assert status == 503 and seconds < 5
    assert server.get("/value/1")[0] == 200


def test_silent_server_gives_503(server: Server, database: Database) -> None:
    server.get_all(["/value/1"] * 8, threads=4)
    time.sleep(1.1)  # A connection that was idle this long is pinged.
    database.proxy.fall_silent()
    responses = [timed(server.get, "/value/1") for _ in range(3)]
    database.proxy.speak()
    assert {status for status, _ in responses} == {503}
    # An idle connection has 1 s to respond, a new one 2 s.
    assert max(seconds for _, seconds in responses) < 5
    assert server.get("/value/1")[0] == 200


def test_soak(server: Server, database: Database) -> None:
    done = Event()
    wrong: list[Any] = []
    statuses: Counter[int] = Counter()

    def ask(start: int) -> None:
        for number in count(start):
            if done.is_set():
                return
            status, body, _ = server.get(f"/value/{number}")
            statuses[status] += 1
            if status == 200 and body["value"] != number:
                wrong.append((number, body))

    name = "application_name = 'app'"
    one = f"pid = (SELECT max(pid) FROM pg_stat_activity WHERE {name})"
    [worker] = server.process.children()
    killed = 0
    memory = 0
    most = 0
    with ThreadPoolExecutor(8) as threads, ExitStack() as stack:
        stack.callback(done.set)
        asking = [threads.submit(ask, 1_000_000 * each) for each in range(8)]
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            most = max(most, len(database.backends()))
            killed += database.terminate(one)
            done.wait(1)
            memory = memory or worker.memory_info().rss
    for each in asking:
        each.result()
    assert most <= SIZE or not POOLED
    assert wrong == []
    assert statuses[500] == 0 and set(statuses) <= {200, 503}
    assert statuses[503] <= killed
    assert worker.memory_info().rss - memory < 4 * 1024 * 1024
    print(f"{statuses}, {killed} connections killed")


def timed(get: Callable[[str], tuple[int, Any, Any]], path: str) -> tuple[int, float]:
    """Return the status of the response and the seconds that it took."""
    start = time.monotonic()
    status, _, _ = get(path)
    return status, time.monotonic() - start
