"""A baked project on the production server starts, stops and logs correctly."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from .core.reload_server import poll
from .test_faults import SETTINGS, Server

ROOT = Path(__file__).parents[1]
PASSWORD = "hunt er@2%"
PATHS = ["/failure/query", "/failure/connection", "/failure/lost"]
# `flask migrate`, with the files of one more folder.
MIGRATE = """
import sys
from pathlib import Path
from app import create_app
from app.core.migrate import add_folder
from flask.cli import ScriptInfo
app = create_app()
add_folder(app, Path(sys.argv[1]))
app.cli.main(["migrate"], obj=ScriptInfo(create_app=lambda: app))
"""
DEVELOPMENT = {"flask_devserver", "dotenv", "filelock", "psutil"}


class InTerminal(Server):
    """The application on the server, in a terminal that stops background writers."""

    script = "'stty tostop; exec \"$@\"'"
    spawn = f"import pty, sys; pty.spawn(['sh', '-c', {script}, *sys.argv])"
    prefix = (sys.executable, "-c", spawn)


class WithoutStandardError(Server):
    """The application on the server, whose standard error is closed."""

    prefix = ("sh", "-c", 'exec "$@" 2>&-', "sh")


def test_invalid_settings_are_reported_together() -> None:
    url = f"mysql://user:{PASSWORD}@localhost/a"
    wrong = {"DATABASE_URL": url, "SECRET_KEY": "short", "MAX_CONTENT_LENGTH": "1 MB"}
    said = error_of_the_start(**wrong)
    *lines, hint = said.splitlines()
    names = [line.removeprefix("Error: ").split()[0] for line in lines]
    assert hint.startswith("For debug mode, ")
    assert sorted(names) == sorted([*wrong, "TRUSTED_HOSTS"])
    assert "SECRET_KEY is invalid: set it to 32 random bytes" in said
    assert PASSWORD not in said


@pytest.mark.parametrize("name", ["PORT", "WEB_CONCURRENCY"])
def test_error_names_the_variable(database_url: str, name: str) -> None:
    given = SETTINGS | {"DATABASE_URL": database_url, name: "many"}
    error = error_of_the_start(**given)
    assert f"(env var: '{name}')" in error and "'many'" in error


@pytest.mark.parametrize("command", [[], ["migrate"]], ids=str)
def test_help_is_shown_without_settings(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "app", *command, "--help"],
        cwd=ROOT,
        env=os.environ | {"FLASK_DEBUG": "0"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ") and "migrat" in done.stdout


@pytest.mark.parametrize("name", ["FLASK_DEBUG", "FLASK_TESTING"])
def test_debug_and_testing_do_not_start(name: str) -> None:
    assert error_of_the_start(**{name: "1"}).startswith(f"Error: {name} is on")


@pytest.mark.parametrize("end", ["", "zz\r\n", "0\r\n\r\n"])
def test_body_of_unknown_length_is_rejected(
    tmp_path: Path, database_url: str, end: str
) -> None:
    with Server(tmp_path, database_url) as server:
        head = "POST /read HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked"
        response = server.send(f"{head}\r\n\r\n3\r\na=1\r\n{end}".encode())
        assert response.startswith("HTTP/1.1 411 ")


def test_body_of_a_client_that_disconnects_is_rejected(
    tmp_path: Path, database_url: str
) -> None:
    head = b"POST /read HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4"
    with Server(tmp_path, database_url) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as conn:
            conn.sendall(head + b"\r\n\r\na=1")
        assert poll(lambda: "POST /read 4" in said(server))


def test_path_and_scheme_from_the_client_are_ignored(
    tmp_path: Path, database_url: str
) -> None:
    lies = {"SCRIPT_NAME": "/evil", "X-Forwarded-Proto": "https"}
    with Server(tmp_path, database_url) as server:
        _, url, _ = server.get("/url", **lies)
        assert url == f"http://127.0.0.1:{server.port}/url".encode()


def test_environment_is_no_part_of_a_request(tmp_path: Path, database_url: str) -> None:
    given = {"HTTP_ORIGIN": "https://other.example", "REMOTE_USER": "root"}
    with Server(tmp_path, database_url, **given) as server:
        _, names, _ = server.get("/environ")
    assert "REQUEST_METHOD" in names
    assert not {"DATABASE_URL", "SECRET_KEY", "PATH", *given} & set(names)


def test_server_without_standard_error_responds(
    tmp_path: Path, database_url: str
) -> None:
    with WithoutStandardError(tmp_path, database_url) as server:
        assert server.get("/value/1")[0] == 200


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
def test_sigterm_drops_no_started_request(
    tmp_path: Path, database_url: str, number: int
) -> None:
    options = ["--workers", "2"]
    with Server(tmp_path, database_url, *options, POOL_SIZE="8") as server:
        with ThreadPoolExecutor(32) as threads:
            responses = [threads.submit(send_requests, server, n) for n in range(32)]
            assert poll(lambda: len(started(server)) > 200)
            server.process.terminate()
            finished_ids = set().union(*(each.result() for each in responses))
        assert server.process.wait(20) == 0
        assert started(server) == finished_ids


def test_reload_drops_no_request(tmp_path: Path, database_url: str) -> None:
    with Server(tmp_path, database_url, "--workers", "2") as server:
        with ThreadPoolExecutor(8) as threads:
            responses = [threads.submit(server.get, "/value/1") for _ in range(50)]
            server.process.send_signal(signal.SIGHUP)
            assert poll(lambda: said(server).count("Stopped old worker") == 2)
            responses += [threads.submit(server.get, "/value/1") for _ in range(50)]
    found = [response.result() for response in responses]
    assert [status for status, _, _ in found] == [200] * 100
    assert len({body["process"] for _, body, _ in found}) == 4


def test_port_is_not_shared_with_another_server(
    tmp_path: Path, database_url: str
) -> None:
    with Server(tmp_path, database_url) as server:
        done = subprocess.run(
            [sys.executable, "-m", *server.command()],
            cwd=ROOT,
            env=os.environ | SETTINGS | {"DATABASE_URL": database_url},
            stderr=subprocess.PIPE,
            text=True,
        )
    place = f"127.0.0.1, port {server.port}"
    message = f"Error: Cannot listen on {place}: Address already in use.\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_host_may_be_a_name(tmp_path: Path, database_url: str) -> None:
    with Server(tmp_path, database_url, "--host", "localhost") as server:
        assert server.get("/value/1")[0] == 200


def test_ctrl_c_stops_an_idle_server_at_once(tmp_path: Path, database_url: str) -> None:
    for _ in range(3):
        with Server(tmp_path, database_url) as server:
            os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
            assert server.process.wait(20) == 0


def test_terminal_does_not_stop_the_workers(tmp_path: Path, database_url: str) -> None:
    with InTerminal(tmp_path, database_url) as server:
        assert server.get("/value/1")[0] == 200
        [command] = server.process.children()
        command.terminate()
        server.process.wait(20)


def test_sigterm_stops_a_starting_worker(tmp_path: Path, database_url: str) -> None:
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


@pytest.mark.parametrize("environ", [{}, {"LOSE_SIGNAL": ""}], ids=str)
def test_workers_exit_when_the_parent_is_killed(
    tmp_path: Path, database_url: str, environ: dict[str, str]
) -> None:
    with Server(tmp_path, database_url, "--workers", "2", **environ) as server:
        workers = server.process.children()
        server.process.kill()
        assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_slow_headers_and_idle_clients_occupy_no_thread(
    tmp_path: Path, database_url: str
) -> None:
    with Server(tmp_path, database_url) as server, ExitStack() as stack:
        for start in (b"", b"GET / HTTP/1.1\r\nHost: loc") * 500:
            address = ("127.0.0.1", server.port)
            conn = stack.enter_context(socket.create_connection(address))
            conn.sendall(start)
        assert server.get("/value/1")[0] == 200


def test_every_log_line_is_json(tmp_path: Path, database_url: str) -> None:
    with Server(tmp_path, database_url, "--threads", "99") as server:
        server.get("/value/1")
        server.process.send_signal(signal.SIGHUP)
        assert poll(lambda: said(server).count("Stopped old worker") == 1)
    for line in map(json.loads, server.log.read_text().splitlines()):
        assert {"time", "level", "message", "request_id"} <= set(line)
        is_slow = "to get a connection" in line["message"]  # The machine may be loaded.
        assert line["level"] == ("WARNING" if is_slow else "INFO")


@pytest.mark.parametrize(
    "changes", [{}, {"password": PASSWORD}, {"port": "1"}], ids=str
)
def test_password_is_in_no_response_or_log_line(
    tmp_path: Path, database_url: str, changes: dict[str, str]
) -> None:
    url = make_dsn(database_url, **changes)
    password = parse_dsn(url)["password"]
    with Server(tmp_path, url) as server:
        responses = [server.get(path) for path in PATHS]
    statuses = {status for status, _, _ in responses}
    assert statuses == ({503} if changes else {500, 503})
    headers = [str(h) for _, _, h in responses]
    said = f"{responses} {headers} {server.log.read_text()}"
    assert "RuntimeError" in said or changes
    assert "password authentication failed" in said or changes != {"password": PASSWORD}
    assert password not in said and quote(password) not in said
    assert not any("Traceback" in str(body) for _, body, _ in responses)


def test_interrupted_migration_is_rolled_back(
    tmp_path: Path, database_url: str
) -> None:
    (tmp_path / "9999_slow.sql").write_text("CREATE TABLE slow (); SELECT pg_sleep(60)")
    process = psutil.Popen(
        [sys.executable, "-c", MIGRATE, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | SETTINGS | {"DATABASE_URL": database_url},
        stderr=subprocess.PIPE,
        text=True,
    )
    with closing(psycopg2.connect(database_url)) as conn, conn.cursor() as cursor:
        conn.autocommit = True

        def is_sleeping() -> bool:
            activity = "FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            cursor.execute(f"SELECT {activity} AND datname = current_database()")
            return bool(cursor.rowcount)

        assert poll(is_sleeping)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
        assert not is_sleeping()
        cursor.execute("SELECT to_regclass('slow')")
        assert cursor.fetchone() == (None,)
    reason = "canceling statement due to user request; nothing of it is applied."
    assert said == f"Error: 9999_slow.sql: {reason}\n"


def error_of_the_start(**environ: str) -> str:
    """Return the output of a server that fails to start."""
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


def send_requests(server: Server, client: int) -> set[str]:
    """Send requests until the server stops; return the ids of those with a response."""
    ids = set()
    for number in range(10_000):
        name = f"{client}-{number}"
        try:
            status, _, _ = server.get("/sleep/0.05", **{"X-Request-ID": name})
        except (OSError, HTTPException):
            return ids
        assert status == 200
        ids.add(name)
    raise AssertionError("the server did not stop")


def started(server: Server) -> set[str]:
    """Return the ids of the clients' requests that have started."""
    found = [line for line in lines(server) if line["message"] == "started"]
    return {line["request_id"] for line in found if "-" in line["request_id"]}


def said(server: Server) -> str:
    """Return the text of the log."""
    return server.log.read_text()


def lines(server: Server) -> list[Any]:
    """Return the parsed lines of the log."""
    return [json.loads(line) for line in said(server).split("\n")[:-1]]
