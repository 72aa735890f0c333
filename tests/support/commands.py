"""Run commands as a user would, and wait for conditions."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

TEMPLATE = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent

# The settings that every project requires in production, besides a database.
SETTINGS = {
    "FLASK_SKIP_DOTENV": "1",
    "SECRET_KEY": "0123456789abcdef" * 2,
    "TRUSTED_HOSTS": "127.0.0.1",
}

# A proxy of the network cannot reach this machine's own servers.
DIRECT = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
os.environ["no_proxy"] = f"127.0.0.1,localhost,{DIRECT}"

# An environment in which a shell finds the programs of the tests.
ON_PATH = {"PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}

# Seconds until a wait fails. A wait ends as soon as its condition holds.
DEADLINE = float(os.environ.get("DEADLINE", "120"))


def clean_environment() -> dict[str, str]:
    """Return the environment without settings of Python, Flask, pytest and make."""
    ours = ("PYTHON", "FLASK", "VIRTUAL_ENV", "DATABASE_URL", "SECRET_KEY", "PYTEST")
    ours += ("MAKE", "MFLAGS")  # The tests may run under `make test`.
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Run a command and return its output. If the command fails, fail the test."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment() | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=15 * DEADLINE,
    )
    if done.returncode:
        pytest.fail(f"{command} exited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def command_lines() -> list[str]:
    """Return the command lines of all processes on this machine."""
    found = psutil.process_iter(["cmdline"])
    return [" ".join(process.info["cmdline"] or []) for process in found]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Wait until `condition` returns a true value, and return that value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"no {what} in {seconds:g} s")
        time.sleep(0.05)
    return found
