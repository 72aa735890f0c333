"""`flask dev`: no save is lost, no request refused, and nothing outlives it."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from urllib.error import HTTPError

import psutil
import pytest
from psycopg2.extensions import connection

from .live import (
    DEV,
    DEV_WITHOUT_FORK,
    RUN,
    Server,
    poll,
    processes_connected,
    sleeping,
)

BOTH = pytest.mark.parametrize("command", [DEV, DEV_WITHOUT_FORK], ids=" ".join)
ALL = pytest.mark.parametrize("command", [RUN, DEV, DEV_WITHOUT_FORK], ids=" ".join)

SLOW_IMPORT = "\nimport time\ntime.sleep(1)\n"
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
    with Server(tmp_path, command=command, DATABASE_URL=database_url) as server:
        yield server


@BOTH
def test_save_while_the_version_before_starts_is_not_lost(server: Server) -> None:
    server.save(server.module.read_text() + SLOW_IMPORT)
    for _ in range(3):
        old = server.answer()["process"]
        server.save_version()
        server.wait_for(partial(has_ended, old), "start")
        server.save_version()
        assert server.wait_for(server.new_answer, "answer of the last version")


@BOTH
def test_no_request_fails_during_reloads(server: Server) -> None:
    done = Event()

    def ask() -> int:
        answers = 0
        while not done.is_set():
            server.request("/version")
            answers += 1
        return answers

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        for _ in range(5):
            server.reload()
        done.set()
    assert all(each.result() > 5 for each in asking)


@BOTH
def test_saves_in_a_row_are_taken_together(server: Server) -> None:
    seconds = 10.0
    while seconds > 1.5:  # a busy machine may take longer for ten saves
        server.reload()
        reloads = server.log.count("Reloaded in")
        start = time.monotonic()
        for _ in range(10):
            server.save_version()
            time.sleep(0.1)
        seconds = time.monotonic() - start
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
def test_saved_environment_starts_anew(server: Server) -> None:
    for value in ("first", "second"):
        (server.folder / ".env").write_text(f"GREETING={value}\n")
        server.wait_for(partial(greets_with, server, value), f"greeting {value}")
    server.reload()


@ALL
def test_thread_that_blocks_the_reload_is_named_and_ended(server: Server) -> None:
    reload_after(server, THREAD)
    assert "Thread 'pool' is no daemon, so Python waits for it." in server.log
    assert f"{server.module}" in server.log


@ALL
def test_exit_hook_that_blocks_the_reload_is_named_and_ended(server: Server) -> None:
    reload_after(server, EXIT_HOOK)
    assert f"An exit hook (atexit) takes so long, at {server.module}" in server.log


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
    assert poll(lambda: not any(map(runs, family)), seconds=3)
    assert server.port_is_free()
    assert poll(lambda: not processes_connected(db), seconds=3)


@pytest.mark.parametrize("command", [RUN], ids=" ".join)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_outlives_flasks_own_server(
    server: Server, end: signal.Signals
) -> None:
    family = [server.process, *server.process.children(recursive=True)]
    server.process.send_signal(end)
    assert poll(lambda: not any(map(runs, family)), seconds=3)
    assert server.port_is_free()


def reload_after(server: Server, text: str) -> None:
    """Serve a version with `text` in it, and reload from that to one without."""
    good = server.module.read_text()
    server.save(f"{good}{text}\nVERSION = -1\n")
    server.wait_for(lambda: server.answer().get("version") == -1, "version to block")
    server.save(good)
    server.reload()


def has_ended(process: int) -> bool:
    return not psutil.pid_exists(process)


def greets_with(server: Server, value: str) -> bool:
    return bool(server.answer().get("greeting") == value)


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
