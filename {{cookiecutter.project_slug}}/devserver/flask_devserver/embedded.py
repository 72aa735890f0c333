"""Run a server for development and tests, where no other is set up.

The reaper, a process of its own, starts the server in a folder, restarts it when it
dies, and stops it when every client has exited. It polls the clients instead of relying
on a last message from them, so the server also stops after a client was killed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import psutil
from click import ClickException
from filelock import FileLock, Timeout

POLL_INTERVAL = 0.1  # seconds between two polls of the reaper
STOP_TIMEOUT = 30.0  # seconds until a server that does not stop is killed


class EmbeddedServer:
    """A server in the folder `server_dir`.

    The module of each kind of server runs the reaper: `python -m MODULE server_dir`.
    """

    program: str  # a part of the name of its processes
    data: str  # the folder in which they run
    stop_signal = signal.SIGTERM

    def __init__(self, server_dir: Path) -> None:
        self.server_dir = server_dir.absolute()
        # The reaper needs this folder even when somebody has removed the link to it.
        self.home = self.server_dir.resolve()
        # Other users must not be able to hold a lock, so they cannot open its file.
        lock, reaper_lock = map(server_dir.with_suffix, (".lock", ".reaper.lock"))
        self.lock = FileLock(lock, mode=0o600)  # held while the server starts or stops
        self.reaper_lock = FileLock(reaper_lock, mode=0o600)  # held by the reaper

    def join(self) -> None:
        """Start the server if it does not run, and keep it running for this process.

        Under Flask's reloader, it runs until the reloader exits, so that a reload finds
        it. The caller holds `lock`. Raises `ClickException` if it does not start.
        """
        reloaded = os.environ.get("WERKZEUG_RUN_MAIN") == "true"
        client = psutil.Process(os.getppid() if reloaded else os.getpid())
        (self.home / "clients").mkdir(mode=0o700, exist_ok=True)
        # The hash tells a later process with the same id, even if the clock changes.
        (self.home / "clients" / str(client.pid)).write_text(str(hash(client)))
        with suppress(Timeout):  # Then the reaper runs already.
            self.reaper_lock.acquire(blocking=False).lock.release()
            self._start_reaper()

    def _start_reaper(self) -> None:
        # The reaper must not keep a pipe of its first client open.
        with (self.home / "reaper.log").open("w") as log:
            reaper = subprocess.Popen(
                [sys.executable, "-m", type(self).__module__, self.server_dir],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C must stop its clients first.
            )
        with cast("IO[bytes]", reaper.stdout) as output:
            error = output.read().decode() or f"No reaper started: see {log.name}."
        reaper.returncode = 0  # Do not wait for the reaper: it outlives this process.
        if error != "ready":
            raise ClickException(error)

    def reap(self) -> None:
        """Run the server until none of its clients runs: the reaper."""
        self.reaper_lock.acquire()
        (self.home / "reaper").write_text(str(os.getpid()))
        try:
            server = self._restart()
        except ClickException as error:
            print(error.message, end="")
            return
        with suppress(BrokenPipeError):  # The first client may have exited.
            os.write(1, b"ready")
        os.close(1)  # The first client reads the output to its end.
        while self.reaper_lock.is_locked:
            while self._is_needed():
                if not is_running(server):
                    server = self._restart()
                time.sleep(POLL_INTERVAL)
            with self.lock:  # New clients register under the same lock.
                if not self._is_needed():
                    self._stop(server)
                    # Otherwise the next client would rely on this reaper.
                    self.reaper_lock.release()

    def stop(self) -> None:
        """Stop the server, even if clients run."""
        for client in (self.home / "clients").glob("*"):
            client.unlink()
        kill_after(10, self._processes())  # Its reaper may have been killed.
        with self.reaper_lock:  # The reaper has exited.
            pass

    def _restart(self) -> psutil.Process:
        """Start the server. First kill one whose reaper was killed."""
        kill_after(0, self._processes())
        self._start()
        return min(self._processes(), key=psutil.Process.create_time)

    def _start(self) -> None:
        """Start the server and wait until it accepts connections."""
        raise NotImplementedError

    def _stop(self, server: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            server.send_signal(self.stop_signal)
        kill_after(STOP_TIMEOUT, [server])  # The next client waits for its end.

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self.program in process.name():
                    if Path(process.cwd()) == self.home / self.data:
                        found.append(process)
        return found

    def _is_needed(self) -> bool:
        """Return whether a client runs, and the folder has no other reaper.

        If the folder was removed, a new one may have another reaper.
        """
        with suppress(FileNotFoundError):
            own = (self.home / "reaper").read_text() == str(os.getpid())
            return own and self._has_client()
        return False

    def _has_client(self) -> bool:
        return any([self._runs(file) for file in (self.home / "clients").glob("*")])

    def _runs(self, file: Path) -> bool:
        """Return whether the client of `file` runs. If it has exited, remove `file`."""
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            client = psutil.Process(int(file.name))
            # Older versions leave the file empty.
            if file.read_text() in ("", str(hash(client))) and is_running(client):
                return True
        file.unlink(missing_ok=True)
        return False


def free_port(wish: int) -> int:
    """Return the port, or another one if it is in use."""
    with suppress(OSError), socket.create_server(("127.0.0.1", wish)) as server:
        return int(server.getsockname()[1])
    return free_port(0)


def kill_after(seconds: float, processes: list[psutil.Process]) -> None:
    """Wait until the processes have exited, and kill those that have not in time."""
    alive = psutil.wait_procs(processes, timeout=seconds)[1]
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def is_running(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie has exited."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
