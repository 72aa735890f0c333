"""Start versions of the application, and stop them with everything they started."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from selectors import EVENT_READ, BaseSelector
from typing import Any, cast

from . import say
from .child import Child

if sys.platform == "win32":
    raise ImportError("flask dev needs Linux or macOS.")

ORPHAN_DELAY = 0.1  # seconds in which a child's programs may exit with it
ORPHAN_DEADLINE = 1.0  # seconds from SIGTERM to SIGKILL

PR_SET_CHILD_SUBREAPER = 36

STOPPING = (signal.SIGTERM, signal.SIGINT)

# The embedded servers outlive a version on purpose, and end with the supervisor.
SERVICES = ("postgres", "valkey-server", "redis-server")


@dataclass(eq=False)
class Runner:
    """Run `child`, in a fork of this process or as a new Python.

    `on_message` gets the child's messages, which `selector` waits for. A save after
    `started`, in seconds since the epoch, asks for another version. `pid` is 0 while no
    version runs. The next version may start at the monotonic time `start_at`.
    """

    child: Child
    started: float
    selector: BaseSelector
    on_message: Callable[["Runner", dict[str, Any]], None]
    pid: int = 0
    pipe: int = -1
    line: bytes = b""  # the part of a message that has arrived so far
    ready: bool = False
    start_at: float = 0.0

    def start(self, close_in_fork: Callable[[], None] | None) -> None:
        """Start a version in a fork, which calls `close_in_fork`, or as a new Python.

        The previous version may still run, to finish its requests.
        """
        self._close_pipe()  # It may have messages of the previous child.
        self.pipe, self.child.status_pipe = os.pipe()
        self.selector.register(self.pipe, EVENT_READ, self._read)
        self.ready, self.start_at = False, float("inf")
        # A signal must wait until the fork has its own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            self.pid = os.fork() if close_in_fork else self._spawn()
        except OSError as error:  # The user has too many processes, for example.
            say(f" * {self.child.name} cannot start, and tries again: {error}")
            self.start_at = time.monotonic() + 1
        else:
            if close_in_fork and not self.pid:
                close_in_fork()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
                self.child.run()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        os.close(self.child.status_pipe)

    def _spawn(self) -> int:
        for fd in self.child.descriptors():
            os.set_inheritable(fd, True)
        environ = os.environ | {"_FLASK_DEV_CHILD": json.dumps(asdict(self.child))}
        # A `calendar.py` in this folder must not take the place of Python's own (-P).
        # Without a buffer (-u), a killed child loses no output.
        flags = cast(Any, subprocess)._args_from_interpreter_flags()
        module = ["-Pu", "-m", "flask_devserver.child"]
        command = [sys.executable, *flags, *module, *sys.argv[1:]]
        blocked = [signal.SIGINT]  # until the child handles it
        return os.posix_spawn(command[0], command, environ, setsigmask=blocked)

    def _read(self) -> None:
        if data := os.read(self.pipe, 65536):
            *lines, self.line = (self.line + data).split(b"\n")
            for line in lines:
                self.on_message(self, json.loads(line))
        else:
            self._close_pipe()

    def _close_pipe(self) -> None:
        if self.pipe >= 0:
            self.selector.unregister(self.pipe)
            os.close(self.pipe)
            self.pipe, self.line = -1, b""


class Processes:
    """The processes that must exit, each with its next signal and the time for it."""

    def __init__(self) -> None:
        self.dying: dict[int, tuple[float, signal.Signals, str]] = {}
        # These are daemons whose names were printed, and children from before.
        self.kept = _children()
        self.of_packages: set[int] = set()  # programs that packages have started
        if sys.platform == "linux":  # Orphans become children of this process.
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.settings: list[Any] = []  # of the terminal, if the standard input is one
        with suppress(termios.error, OSError, ValueError):
            self.settings = termios.tcgetattr(0)

    def keep_programs(self, since: float) -> None:
        """Keep what a package has started since a time, in seconds since boot."""
        ticks = int(since * os.sysconf("SC_CLK_TCK"))
        new = {pid for pid in _children() if _start_time(pid) >= ticks}
        # An orphan of the application may have arrived meanwhile.
        new = {pid for pid in new if b"_FLASK_DEV=" not in _read(pid, "environ")}
        self.of_packages |= new

    def end_programs_of_packages(self) -> None:
        """Stop what packages have started."""
        for pid in self.of_packages & _children():
            self._end_orphan(pid)
        self.of_packages.clear()

    def end(self, pid: int, seconds: float, name: str) -> None:
        """Ask a process to exit, and kill it after that many `seconds`."""
        send_signal(pid, signal.SIGTERM)
        self.kill_after(pid, seconds, name)

    def kill_after(self, pid: int, seconds: float, name: str) -> None:
        """Kill a process that has not exited after that many `seconds`."""
        self.dying[pid] = (time.monotonic() + seconds, signal.SIGKILL, name)

    def signal_overdue(self) -> None:
        """Send the signals that are due."""
        for pid, (due, number, name) in list(self.dying.items()):
            if time.monotonic() >= due and number == signal.SIGTERM:
                say(f" * Stopping what the application left running: {name}")
                self.end(pid, ORPHAN_DEADLINE, name)
            elif time.monotonic() >= due:
                say(f" * {name} did not exit in time and is killed.")
                self.kill_after(pid, float("inf"), name)
                send_signal(pid, number)

    def ended(self) -> Iterator[tuple[int, int | None]]:
        """Yield each exited process, with its status unless it was asked to exit."""
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                self.kept.discard(pid)
                self.of_packages.discard(pid)
                self._restore_terminal()
                yield pid, None if self.dying.pop(pid, None) else status

    def _restore_terminal(self) -> None:
        with suppress(termios.error, OSError):  # This process may be in the background.
            if self.settings and os.tcgetpgrp(0) == os.getpgrp():
                termios.tcsetattr(0, termios.TCSANOW, self.settings)

    def end_orphans(self, known: Iterable[int], successor: int) -> None:
        """Stop the children of this process that are not known.

        A child that started after the process `successor` belongs to that one.
        """
        kept = self.kept | self.of_packages
        for pid in _children().difference(known, self.dying, kept):
            if _start_time(pid) < _start_time(successor):
                self._end_orphan(pid)

    def _end_orphan(self, pid: int) -> None:
        command = os.fsdecode(_read(pid, "cmdline").replace(b"\0", b" ")).strip()
        name = f"{command} (pid {pid})"
        with suppress(ProcessLookupError):
            if os.getsid(pid) == os.getsid(0):
                self.dying[pid] = time.monotonic() + ORPHAN_DELAY, signal.SIGTERM, name
                return
        # The process has left the session, as daemons do.
        self.kept.add(pid)
        program = os.path.basename(command.partition(" ")[0]).rstrip(":")
        if program not in SERVICES and "flask_devserver" not in command:
            say(f" * Left running in its own session: {name}")


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it still exists."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def seconds_since_boot() -> float:
    """Return the time on the clock that Linux uses for the start of a process."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _children() -> set[int]:
    """Return the children of this process, on Linux."""
    with suppress(OSError):
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        return set(map(int, children.read_text().split()))
    return set()


def _start_time(pid: int) -> float:
    """Return when a process has started, or infinity if it has exited."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return float(fields[19]) if fields and fields[0] != b"Z" else float("inf")


def _read(pid: int, name: str) -> bytes:
    """Return what Linux says about a process, or nothing if it has exited."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""
