"""Start one child process after the other, and read what each says."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from selectors import EVENT_READ, BaseSelector
from typing import Any

from .child import Child

if sys.platform == "win32":
    raise ImportError("flask dev needs Linux or macOS.")


@dataclass(eq=False)
class Runner:
    """Run `child`, by a fork of this process or as a new Python.

    `on_message` gets what the child says, when `selector` has found something to read.
    Everything that is saved after `started`, in seconds since the epoch, asks for
    another version. `pid` is 0 while no version runs. The next one may start at the
    monotonic time `start_at`.
    """

    child: Child
    started: float
    selector: BaseSelector
    on_message: Callable[["Runner", dict[str, Any]], None]
    pid: int = 0
    pipe: int = -1
    line: bytes = b""  # the part of a message that has come so far
    ready: bool = False
    start_at: float = 0.0

    def start(self, close_in_fork: Callable[[], None] | None) -> None:
        """Start a version: as a new Python, or in a fork that closes what is not its.

        The one before may still run, to finish its requests.
        """
        self._close_pipe()  # The last child's messages are not about this one.
        self.pipe, self.child.status_pipe = os.pipe()
        self.selector.register(self.pipe, EVENT_READ, self._read)
        self.ready, self.start_at = False, float("inf")
        self.pid = self._fork(close_in_fork) if close_in_fork else self._spawn()
        os.close(self.child.status_pipe)

    def _fork(self, close: Callable[[], None]) -> int:
        # A signal must wait until the fork has its own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        if pid := os.fork():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
            return pid
        close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        self.child.run()

    def _spawn(self) -> int:
        for fd in self.child.descriptors():
            os.set_inheritable(fd, True)
        fields = json.dumps(asdict(self.child))
        # Without a buffer, a child that is killed loses nothing that it has printed.
        command = [sys.executable, "-u", "-m", "flask_devserver.child", fields]
        blocked = [signal.SIGINT]  # until the child handles it
        return os.posix_spawn(command[0], command, os.environ, setsigmask=blocked)

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
