"""A baked project on the production server: its start, its end, its log."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from .core.reload_server import poll
from .test_faults import SETTINGS, Server

ROOT = Path(__file__).parents[1]
PASSWORD = "hunt er@2%"
PATHS = ["/failure/query", "/failure/connection", "/failure/lost"]
DEVELOPMENT = {"flask_devserver", "dotenv", "filelock", "psutil"}


def test_wrong_settings_are_said_once_in_a_sentence_each() -> None:
    url = f"mysql://user:{PASSWORD}@localhost/a"
    wrong = {"DATABASE_URL": url, "SECRET_KEY": "short", "MAX_CONTENT_LENGTH": "1 MB"}
    said = error_of_the_start(**wrong)
    names = [line.removeprefix("Error: ").split()[0] for line in said.splitlines()]
    assert sorted(names) == sorted([*wrong, "TRUSTED_HOSTS"])
    assert "SECRET_KEY is invalid: set it to 32 random bytes" in said
    assert PASSWORD not in said


def test_debug_does_not_start() -> None:
    assert error_of_the_start(FLASK_DEBUG="1").startswith("Error: FLASK_DEBUG is on")


@pytest.mark.parametrize("end", ["", "zz\r\n", "0\r\n\r\n"])
def test_body_of_unknown_length_is_rejected(
    tmp_path: Path, database_url: str, end: str
) -> None:
    with Server(tmp_path, database_url) as server:
        head = "POST /read HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked"
        answer = server.send(f"{head}\r\n\r\n3\r\na=1\r\n{end}".encode())
        assert answer.startswith("HTTP/1.1 411 ")


def test_path_and_scheme_of_the_client_are_not_believed(
    tmp_path: Path, database_url: str
) -> None:
    lies = {"SCRIPT_NAME": "/evil", "X-Forwarded-Proto": "https"}
    with Server(tmp_path, database_url) as server:
        _, url, _ = server.get("/url", **lies)
        assert url == f"http://127.0.0.1:{server.port}/url".encode()


def test_development_packages_are_not_imported(database_url: str) -> None:
    code = "import sys, app; app.create_app(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | SETTINGS | {"DATABASE_URL": database_url},
        capture_output=True,
        check=True,
        text=True,
    )
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "psycopg2" in imported
    assert DEVELOPMENT.isdisjoint(imported)


@pytest.mark.parametrize("number", range(3))
def test_sigterm_drops_no_request_that_had_begun(
    tmp_path: Path, database_url: str, number: int
) -> None:
    options = ["--workers", "2"]
    with Server(tmp_path, database_url, *options, POOL_SIZE="8") as server:
        with ThreadPoolExecutor(32) as threads:
            answers = [threads.submit(answered, server, n) for n in range(32)]
            assert poll(lambda: len(begun(server)) > 200)
            server.process.terminate()
            answered_ids = set().union(*(answer.result() for answer in answers))
        assert server.process.wait(20) == 0
        assert begun(server) == answered_ids


def test_reload_drops_no_request(tmp_path: Path, database_url: str) -> None:
    with Server(tmp_path, database_url, "--workers", "2") as server:
        with ThreadPoolExecutor(8) as threads:
            answers = [threads.submit(server.get, "/value/1") for _ in range(50)]
            server.process.send_signal(signal.SIGHUP)
            assert poll(lambda: said(server).count("Stopped old worker") == 2)
            answers += [threads.submit(server.get, "/value/1") for _ in range(50)]
    found = [answer.result() for answer in answers]
    assert [status for status, _, _ in found] == [200] * 100
    assert len({body["process"] for _, body, _ in found}) == 4


def test_sigterm_ends_a_worker_that_is_starting(
    tmp_path: Path, database_url: str
) -> None:
    with Server(tmp_path, database_url) as server:
        [worker] = server.process.children()
        worker.kill()
        assert poll(lambda: said(server).count("Spawning worker") == 2)
        server.process.terminate()
        assert server.process.wait(10) == 0


def test_killed_worker_is_replaced(tmp_path: Path, database_url: str) -> None:
    with Server(tmp_path, database_url) as server:
        [worker] = server.process.children()
        worker.kill()
        assert poll(lambda: said(server).count("Started worker") == 2)
        assert server.get("/value/1")[1]["process"] != worker.pid


def test_workers_end_with_a_killed_parent(tmp_path: Path, database_url: str) -> None:
    with Server(tmp_path, database_url, "--workers", "2") as server:
        workers = server.process.children()
        server.process.kill()
        assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_incomplete_headers_and_idle_connections_hold_no_thread(
    tmp_path: Path, database_url: str
) -> None:
    with Server(tmp_path, database_url) as server, ExitStack() as stack:
        for begun in (b"", b"GET / HTTP/1.1\r\nHost: loc") * 500:
            address = ("127.0.0.1", server.port)
            conn = stack.enter_context(socket.create_connection(address))
            conn.sendall(begun)
        assert server.get("/value/1")[0] == 200


def test_every_line_is_json(tmp_path: Path, database_url: str) -> None:
    with Server(tmp_path, database_url) as server:
        server.get("/value/1")
        server.process.send_signal(signal.SIGHUP)
        assert poll(lambda: said(server).count("Stopped old worker") == 1)
    for line in server.log.read_text().splitlines():
        assert {"time", "level", "message", "request_id"} <= set(json.loads(line))


@pytest.mark.parametrize(
    "changes", [{}, {"password": PASSWORD}, {"port": "1"}], ids=str
)
def test_password_is_in_no_answer_and_no_line(
    tmp_path: Path, database_url: str, changes: dict[str, str]
) -> None:
    url = make_dsn(database_url, **changes)
    password = parse_dsn(url)["password"]
    with Server(tmp_path, url) as server:
        answers = [server.get(path) for path in PATHS]
    statuses = {status for status, _, _ in answers}
    assert statuses == ({503} if changes else {500, 503})
    said = f"{answers} {[str(h) for _, _, h in answers]} {server.log.read_text()}"
    assert "RuntimeError" in said or changes
    assert "password authentication failed" in said or changes != {"password": PASSWORD}
    assert password not in said and quote(password) not in said
    assert not any("Traceback" in str(body) for _, body, _ in answers)


def error_of_the_start(**environ: str) -> str:
    """Return what the server prints as it fails to start."""
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "app", "serve"],
        cwd=ROOT,
        env=os.environ | {"FLASK_DEBUG": "0"} | environ,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode > 0 and done.stdout == ""
    return done.stderr.strip()


def answered(server: Server, client: int) -> set[str]:
    """Ask until the server ends; return the ids of the requests that it answered."""
    ids = set()
    for number in range(10_000):
        name = f"{client}-{number}"
        try:
            status, _, _ = server.get("/sleep/0.05", **{"X-Request-ID": name})
        except (OSError, HTTPException):
            return ids
        assert status == 200
        ids.add(name)
    raise AssertionError("the server did not end")


def begun(server: Server) -> set[str]:
    """Return the ids of the requests of clients that have begun."""
    found = [line for line in lines(server) if line["message"] == "begun"]
    return {line["request_id"] for line in found if "-" in line["request_id"]}


def said(server: Server) -> str:
    """Return the log."""
    return server.log.read_text()


def lines(server: Server) -> list[Any]:
    """Return the lines of the log."""
    return [json.loads(line) for line in said(server).split("\n")[:-1]]
