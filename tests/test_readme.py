"""README's first command, in a fresh copy: a page, a note, and nothing left over."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from .conftest import clean_environment, copy_template, remove_database, run, wait_for
from .serving import free_port, page


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what is under version control here, and nothing else."""
    return copy_template(tmp_path)


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
        assert "<li>Buy milk</li>" in page(url, body="Buy milk")
        wait_for(lambda: "Note 1 has 2 words" in log.read_text(), "task")
    finally:
        os.killpg(demo.pid, signal.SIGINT)
        demo.wait(30)
        print(log.read_text())
    project = clone / ".demo" / "demo_psycopg2_thread"
    remove_database(project / "instance" / "postgres")
    with socket.create_server(("127.0.0.1", port)):
        assert run("ps", "-e", "-o", "args", cwd=clone).count(str(clone)) == 0
