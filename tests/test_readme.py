"""README's first command, in a fresh copy: a page, a note, and nothing left over."""

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from .conftest import TEMPLATE, clean_environment, remove_database, run, wait_for


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what is under version control here, and nothing else."""
    options = ["--cached", "--others", "--exclude-standard", "-z"]
    listed = run("git", "ls-files", *options, cwd=TEMPLATE)
    for name in filter(None, listed.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TEMPLATE / name, tmp_path / name)
    return tmp_path


def test_make_demo_serves_notes_and_leaves_nothing_running(clone: Path) -> None:
    port = free_port()
    log = clone / "log"
    with log.open("w") as output:
        demo = subprocess.Popen(
            ["make", "demo", "WORKER=thread", f"PORT={port}"],
            cwd=clone,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}/notes"
    try:
        assert "Nothing here yet" in wait_for(lambda: page(url), "page", seconds=120)
        with urlopen(url, urlencode({"body": "Buy milk"}).encode()) as answer:
            assert "<li>Buy milk</li>" in answer.read().decode()
        wait_for(lambda: "Note 1 has 2 words" in log.read_text(), "task")
    finally:
        os.killpg(demo.pid, signal.SIGINT)
        demo.wait(30)
        print(log.read_text())
    project = clone / ".demo" / "demo_psycopg2_thread"
    remove_database(project / "instance" / "postgres")
    with socket.create_server(("127.0.0.1", port)):
        assert run("ps", "-e", "-o", "args", cwd=clone).count(str(clone)) == 0


def page(url: str) -> str:
    with suppress(URLError, ConnectionError), urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())
    return ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
