"""An application of one module, served by `flask dev` in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest

from .core.reload_server import _free_port, poll

SECONDS = 20.0

BASE = """
from flask import Flask
app = Flask(__name__)
VERSION = 0


@app.get("/version")
def version():
    return str(VERSION)
"""
FORKING = pytest.param((), id="fork")
NEW_PYTHON = pytest.param(("--no-fork",), id="no-fork")
BOTH = pytest.mark.parametrize("options", [FORKING, NEW_PYTHON])
linux = pytest.mark.skipif(sys.platform != "linux", reason="a feature of Linux")


class Site:
    """An application of one module in a folder, and a command that serves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = folder / "served.py"
        self.port = _free_port()
        self.port_option: Sequence[str] = ("--port", str(self.port))
        self.app = "served"
        self.version = 0
        self.environ = {"PYTHONIOENCODING": "utf-8"}
        self.prefix: Sequence[str] = ()
        self.stdin: Any = subprocess.DEVNULL
        self.process: psutil.Popen | None = None

    def start(
        self, *options: str, command: Sequence[str] = ("dev",), wait: bool = True
    ) -> Self:
        """Serve the module, and wait for its first response unless told otherwise."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("FLASK_")}
        environ.pop("PYTHONUNBUFFERED", None)
        with (self.folder / "log").open("ab") as log:
            self.process = psutil.Popen(
                [*self.prefix, sys.executable, "-m", "flask", "--app", self.app]
                + [*command, *self.port_option, *options],
                cwd=self.folder,
                env=environ | self.environ,
                stdin=self.stdin,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait_for(lambda: self.get("/version"), "response")
        return self

    def move_module(self, folder: str) -> Path:
        """Move the module into a folder below; return the folder."""
        target = self.folder / folder
        target.mkdir()
        self.module = self.module.rename(target / self.module.name)
        return target

    def put_on_path(self, folder: Path) -> None:
        """Let the application import what is in the folder."""
        given = os.environ.get("PYTHONPATH", "")
        self.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{given}"

    def write(self, text: str = "") -> None:
        """Write the module with `text` after the routes that each test has."""
        self.module.write_text(BASE + text)

    def save(self) -> None:
        """Save a new version."""
        self.version += 1
        text = re.sub(
            r"VERSION = \d+", f"VERSION = {self.version}", self.module.read_text()
        )
        draft = self.folder / ".draft"
        draft.write_text(text)
        draft.replace(self.module)

    def reload(self) -> None:
        """Save a new version and wait for its response."""
        self.save()
        self.wait_for(self.is_new, f"response of version {self.version}")

    def is_new(self) -> bool:
        """Return whether the version that was saved last responds."""
        return self.get("/version") == str(self.version)

    def get(self, path: str, seconds: float = 5) -> str:
        """Return the response, that of an error too, or nothing without one."""
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urlopen(url, timeout=seconds) as response:
                return str(response.read().decode())
        except HTTPError as error:
            return error.read().decode()
        except OSError:
            return ""

    def wait_for(self, condition: Any, what: str) -> Any:
        """Wait until the condition holds; fail with the log if it never does."""
        if found := poll(condition, SECONDS):
            return found
        raise AssertionError(f"no {what} in {SECONDS:g} s; it wrote:\n{self.log}")

    def wait_for_line(self, text: str) -> None:
        """Wait until the log has the text."""
        self.wait_for(lambda: text in self.log, f"line {text!r}")

    def reloads_after(self, path: str, text: str, seconds: float = SECONDS) -> bool:
        """Write a file below the folder; return whether a reload names it in time."""
        file = self.folder / path
        before = self.log.count(file.name)
        file.write_text(text)
        return bool(poll(lambda: self.log.count(file.name) > before, seconds))

    def stays(self, seconds: float = 3) -> bool:
        """Return whether it reloads nothing within `seconds`."""
        before = self.reloads
        return not poll(lambda: self.reloads > before, seconds)

    def check_stays(self, seconds: float = 3) -> None:
        """Fail with the log if it reloads anything within `seconds`."""
        assert self.stays(seconds), self.log

    @property
    def reloads(self) -> int:
        """How often it has reloaded."""
        return self.log.count("Reloaded in")

    def interrupt(self) -> None:
        """Stop it as Ctrl-C does, and wait for its end."""
        assert self.process
        os.killpg(self.process.pid, signal.SIGINT)
        process = self.process
        self.wait_for(lambda: process.poll() is not None, "end")

    def kill(self) -> None:
        """Kill what is left of it."""
        if self.process:
            family = [self.process]
            with suppress(psutil.Error):
                family += self.process.children(recursive=True)
            for each in family:
                with suppress(psutil.Error):
                    each.kill()
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def log(self) -> str:
        """The output of the server and the application."""
        return (self.folder / "log").read_text(errors="backslashreplace")
