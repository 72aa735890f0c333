"""Negative controls: apps built the wrong way fail the reload tests of a project.

A small app whose mistake breaks reload replaces the application of a baked project. The
project's own tests/core/test_reload.py must fail on it.
"""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from ..support.commands import DEADLINE, PROGRAMS, clean_environment
from ..support.projects import Bake

# An app with a database object at module level, whose thread is a daemon or not.
APP = """
import os
import threading

import psycopg2
from flask import Flask

import app as package


class Database:
    def __init__(self):
        name = f"process {os.getpid()}"
        self.conn = psycopg2.connect(os.environ["DATABASE_URL"], application_name=name)
        self.closed = threading.Event()
        threading.Thread(
            target=self.closed.wait, name="pool", daemon=%(daemon)s
        ).start()


database = Database()
app = Flask(__name__)


@app.get("/version")
def version():
    return {"version": getattr(package, "VERSION", 0), "process": os.getpid()}
"""

# The selector of Windows fails on a socket that another thread closes; that of Linux
# does not. Windows fails at once, which short calls of select imitate.
SELECTOR = """
import selectors, socketserver, time

class Selector(selectors.SelectSelector):
    def select(self, timeout=None):
        end = time.monotonic() + (timeout or 0)
        while True:
            ready = super().select(0.005)
            if ready or timeout is not None and time.monotonic() >= end:
                return ready

socketserver._ServerSelector = Selector
"""


# The project's own reload test, and two more: the error occurs at every reload, and
# `flask dev` names the thread. `flask run` runs without the guard of flask_devserver.
TESTS = """
import os
import sys
from pathlib import Path

import pytest

from .core.reload_server import DEV, DEV_WITHOUT_FORK, Server
from .core.test_reload import test_many_reloads_leave_nothing_behind  # noqa: F401

TRACEBACK = "WinError 10038" if sys.platform == "win32" else "Bad file descriptor"


@pytest.fixture
def server(tmp_path, database_url):
    unguarded = str(Path(__file__).parents[1] / "unguarded")
    places = os.pathsep.join([unguarded, os.environ.get("PYTHONPATH", "")])
    with Server(tmp_path, DATABASE_URL=database_url, PYTHONPATH=places) as server:
        yield server


@pytest.mark.parametrize("number", range(3))
def test_traceback(server, number):
    server.save_version()
    server.wait_for(lambda: TRACEBACK in server.log, "traceback")
    assert "in serve_forever" in server.log


@pytest.mark.parametrize("command", [DEV, DEV_WITHOUT_FORK])
def test_flask_dev(tmp_path, database_url, command):
    with Server(tmp_path, command=command, DATABASE_URL=database_url) as server:
        for _ in range(3):
            server.reload()
        server.wait_for(lambda: server.log.count("Reloaded in") == 3, "last line")
    named = "Thread 'pool' is not a daemon thread, so Python waits for it."
    assert named in server.log
    # On a busy machine a process is killed before it has named what blocks it.
    killed = server.log.count("did not exit in time and is killed")
    assert server.log.count(named) + killed == 3
"""
# This module replaces flask_devserver, which would guard `flask run`.
UNGUARDED = """
import click

dev = click.Command("dev")
"""


class Project(NamedTuple):
    """A project for a test to change, and a Python with the packages that it needs."""

    folder: Path
    python: Path


@pytest.fixture
def project(bake: Bake, shared: Path) -> Project:
    python = shared / ".venv" / PROGRAMS.name / "python"
    return Project(bake(project_slug="app"), python)


RELOADS = ["tests/test_wrong.py", "-k", "many_reloads"]


def run_on_wrong_app(
    project: Project, *options: str, daemon: bool, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run tests of the project on the app with the mistake."""
    texts = {
        "tests/core/reload_app.py": APP % {"daemon": daemon},
        "tests/test_wrong.py": TESTS,
        "unguarded/flask_devserver/__init__.py": "",
        "unguarded/flask_devserver/cli.py": UNGUARDED,
    }
    (project.folder / "unguarded" / "flask_devserver").mkdir(parents=True)
    for name, text in texts.items():
        (project.folder / name).write_text(text)
    return pytest_in(project, *options, **environ)


def pytest_in(
    project: Project, *options: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run tests of the project."""
    return subprocess.run(
        [project.python, "-m", "pytest", "-m", "", *options],
        cwd=project.folder,
        env=clean_environment() | {"DEADLINE": "15"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=15 * DEADLINE,
    )


@pytest.fixture
def selector_of_windows(tmp_path: Path) -> str:
    """A folder for PYTHONPATH that gives Python the selector of Windows."""
    if os.name != "nt":
        (tmp_path / "sitecustomize.py").write_text(SELECTOR)
    return str(tmp_path)


def test_non_daemon_thread_fails_the_reload_tests(project: Project) -> None:
    control = run_on_wrong_app(project, *RELOADS, daemon=False)
    assert control.returncode == 1
    assert "AssertionError: no answer of version 1 in 15 s; it wrote:" in control.stdout
    assert "Detected change in" in control.stdout


def test_connection_in_the_parent_fails_the_reload_tests(project: Project) -> None:
    control = run_on_wrong_app(project, *RELOADS, daemon=True)
    assert control.returncode == 1
    assert "AssertionError: no end of other connections in 15 s" in control.stdout


def test_non_daemon_thread_shows_the_windows_traceback(
    project: Project, selector_of_windows: str
) -> None:
    options = ["tests/test_wrong.py", "-k", "traceback"]
    environ = {"PYTHONPATH": selector_of_windows}
    control = run_on_wrong_app(project, *options, daemon=False, **environ)
    assert "3 passed" in control.stdout, control.stdout


def test_project_shows_no_windows_traceback(
    project: Project, selector_of_windows: str
) -> None:
    options = ["tests/core/test_reload.py", "-k", "many_reloads"]
    environ = {"PYTHONPATH": selector_of_windows, "RELOADS": "5"}
    done = pytest_in(project, *options, **environ)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flask dev")
def test_flask_dev_reloads_the_app_and_names_its_thread(project: Project) -> None:
    options = ["tests/test_wrong.py", "-k", "flask_dev"]
    control = run_on_wrong_app(project, *options, daemon=False)
    assert "2 passed" in control.stdout, control.stdout
