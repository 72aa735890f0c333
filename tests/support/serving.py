"""Serve a baked project with `flask dev`, and request its pages."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from .commands import DEADLINE, clean_environment, command_lines, wait_for
from .projects import install


class Site:
    """The project in `folder`, installed, which `flask dev` serves on `port`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = folder / "log"
        self.command = [install(folder) / "flask", "dev", "--port", str(self.port)]

    @contextmanager
    def serve(self, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Serve it until the end of the block, in a session of its own."""
        with running(self.command, self.folder, self.log, **streams) as server:
            wait_for(lambda: self.page("notes"), "page")
            yield server

    def page(self, path: str, **form: str) -> str:
        """Return the response to a GET of `path`, or to a POST of the form if given."""
        return page(self.url + path, **form)

    def is_gone(self) -> bool:
        """Return whether no process of the project runs, and its port is free."""
        runs = any(str(self.folder) in line for line in command_lines())
        postmaster = self.folder / "instance" / "postgres" / "data" / "postmaster.pid"
        with suppress(OSError), socket.create_server(("127.0.0.1", self.port)):
            return not runs and not postmaster.exists()
        return False


@contextmanager
def running(
    command: Sequence[str | Path],
    cwd: Path,
    log: Path,
    seconds: float = DEADLINE,
    **streams: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a session of its own, and stop it as Ctrl-C does.

    It has `seconds` to exit. Its output goes to the end of `log`.
    """
    with log.open("ab") as output:
        server = subprocess.Popen(
            command,
            cwd=cwd,
            env=clean_environment(),
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            | streams,
        )
    try:
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGINT)
        server.wait(seconds)


def page(url: str, **form: str) -> str:
    """Return the response to a GET of `url`, or to a POST of the form if given."""
    data = urlencode(form).encode() if form else None
    with (
        suppress(URLError, ConnectionError),
        urlopen(url, data, timeout=DEADLINE) as response,
    ):
        return str(response.read().decode())
    return ""


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
