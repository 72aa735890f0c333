"""Negative controls: apps built the wrong way fail the reload tests of a project.

A small app of the kind that reload breaks on everywhere is put into a baked project and
run through its own tests/test_reload.py, so that these are known to be able to fail.
"""

import subprocess
from pathlib import Path

import pytest

from .conftest import Bake, clean_environment
from .test_projects import install

# An app with a database object at module level; `daemon` is whether its thread is one.
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
        threading.Thread(target=self.closed.wait, daemon=%(daemon)s).start()


database = Database()
app = Flask(__name__)


@app.get("/version")
def version():
    return {"version": getattr(package, "VERSION", 0), "process": os.getpid()}
"""

# The selector that Windows has: it fails on a socket that was closed meanwhile, where
# Linux' own goes on in silence. In slices, for Windows says so at once.
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


def reload_ten_times(
    project: Path, daemon: bool, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run the test of ten reloads, under Flask's own server, on the app built wrong."""
    (project / "tests" / "probe.py").write_text(APP % {"daemon": daemon})
    programs = install(project)
    return subprocess.run(
        [programs / "pytest", "-k", "test_ten_reloads and run", "tests/test_reload.py"],
        cwd=project,
        env=clean_environment() | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


@pytest.fixture
def selector_of_windows(tmp_path: Path) -> str:
    """A folder for PYTHONPATH that gives Python on Linux the selector of Windows."""
    (tmp_path / "sitecustomize.py").write_text(SELECTOR)
    return str(tmp_path)


def test_thread_that_is_no_daemon_is_caught(bake: Bake) -> None:
    project = bake(project_slug="app")
    control = reload_ten_times(project, daemon=False)
    assert control.returncode == 1
    assert "AssertionError: no answer of version 1 in 20 s; it wrote:" in control.stdout
    assert "Detected change in" in control.stdout


def test_same_thread_shows_the_traceback_of_windows(
    bake: Bake, selector_of_windows: str
) -> None:
    project = bake(project_slug="app")
    control = reload_ten_times(project, False, PYTHONPATH=selector_of_windows)
    assert control.returncode == 1
    assert "in serve_forever" in control.stdout
    assert "OSError: [Errno 9] Bad file descriptor" in control.stdout


def test_connection_of_the_reloaders_parent_is_caught(bake: Bake) -> None:
    project = bake(project_slug="app")
    control = reload_ten_times(project, daemon=True)
    assert control.returncode == 1
    assert "AssertionError: no end of other connections in 20 s" in control.stdout
