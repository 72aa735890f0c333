"""`flask dev`: no save is lost, no request refused, and nothing outlives it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Event
from urllib.error import HTTPError

import psutil
import pytest
from click.testing import CliRunner
from flask_devserver import supervisor
from flask_devserver.cli import dev
from psycopg2.extensions import connection
from werkzeug import Request, Response
from werkzeug.test import Client

from .core.reload_server import (
    DEV,
    DEV_WITHOUT_FORK,
    PACKAGE,
    RELOADS,
    RUN,
    Server,
    poll,
    processes_connected,
    sleeping,
)

BOTH = pytest.mark.parametrize("command", [DEV, DEV_WITHOUT_FORK], ids=" ".join)
ALL = pytest.mark.parametrize("command", [RUN, DEV, DEV_WITHOUT_FORK], ids=" ".join)

SLOW_IMPORT = """
import pathlib, time
pathlib.Path("starts").touch()
time.sleep(1)
"""
SLOW_FIRST_SCAN = """
import os, time
from flask_devserver.files import Files

class SlowFiles(Files):
    def scan(self):
        while not os.path.exists("saved"):
            time.sleep(0.01)
        return super().scan()

import flask_devserver.files
flask_devserver.files.Files = SlowFiles
"""
THREAD = """
import threading
threading.Thread(target=threading.Event().wait, name="pool").start()
"""
EXIT_HOOK = """
import atexit, time
atexit.register(lambda: time.sleep(60))
"""


@pytest.fixture
def server(tmp_path: Path, database_url: str, command: list[str]) -> Iterator[Server]:
    folder = tmp_path / "instance"  # a name that is not watched within a project
    folder.mkdir()
    with Server(folder, "tests.pages", command, DATABASE_URL=database_url) as server:
        yield server


@BOTH
def test_save_while_the_previous_version_starts_is_not_lost(server: Server) -> None:
    server.save(server.module.read_text() + SLOW_IMPORT)
    for _ in range(max(3, RELOADS // 8)):
        save_and_await_start(server)
        server.save_version()
        assert server.wait_for(server.new_answer, "answer of the last version")


@pytest.mark.parametrize("command", [DEV], ids=" ".join)
def test_save_before_the_first_scan_is_not_lost(server: Server) -> None:
    server.interrupt()
    (server.folder / "sitecustomize.py").write_text(SLOW_FIRST_SCAN)
    server.environ["PYTHONPATH"] = str(server.folder)
    server.start()
    server.wait_for(server.answer, "answer of the first version")
    server.save_version()
    (server.folder / "saved").touch()
    assert server.wait_for(server.new_answer, "answer of the last version")


@pytest.mark.parametrize(
    "command",
    [(*each, "--host", "0.0.0.0") for each in (RUN, DEV, DEV_WITHOUT_FORK)],
    ids=" ".join,
)
def test_clients_in_the_network_may_name_any_address(server: Server) -> None:
    with server.open("/version", Host="192.168.0.7:5000") as response:
        assert response.status == 200
    with pytest.raises(HTTPError) as raised:
        server.open("/version", Host="other.example")
    assert "TRUSTED_HOSTS" in raised.value.read().decode()


@BOTH
def test_interrupt_at_the_start_is_no_error(server: Server) -> None:
    server.interrupt()
    for _ in range(5):
        server.start()
        assert poll(server.process.children)
        server.interrupt()
    assert "Traceback" not in server.log


@BOTH
def test_bytecode_of_the_previous_version_is_not_used(server: Server) -> None:
    for _ in range(3):
        server.reload()
        saved = server.module.stat()
        # Python uses this bytecode while the size and time of the file are the same.
        compileall = [sys.executable, "-m", "compileall", "-q", PACKAGE]
        subprocess.run(compileall, cwd=server.folder, check=True)
        server.version += 1
        server.save(re.sub(r"\d\n\Z", f"{server.version}\n", server.module.read_text()))
        os.utime(server.module, ns=(saved.st_atime_ns, saved.st_mtime_ns))
        assert server.module.stat().st_size == saved.st_size
        assert server.wait_for(server.new_answer, "answer of the last version")


@BOTH
def test_page_in_a_browser_learns_of_the_next_version(server: Server) -> None:
    versions = []
    for _ in range(3):
        with server.open("/page", Accept="text/html") as page:
            [version] = re.findall(r"version=(\w+)", page.read().decode())
        with server.open("/_flask_dev/events") as events:
            assert events.readline().decode() == f"data: {version}\n"
            server.reload()
            assert b"data" not in events.read()
        versions.append(version)
    assert len(set(versions)) == 3
    assert "_flask_dev" not in server.log


def test_page_comes_whole_for_its_script() -> None:
    from flask_devserver.browser import BrowserReload

    @Request.application
    def page(request: Request) -> Response:
        response = Response("<h1>Page</h1>", mimetype="text/html")
        response.add_etag()
        return response.make_conditional(request, accept_ranges=True)

    browser = Client(BrowserReload(page, Event()))
    accept = {"Accept": "text/html"}
    etag = browser.get("/", headers=accept).headers["ETag"]
    for asked in ({"If-None-Match": etag}, {"Range": "bytes=0-3"}):
        answer = browser.get("/", headers=accept | asked)
        assert answer.text.startswith("<h1>Page</h1><script src=")
        assert answer.content_length == len(answer.data)
    assert "method=POST" in browser.post("/", headers=accept).text


@BOTH
def test_responses_to_programs_are_unchanged(server: Server) -> None:
    for headers in ({}, {"Accept": "text/html", "Sec-Fetch-Dest": "empty"}):
        with server.open("/page", **headers) as answer:
            assert b"_flask_dev" not in answer.read()


@pytest.mark.parametrize("command", [[*DEV, "--no-browser-reload"]], ids=" ".join)
def test_pages_are_left_alone_when_asked(server: Server) -> None:
    with server.open("/page", Accept="text/html") as page:
        assert b"_flask_dev" not in page.read()


@BOTH
def test_saves_in_a_row_are_taken_together(server: Server) -> None:
    pauses = [1.0]
    while max(pauses) > 0.15:  # a busy machine may pause for longer
        server.reload()
        reloads = server.log.count("Reloaded in")
        saved = [time.monotonic()]
        for _ in range(10):
            server.save_version()
            time.sleep(0.08)
            saved.append(time.monotonic())
        pauses = [later - earlier for earlier, later in pairwise(saved)]
    server.wait_for(server.new_answer, "answer of the last version")
    assert server.log.count("Reloaded in") - reloads <= 2


@BOTH
def test_syntax_error_is_shown_to_the_browser(server: Server) -> None:
    good = server.module.read_text()
    server.save(good + "\ndef broken(:\n")
    server.wait_for(lambda: "SyntaxError" in server.log, "syntax error")
    with pytest.raises(HTTPError) as error:
        server.request("/version")
    assert "SyntaxError" in error.value.read().decode()
    server.save(good)
    server.reload()


@BOTH
def test_environment_saved_while_a_version_starts_is_not_lost(server: Server) -> None:
    server.save(server.module.read_text() + SLOW_IMPORT)
    server.reload()
    for value in ("first", "second"):
        save_and_await_start(server)
        (server.folder / ".env").write_text(f"GREETING={value}\n")
        server.wait_for(partial(greets_with, server, value), f"greeting {value}")


@BOTH
def test_renamed_folder_is_noticed(server: Server) -> None:
    folder = server.folder / "more"
    folder.mkdir()
    (folder / "module.py").touch()
    server.wait_for(lambda: "Reloaded" in server.log, "reload")
    folder.rename(server.folder / "other")
    renamed = os.path.join("other", "module.py")
    server.wait_for(lambda: renamed in server.log, "reload after the renaming")


@BOTH
def test_malformed_request_is_rejected(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"\x16\x03\x01\r\n\r\n")  # as a browser does for https
        assert b"400" in connection.recv(1000)
    server.reload()
    assert "Traceback" not in server.log


@BOTH
def test_saved_environment_restarts_the_server(server: Server) -> None:
    for value in ("first", "second"):
        (server.folder / ".env").write_text(f"GREETING={value}\n")
        server.wait_for(partial(greets_with, server, value), f"greeting {value}")
    server.reload()


@ALL
def test_thread_that_blocks_the_reload_is_named_and_ended(server: Server) -> None:
    reload_after(server, THREAD)
    assert "Thread 'pool' is not a daemon thread, so Python waits for it." in server.log
    assert f"started at {PACKAGE}{os.sep}__init__.py:" in server.log


@ALL
def test_exit_hook_that_blocks_the_reload_is_named_and_ended(server: Server) -> None:
    reload_after(server, EXIT_HOOK)
    assert f"An exit hook (atexit) is still running, at {PACKAGE}" in server.log


@BOTH
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_outlives_the_server(
    server: Server, db: connection, end: signal.Signals
) -> None:
    server.reload()
    server.request_in_background("/query")
    server.wait_for(lambda: sleeping(db), "query")
    family = [server.process, *server.process.children(recursive=True)]
    server.process.send_signal(end)
    assert poll(lambda: not any(map(runs, family)))
    assert poll(server.port_is_free)
    assert poll(lambda: not processes_connected(db))


@pytest.mark.parametrize("command", [RUN], ids=" ".join)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_outlives_flasks_own_server(
    server: Server, end: signal.Signals
) -> None:
    family = [server.process, *server.process.children(recursive=True)]
    server.process.send_signal(end)
    assert poll(lambda: not any(map(runs, family)))
    assert poll(server.port_is_free)


def reload_after(server: Server, text: str) -> None:
    """Serve a version with `text` in it, and reload from that to one without."""
    good = server.module.read_text()
    server.save(f"{good}{text}\nVERSION = -1\n")
    server.wait_for(lambda: server.answer().get("version") == -1, "version to block")
    server.save(good)
    server.reload()


def save_and_await_start(server: Server) -> None:
    """Save a version with the slow import, and wait until it has been read."""
    starts = server.folder / "starts"
    starts.unlink(missing_ok=True)
    server.save_version()
    server.wait_for(starts.exists, "start")


def greets_with(server: Server, value: str) -> bool:
    return bool(server.answer().get("greeting") == value)


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("host, warned", [("0.0.0.0", True), ("127.0.0.1", False)])
def test_other_interface_prints_a_warning(
    monkeypatch: pytest.MonkeyPatch, host: str, warned: bool
) -> None:
    monkeypatch.setattr(supervisor.Supervisor, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(supervisor.Supervisor, "run", lambda _: None)
    result = CliRunner().invoke(dev, ["--host", host], catch_exceptions=False)
    assert ("Others on the network" in result.stderr) == warned
