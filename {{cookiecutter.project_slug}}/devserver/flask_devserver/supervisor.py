"""The process of `flask dev` that stays: it starts a version, and ends it for the next.

It holds the socket that the versions listen on, so that a request during a reload waits
instead of being refused. It imports packages for its forks, but never the application.
A command that runs beside the server, such as a worker, has such a process of its own.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from importlib.util import cache_from_source
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import IO, Any, cast

import click
from dotenv import dotenv_values

from .child import CommandVersion, Version, WebVersion, on_signals
from .cli import CREATED
from .watcher import SETTINGS

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])

# A save starts a reload at once. Those that follow it closely are taken together.
MOMENT = 0.5  # seconds within which a save follows another closely
QUIET = 0.2  # seconds without a save after which those are taken

# Nobody waits for a command beside the server, so it may finish what it does.
COMMAND_DEADLINE = 5.0  # seconds


class Supervisor:
    """Run a version of the application, and another one when a file is saved.

    With `fork`, versions are forks of this process, which imports the packages once;
    else each is a new Python. `created` is the time, in seconds, of before anything of
    the application was read. What is told of reloads is about `name`.
    """

    name = "The application"

    def __init__(self, version: Version, fork: bool, created: float) -> None:
        self.fork = fork
        self.version = version
        version.life, self.life_end = os.pipe()
        self.pid = 0  # of the version that runs
        self.news: IO[bytes] | None = None  # from it
        self.ready = False
        self.ending = False
        self.changed: set[str] = set()  # files that no version has been started with
        self.reloaded: set[str] = set()  # those that this one was started for
        self.saved = self.due = 0.0
        self.began = time.monotonic()
        self.parent = os.getppid()
        # What is saved from then on, another version is started for.
        self.created = float(os.environ.pop("_FLASK_DEV_CREATED", created))
        self.environ = _own_environment()
        self.packages = SITE_PACKAGES.stat().st_mtime_ns

    def run(self) -> Version | None:
        """Run versions until a signal; return None, or in a fork the one to run."""
        self.signals = on_signals(
            self._on_signal,
            signal.SIGCHLD,
            signal.SIGINT,
            signal.SIGTERM,
            signal.SIGHUP,
        )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        self.watcher = _start_watcher(self.created)
        self._register()
        forked = self._start()
        while not (forked or self.ending or os.getppid() != self.parent):
            for key, _ in self.selector.select(self._until_due()):
                key.data(key.fileobj)
            if self.due and self._until_due() == 0:
                forked = self._reload()
        if forked:
            return self.version
        self._close()
        return None

    def _close(self) -> None:
        # Whoever ends the server does not wait long.
        self._end(min(self.version.deadline, 0.4))
        self.watcher.kill()

    def _register(self) -> None:
        self.selector = DefaultSelector()
        self.selector.register(self.signals, EVENT_READ, self._on_wakeup)
        saved = cast("IO[bytes]", self.watcher.stdout)
        self.selector.register(saved, EVENT_READ, self._on_saved)

    def _until_due(self) -> float:
        return min(max(self.due - time.monotonic(), 0), 0.5) if self.due else 0.5

    def _on_signal(self, number: int, _: object) -> None:
        self.ending = self.ending or number != signal.SIGCHLD

    def _on_wakeup(self, signals: socket.socket) -> None:
        signals.recv(1024)
        if self.pid and self._has_ended():
            message = f" * {self.name} has ended by itself; save a file to begin anew."
            print(message, flush=True)

    def _on_saved(self, output: IO[bytes]) -> None:
        line = output.readline()
        if not line:
            raise click.ClickException("The watcher of flask dev has ended.")
        now = time.monotonic()
        self.due = now + (QUIET if now - self.saved < MOMENT else 0)
        self.saved = now
        self.changed.update(json.loads(line))

    def _on_news(self, news: IO[bytes]) -> None:
        line = news.readline()
        if not line:
            self._close_news()
        elif not self.ready:
            self._say_ready()
        elif self.fork and line.endswith(b"\n"):  # it may have ended meanwhile
            self._import(json.loads(line))

    def _say_ready(self) -> None:
        self.ready = True
        self.version.first = False

    def _close_news(self) -> None:
        if self.news:
            self.selector.unregister(self.news)
            self.news.close()
            self.news = None

    def _import(self, modules: list[str]) -> None:
        for name in modules:
            if name not in sys.modules:
                with suppress(BaseException):  # whatever it raised, it did not before
                    import_module(name)
        gc.freeze()  # so that a fork knows its own objects from these
        if threading.active_count() > 1:
            self.fork = False
            print(" * A package starts a thread when imported: no forks.", flush=True)

    def _reload(self) -> bool:
        self.due = 0.0
        self.began = time.monotonic()
        if self.ready:
            self.reloaded.clear()
        self._end(self.version.deadline)
        self.reloaded |= self.changed
        self.changed.clear()
        for path in self.reloaded:
            _forget_bytecode(path)
        names = {Path(path).name for path in self.reloaded}
        if names & SETTINGS or SITE_PACKAGES.stat().st_mtime_ns != self.packages:
            self._begin_anew()
        return self._start()

    def _start(self) -> bool:
        """Start a version; return whether this is the fork in which to serve it."""
        self._close_news()  # what the version before said is not about this one
        news, self.version.news = os.pipe()
        self.version.began = self.began
        self.ready = False
        sys.stdout.flush()
        if self.fork:
            # Until a fork has its own handlers, a signal to it must wait.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            self.pid = os.fork()
            if self.pid == 0:
                self._close_in_fork(news)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            if self.pid == 0:
                return True
        else:
            self.pid = _spawn(self.version)
        os.close(self.version.news)
        self.news = os.fdopen(news, "rb", buffering=0)  # as with the watcher's
        self.selector.register(self.news, EVENT_READ, self._on_news)
        return False

    def _close_in_fork(self, news: int) -> None:
        signal.set_wakeup_fd(-1)
        for end in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(end, signal.SIG_DFL)
        self.selector.close()
        self.signals.close()
        os.close(self.life_end)  # or this process would not notice the end of the other
        os.close(news)
        for pipe in (self.watcher.stdin, self.watcher.stdout):
            cast("IO[bytes]", pipe).close()
        self.watcher.returncode = 0  # it is not this process that waits for it

    def _end(self, deadline: float) -> None:
        if self.pid:
            # It ends at once while it starts. Later it says itself why it does not end.
            self._signal(signal.SIGTERM)
            if not self._await_end(deadline + 0.3):
                print(f" * {self.name} is ended by force.", flush=True)
                self._signal(signal.SIGKILL)
                self._await_end(5)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _await_end(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        with DefaultSelector() as selector:
            selector.register(self.signals, EVENT_READ)
            while not self._has_ended() and time.monotonic() < end:
                if selector.select(end - time.monotonic()):
                    self.signals.recv(1024)
        return not self.pid

    def _has_ended(self) -> bool:
        pid, _ = os.waitpid(self.pid, os.WNOHANG) if self.pid else (1, 0)
        self.pid = 0 if pid else self.pid
        return not self.pid

    def _begin_anew(self) -> None:
        """Become a new process, with packages and environment as they are by now."""
        self.watcher.kill()
        self.watcher.wait()
        python = [sys.executable, *sys.orig_argv[1:]]
        environ = self.environ | {"_FLASK_DEV_CREATED": str(time.time())}
        os.execve(sys.executable, python, environ)  # noqa: S606  # its own command


class WebSupervisor(Supervisor):
    """Serve the application, with the command `command` beside it, if any."""

    def __init__(
        self,
        app: str | None,
        host: str,
        port: int,
        deadline: float,
        fork: bool,
        browser_reload: bool,
        command: str | None,
        created: float,
    ) -> None:
        self.listener = _listen(host, port)
        self.url = f"http://{host}:{self.listener.getsockname()[1]}"
        version = WebVersion(
            app=app,
            deadline=deadline,
            host=host,
            port=port,
            listener=self.listener.fileno(),
            browser_reload=browser_reload,
        )
        super().__init__(version, fork, created)
        self.command = CommandVersion(
            app=app, deadline=COMMAND_DEADLINE, name=command or ""
        )
        self.beside: subprocess.Popen[bytes] | None = None

    def run(self) -> Version | None:
        if self.command.name:
            self.beside = _start_beside(self.command, self.fork, self.environ)
        return super().run()

    def _close(self) -> None:
        self._close_beside()  # which then ends, while the application does
        super()._close()
        self._await_beside()

    def _close_beside(self) -> None:
        if self.beside:
            cast("IO[bytes]", self.beside.stdin).close()

    def _await_beside(self) -> None:
        if self.beside:
            self.beside.wait(5)

    def _close_in_fork(self, news: int) -> None:
        super()._close_in_fork(news)
        self._close_beside()
        if self.beside:
            self.beside.returncode = 0  # it is not this process that waits for it

    def _say_ready(self) -> None:
        seconds = time.monotonic() - self.began
        files = ", ".join(sorted(self.reloaded))
        if self.version.first:
            print(f" * Serving {self.url}; Ctrl-C ends it.", flush=True)
        else:
            print(f" * Reloaded in {seconds:.2f} s: {files}", flush=True)
        super()._say_ready()

    def _begin_anew(self) -> None:
        print(" * Packages or settings have changed: starting anew.", flush=True)
        self._close_beside()
        self._await_beside()
        os.set_inheritable(self.listener.fileno(), True)
        self.environ["_FLASK_DEV_LISTENER"] = str(self.listener.fileno())
        super()._begin_anew()


class CommandSupervisor(Supervisor):
    """Run a command of the application beside the server, which it ends with."""

    def __init__(self, version: CommandVersion, fork: bool, created: float) -> None:
        super().__init__(version, fork, created)
        self.name = f"flask {version.name}"

    def _register(self) -> None:
        super()._register()
        self.selector.register(sys.stdin, EVENT_READ, self._on_end_of_server)

    def _on_end_of_server(self, _: object) -> None:
        self.ending = True


def _listen(host: str, port: int) -> socket.socket:
    if fd := os.environ.pop("_FLASK_DEV_LISTENER", None):
        return socket.socket(fileno=int(fd))
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        place = f"--host {host} --port {port}"
        message = f"{place} cannot be had ({error.strerror}): end what listens there"
        raise click.ClickException(f"{message}, or use another.") from None


def _own_environment() -> dict[str, str]:
    """Return the environment without what Flask has read from .env and .flaskenv."""
    read = dotenv_values(".flaskenv") | dotenv_values(".env")
    return {k: v for k, v in os.environ.items() if read.get(k) != v}


def _forget_bytecode(path: str) -> None:
    # Python takes it for good when the file was saved twice within a second.
    if path.endswith(".py"):
        with suppress(OSError):  # there may be none, or another user's
            Path(cache_from_source(path)).unlink()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Start a process in which Ctrl-C, which all get, waits until it is handled."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _start_watcher(began: float) -> subprocess.Popen[bytes]:
    with _no_interrupt():
        return subprocess.Popen(
            [sys.executable, "-m", "flask_devserver.watcher", str(began)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # or a line could wait in a buffer, where no selector sees it
        )


def _spawn(version: Version) -> int:
    kind, fields = type(version).__name__, json.dumps(asdict(version))
    with _no_interrupt():
        process = subprocess.Popen(
            [sys.executable, "-m", "flask_devserver.child", kind, fields],
            pass_fds=version.descriptors(),
        )
    process.returncode = 0  # the supervisor waits for it, by its id
    return process.pid


def _start_beside(
    version: CommandVersion, fork: bool, environ: dict[str, str]
) -> subprocess.Popen[bytes]:
    # A process of its own, so that neither waits for the other to reload.
    options = json.dumps({"version": asdict(version), "fork": fork})
    with _no_interrupt():
        return subprocess.Popen(
            [sys.executable, "-m", "flask_devserver.supervisor", options],
            stdin=subprocess.PIPE,
            env=environ,
        )


def _run_beside(options: dict[str, Any]) -> None:
    version = CommandVersion(**options["version"])
    supervisor = CommandSupervisor(version, options["fork"], CREATED)
    if forked := supervisor.run():
        forked.run()


if __name__ == "__main__":
    _run_beside(json.loads(sys.argv[1]))
