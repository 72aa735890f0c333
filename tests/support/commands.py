"""Commands, run as a user would run them, and waits for what they do."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent


def clean_environment() -> dict[str, str]:
    """Return the environment without what this machine or the tests set for Python."""
    ours = ("PYTHON", "FLASK", "VIRTUAL_ENV", "DATABASE_URL", "SECRET_KEY", "PYTEST")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Run a command as a user would and return its output; fail with it if it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment() | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Wait until `condition` is true and return it; fail when it does not come true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"no {what} in {seconds:g} s")
        time.sleep(0.05)
    return found
