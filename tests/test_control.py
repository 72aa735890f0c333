"""Negative controls: apps built the wrong way fail the reload tests of a project.

They are what everybody's reload breaks on, put into a baked project and run through its
own tests/test_reload.py, so that these tests are known to be able to fail.
"""

import subprocess
from pathlib import Path

import pytest

from .conftest import Bake, clean_environment
from .test_projects import install

# A database object at module level, whose thread is no daemon.
THREAD = """

import threading


class Database:
    def __init__(self) -> None:
        self.closed = threading.Event()
        threading.Thread(target=self.closed.wait).start()


database = Database()
"""

# A connection that is opened as the module is imported, in every process that does.
CONNECTION = """

import os

import psycopg2

database = psycopg2.connect(
    os.environ["DATABASE_URL"], application_name=f"process {os.getpid()}"
)
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


def spoil(project: Path, text: str) -> None:
    """Add `text` to the app that the reload tests serve."""
    with (project / "tests" / "probe.py").open("a") as module:
        module.write(text)


def reload_ten_times(project: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    programs = install(project)
    return subprocess.run(
        [programs / "pytest", "-k", "test_ten_reloads", "tests/test_reload.py"],
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
    spoil(project, THREAD)
    control = reload_ten_times(project)
    assert control.returncode == 1
    assert "AssertionError: no answer of version 1 in 20 s; it wrote:" in control.stdout
    assert "Detected change in" in control.stdout


def test_same_thread_shows_the_traceback_of_windows(
    bake: Bake, selector_of_windows: str
) -> None:
    project = bake(project_slug="app")
    spoil(project, THREAD)
    control = reload_ten_times(project, PYTHONPATH=selector_of_windows)
    assert control.returncode == 1
    assert "in serve_forever" in control.stdout
    assert "OSError: [Errno 9] Bad file descriptor" in control.stdout


def test_connection_of_the_reloaders_parent_is_caught(bake: Bake) -> None:
    project = bake(project_slug="app")
    spoil(project, CONNECTION)
    control = reload_ten_times(project)
    assert control.returncode == 1
    assert "assert processes_connected(db) <= {new}" in control.stdout
