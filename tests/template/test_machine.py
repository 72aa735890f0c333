"""The tests need only make and Python on the machine."""

import os
import subprocess
from pathlib import Path

import pytest

from ..support.commands import PROGRAMS, TEMPLATE, clean_environment
from ..support.machine import BROWSERS, NO_BROWSER, broker_server, open_browser

pytestmark = pytest.mark.slow

LACKING = {*BROWSERS, "redis-server", "redis-cli", "valkey-server"}


@pytest.mark.machine
def test_broker_starts() -> None:
    done = subprocess.run([broker_server(), "--version"], capture_output=True)
    assert done.returncode == 0


@pytest.mark.machine
def test_browser_opens_a_page() -> None:
    with open_browser() as browser:
        page = browser.new_page()
        page.set_content("<h1>Notes</h1>")
        assert page.locator("h1").text_content() == "Notes"


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with all programs of this machine except for LACKING."""
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*"):
            link = tmp_path / program.name
            if program.name not in LACKING and not link.is_symlink():
                link.symlink_to(program)
    return str(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows lacks symbolic links")
@pytest.mark.parametrize("ci", ["", "true"])
def test_suite_runs_without_browser_and_broker(bare_path: str, ci: str) -> None:
    done = subprocess.run(
        [PROGRAMS / "pytest", "-n0", "-m", "machine", "tests/template"],
        cwd=TEMPLATE,
        env=clean_environment() | {"PATH": bare_path, "CI": ci, "BROKER": ""},
        capture_output=True,
        text=True,
    )
    if NO_BROWSER not in done.stdout:  # Chrome may be outside the PATH.
        assert " 2 passed" in done.stdout, done.stdout
    elif ci:
        assert " 1 failed, 1 passed" in done.stdout, done.stdout
    else:
        assert " 1 passed, 1 skipped" in done.stdout, done.stdout
