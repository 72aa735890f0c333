"""A baked project on gunicorn, as in production: its start, its end, its log."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from .core.reload_server import poll
from .test_faults import Gunicorn

ROOT = Path(__file__).parents[1]
PASSWORD = "hunt er@2%"
PATHS = ["/failure/query", "/failure/connection", "/failure/lost"]
DEVELOPMENT = {"devserver", "dotenv", "filelock", "psutil", "watchfiles"}


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


@pytest.mark.parametrize(
    "body, status",
    [
        (b"zz\r\n", 400),
        (b"3\r\na=1\r\n0\r\n\r\n", 201),
        (b"100001\r\n" + b"a" * 0x100001 + b"\r\n0\r\n\r\n", 413),
    ],
    ids=["malformed", "small", "large"],
)
def test_chunked_body_is_accepted_only_if_well_formed_and_small(
    tmp_path: Path, database_url: str, body: bytes, status: int
) -> None:
    with Gunicorn(tmp_path, database_url) as gunicorn:
        head = b"POST /read HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked"
        answer = gunicorn.send(head + b"\r\n\r\n" + body)
        assert answer.startswith(f"HTTP/1.1 {status} ")


def test_path_and_scheme_of_the_client_are_not_believed(
    tmp_path: Path, database_url: str
) -> None:
    lies = {"SCRIPT_NAME": "/evil", "X-Forwarded-Proto": "https"}
    with Gunicorn(tmp_path, database_url) as gunicorn:
        _, url, _ = gunicorn.get("/url", **lies)
        assert url == f"http://127.0.0.1:{gunicorn.port}/url".encode()


def test_development_packages_are_not_imported(
    tmp_path: Path, database_url: str
) -> None:
    with Gunicorn(tmp_path, database_url) as gunicorn:
        assert gunicorn.get("/readyz")[0] == 200
        assert DEVELOPMENT.isdisjoint(gunicorn.get("/modules")[1])


@pytest.mark.parametrize("number", range(3))
def test_sigterm_drops_no_request_that_had_begun(
    tmp_path: Path, database_url: str, number: int
) -> None:
    options = ["--workers", "2"]
    with Gunicorn(tmp_path, database_url, *options, POOL_SIZE="8") as gunicorn:
        with ThreadPoolExecutor(32) as threads:
            answers = [threads.submit(answered, gunicorn, n) for n in range(32)]
            assert poll(lambda: len(begun(gunicorn)) > 200)
            gunicorn.process.terminate()
            answered_ids = set().union(*(answer.result() for answer in answers))
        assert gunicorn.process.wait(20) == 0
        assert begun(gunicorn) == answered_ids


def test_replaced_process_drops_no_request(tmp_path: Path, database_url: str) -> None:
    options = ["--workers", "2", "--max-requests", "30", "--max-requests-jitter", "1"]
    with Gunicorn(tmp_path, database_url, *options) as gunicorn:
        answers = gunicorn.get_all(["/value/1"] * 600, threads=8)
    assert [status for status, _, _ in answers] == [200] * 600
    assert len({body["process"] for _, body, _ in answers}) > 10


@pytest.mark.parametrize(
    "changes", [{}, {"password": PASSWORD}, {"port": "1"}], ids=str
)
def test_password_is_in_no_answer_and_no_line(
    tmp_path: Path, database_url: str, changes: dict[str, str]
) -> None:
    url = make_dsn(database_url, **changes)
    password = parse_dsn(url)["password"]
    with Gunicorn(tmp_path, url) as gunicorn:
        answers = [gunicorn.get(path) for path in PATHS]
    statuses = {status for status, _, _ in answers}
    assert statuses == ({503} if changes else {500, 503})
    said = f"{answers} {[str(h) for _, _, h in answers]} {gunicorn.log.read_text()}"
    assert "RuntimeError" in said or changes
    assert "password authentication failed" in said or changes != {"password": PASSWORD}
    assert password not in said and quote(password) not in said
    assert not any("Traceback" in str(body) for _, body, _ in answers)


def error_of_the_start(**environ: str) -> str:
    """Return what the server prints as it fails to start."""
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0"],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.strip()


def answered(gunicorn: Gunicorn, client: int) -> set[str]:
    """Ask until the server ends; return the ids of the requests that it answered."""
    ids = set()
    for number in range(10_000):
        name = f"{client}-{number}"
        try:
            status, _, _ = gunicorn.get("/sleep/0.05", **{"X-Request-ID": name})
        except (OSError, HTTPException):
            return ids
        assert status == 200
        ids.add(name)
    raise AssertionError("the server did not end")


def begun(gunicorn: Gunicorn) -> set[str]:
    """Return the ids of the requests of clients that have begun."""
    found = [line for line in lines(gunicorn) if line["message"] == "begun"]
    return {line["request_id"] for line in found if "-" in line["request_id"]}


def lines(gunicorn: Gunicorn) -> list[Any]:
    """Return the application's lines of the log."""
    text = gunicorn.log.read_text().splitlines()
    return [json.loads(line) for line in text if line.startswith("{")]
