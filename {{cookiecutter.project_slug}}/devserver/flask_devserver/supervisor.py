"""The parent process of `flask dev`: starts a child and replaces it on a change.

The parent owns the listening socket, so requests made during a reload wait instead of
failing. It imports third-party packages, which forked children inherit, but never the
application. A command run with `--with` has its own supervisor.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import termios
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from importlib.util import cache_from_source
from io import TextIOWrapper
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import click
from dotenv import dotenv_values
from werkzeug.serving import get_sockaddr, make_ssl_devcert, select_address_family

from . import orphans
from .child import Child, CommandChild, WebChild, on_signals
from .cli import CREATED
from .files import SETTINGS, Events, Files, is_watched_module, module_files

if sys.platform == "win32":
    raise ImportError("flask dev needs Linux or macOS.")

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])

# A save starts a reload at once. Those that follow it closely are taken together.
BURST_WINDOW = 0.5  # seconds within which a save follows another closely
DEBOUNCE = 0.2  # seconds without a save after which those are taken
SETTLE = 0.005  # seconds from an event to the scan, in which a file is written

SCAN_INTERVAL = 1.0  # seconds between two scans without an event
POLL_INTERVAL = 0.3  # where there are no events
SCAN_SHARE = 20  # A scan takes at most the 20th part of the time.

COMMAND_DEADLINE = 5.0  # seconds; nobody waits for a command, so it may finish its work
KILL_MARGIN = 0.3  # seconds more than the deadline, for a child to name the culprit
ORPHAN_DELAY = 0.1  # seconds for what a child has started to end with it
ORPHAN_DEADLINE = 1.0  # seconds from SIGTERM to SIGKILL


class Supervisor:
    """Run a version of the application, and another one when a file is saved.

    With `fork`, children are forks of this process, which imports the packages once;
    without, each is a new Python. `created` is the time, in seconds, before anything of
    the application was read. `watch` and `exclude` are paths and patterns of files.
    """

    name = "The application"

    def __init__(
        self,
        child: Child,
        fork: bool,
        created: float,
        reload: bool = True,
        watch: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        self.fork = fork
        self.child = child
        child.parent_pipe, self.parent_end = os.pipe()
        self.pid = 0  # of the child that runs
        self.status_pipe = -1  # from it
        self.status = b""  # the part of a line that has come so far
        self.ready = self.draining = self.stopping = False
        self.ending = self.hurry = self.importing = False
        self.interrupted = 0.0
        self.dying: dict[int, tuple[float, signal.Signals]] = {}  # by pid
        self.named: set[int] = set()  # processes that were left running
        self.changed: set[str] = set()  # files that no child has been started with
        self.reloaded: set[str] = set()  # those that this one was started for
        self.to_import: deque[str] = deque()
        self.loaded: set[str] = set()  # files of the modules of this process
        self.saved = self.reload_at = 0.0
        self.began = time.monotonic()
        self.parent = os.getppid()
        self.ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        # Everything that is saved from this time on starts another child.
        self.started = float(os.environ.pop("_FLASK_DEV_CREATED", created))
        self.environ = _own_environment()
        self.packages = _packages_changed_at()
        self.reload, self.watch, self.exclude = reload, watch, exclude
        self.terminal = _terminal_settings()

    def run(self) -> Child | None:
        """Run children until a signal; return None, or in a fork the one to run."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # Names may be bytes.
        numbers = [signal.SIGCHLD, signal.SIGINT, signal.SIGTERM]
        numbers += [] if self.ignores_hangup else [signal.SIGHUP]
        self.signals = on_signals(self._on_signal, *numbers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        orphans.adopt()
        self.selector = DefaultSelector()
        self.selector.register(self.signals, EVENT_READ, self._on_wakeup)
        self._register()
        forked = self._start()
        if not forked:
            self._watch_files()
        while not (forked or self.ending):
            self._wait(self._next_event())
            self._import_next()
            if time.monotonic() >= self.scan_at:
                self._scan()
            if os.getppid() != self.parent and not self.ignores_hangup:
                say(" * The process that started flask dev has ended, so it ends, too.")
                self.ending = True
            elif self.reload_at and time.monotonic() >= self.reload_at:
                forked = self._reload()
        if forked:
            return self.child
        self._close()
        return None

    def _register(self) -> None:
        """Register with the selector what else there is to wait for."""

    def _close(self) -> None:
        # Nobody who stops the server waits long for a request.
        self._stop_child(min(self.child.deadline, 0.4))
        while self.dying and not self.hurry:
            self._wait(0.05)
        for pid in self.dying:
            _send_signal(pid, signal.SIGKILL)

    def _wait(self, seconds: float) -> None:
        """Handle what comes within so many seconds, and kill what is overdue."""
        for key, _ in self.selector.select(max(seconds, 0)):
            key.data()
        now = time.monotonic()
        for pid, (due, number) in list(self.dying.items()):
            if now >= due:
                self._kill(pid, number)

    def _next_event(self) -> float:
        """Return the seconds until there is something to do without an event."""
        now = time.monotonic()
        times = [self.scan_at, *(due for due, _ in self.dying.values())]
        times += [self.reload_at] if self.reload_at else []
        return 0 if self.to_import else min(0.5, min(times) - now)

    def _on_signal(self, number: int, _: object) -> None:
        if number == signal.SIGCHLD:
            return
        # A program between the terminal and this one, such as uv, may repeat a signal.
        repeated = time.monotonic() - self.interrupted < 0.5
        self.hurry = self.ending and not repeated
        self.interrupted = time.monotonic()
        interrupts_import = self.importing and not self.ending
        self.ending = True
        if interrupts_import:
            raise KeyboardInterrupt

    def _on_wakeup(self) -> None:
        self.signals.recv(1024)
        pid = self.pid
        self._reap()
        if pid and not self.pid and not self.stopping:
            say(f" * {self.name} has ended by itself; save a file to start it again.")

    def _reap(self) -> None:
        """Collect the processes that have ended, and end what they left behind."""
        ended = set()
        with suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                ended.add(pid)
                self._on_end(pid)
        if ended:
            _restore_terminal(self.terminal)
            self._end_orphans()

    def _on_end(self, pid: int) -> None:
        self.dying.pop(pid, None)
        if pid == self.pid:
            self.pid = 0

    def _end_orphans(self) -> None:
        known = {self.pid, *self.dying, *self.named, *self._others()}
        for pid in orphans.orphans(known, self.pid):
            if not orphans.is_detached(pid):
                due = time.monotonic() + ORPHAN_DELAY
                self.dying[pid] = (due, signal.SIGTERM)
            else:
                self.named.add(pid)
                if not orphans.is_service(pid):
                    command = orphans.command_line(pid)
                    say(f" * Left running in its own session: {command} (pid {pid})")

    def _others(self) -> set[int]:
        """Return the children of this process that are not of the application."""
        return set()

    def _kill(self, pid: int, number: signal.Signals) -> None:
        if number == signal.SIGTERM:
            command = orphans.command_line(pid)
            say(f" * Ending what the application left running: {command} (pid {pid})")
            self.dying[pid] = (time.monotonic() + ORPHAN_DEADLINE, signal.SIGKILL)
        else:
            self.dying[pid] = (float("inf"), number)
        _send_signal(pid, number)

    def _watch_files(self) -> None:
        """Look for changes, first for those since the application was read."""
        self.events: Events | None = None
        self.scan_at = self.full_scan_at = float("inf")
        if not self.reload:
            return
        if sys.platform == "linux":
            try:
                self.events = Events()
            except OSError as error:
                self._cannot_watch(error)
        if self.events:
            self.selector.register(self.events.descriptor, EVENT_READ, self._on_event)
        since = int(self.started * 1e9)
        self.files = Files(os.getcwd(), since, self.watch, self.exclude)
        self.loaded = {path for _, path in module_files()}
        self._add_modules(self.loaded)
        self._scan()

    def _add_modules(self, paths: Iterable[str]) -> None:
        if self.reload:
            since = int(self.started * 1e9)
            self.files.add_modules(filter(is_watched_module, paths), since)
            self.scan_at = time.monotonic()

    def _cannot_watch(self, error: OSError) -> None:
        reason = f"{error.strerror}; see fs.inotify.max_user_watches"
        say(f" * Not all folders can be watched ({reason}): looking every 0.3 s.")
        if self.events:
            self.selector.unregister(self.events.descriptor)
            os.close(self.events.descriptor)
            self.events = None

    def _on_event(self) -> None:
        if self.events:
            self.events.clear()
        self.scan_at = min(self.scan_at, time.monotonic() + SETTLE)

    def _scan(self) -> None:
        began = time.monotonic()
        full = began >= self.full_scan_at or self.full_scan_at == float("inf")
        try:
            if self.events:
                self.events.watch(self.files.folders)
        except OSError as error:
            self._cannot_watch(error)
        self._on_change(self.files.changed(with_installed=full))
        now = time.monotonic()
        if full:
            interval = SCAN_INTERVAL if self.events else POLL_INTERVAL
            self.full_scan_at = now + max(interval, SCAN_SHARE * (now - began))
        self.scan_at = self.full_scan_at

    def _on_change(self, paths: set[str]) -> None:
        if paths:
            now = time.monotonic()
            burst = now - self.saved < BURST_WINDOW
            self.reload_at = now + (DEBOUNCE if burst else 0)
            self.saved = now
            self.changed |= paths

    def _on_child_message(self) -> None:
        data = os.read(self.status_pipe, 65536)
        if not data:
            self._close_status_pipe()
        *lines, self.status = (self.status + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                self._notify_ready()
            if "draining" in message:
                self.draining = True
            if "written" in message and self.reload:
                self.files.written.add(message["written"])
            names = message.get("modules", []) if self.fork else []
            self.to_import.extend(name for name in names if name not in sys.modules)
            self._add_modules(message.get("files", []))

    def _notify_ready(self) -> None:
        self.ready = True
        self.child.first = False

    def _close_status_pipe(self) -> None:
        if self.status_pipe >= 0:
            self.selector.unregister(self.status_pipe)
            os.close(self.status_pipe)
            self.status_pipe, self.status = -1, b""

    def _import_next(self) -> None:
        """Import one of the packages that the application uses, for the next fork."""
        if not self.to_import or self.ending:
            return
        with suppress(BaseException):  # The application imports it again.
            self.importing = True
            import_module(self.to_import.popleft())
        self.importing = False
        if not self.to_import:
            self.loaded = {path for _, path in module_files()}
            gc.freeze()  # A fork tells its own objects from these.
            if threading.active_count() > 1:
                self.fork = False
                say(" * A package starts a thread when it is imported: no forks.")

    def _reload(self) -> bool:
        self.reload_at = 0.0
        self.began = time.monotonic()
        if self.ready:
            self.reloaded.clear()
        self._stop_child(self.child.deadline)
        if self.ending:
            return False
        self.reloaded |= self.changed
        self.changed.clear()
        for path in self.reloaded:
            _forget_bytecode(path)
        settings = any(os.path.basename(path) in SETTINGS for path in self.reloaded)
        packages = _packages_changed_at() > self.packages
        if settings or packages or self.loaded & self.reloaded:
            self._reexec()
        return self._start()

    def _start(self) -> bool:
        """Start a child; return whether this is the fork in which to run it."""
        self._close_status_pipe()  # The last child's messages are not about this one.
        self.status_pipe, self.child.status_pipe = os.pipe()
        self.child.began = self.began
        self.started = time.time() - 0.01 if self.ready else self.started
        self.ready = self.draining = False
        sys.stdout.flush()
        if self.fork:
            # A signal must wait until the fork has its own handlers.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
            self.pid = os.fork()
            if self.pid == 0:
                self._close_in_fork()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
                return True
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
        else:
            self.pid = _spawn(self.child)
        os.close(self.child.status_pipe)
        self.selector.register(self.status_pipe, EVENT_READ, self._on_child_message)
        return False

    def _close_in_fork(self) -> None:
        os.close(signal.set_wakeup_fd(-1))
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        if not self.ignores_hangup:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for key in list(self.selector.get_map().values()):
            os.close(key.fd)
        self.selector.close()
        self.signals.detach()
        os.close(self.status_pipe)
        os.close(self.parent_end)  # Otherwise the fork would not notice its end.

    def _stop_child(self, deadline: float) -> None:
        """Stop the child, or let it finish its requests while the next one starts."""
        if not self.pid:
            return
        self.stopping = True
        _send_signal(self.pid, signal.SIGTERM)
        end = time.monotonic() + deadline + KILL_MARGIN
        while self.pid and not (self.draining or self.hurry):
            if time.monotonic() > end:
                break
            self._wait(end - time.monotonic())
        if self.pid and self.draining and not self.hurry:
            due = time.monotonic() + 2 * deadline + KILL_MARGIN
            self.dying[self.pid] = (due, signal.SIGKILL)
            if self.ending:
                _send_signal(self.pid, signal.SIGTERM)  # It then finishes nothing.
            self.pid = 0
        elif self.pid:
            say(f" * {self.name} did not exit in time and is killed.")
            _send_signal(self.pid, signal.SIGKILL)
            end = time.monotonic() + 5
            while self.pid and time.monotonic() < end:
                self._wait(0.5)
        self.stopping = False

    def _reexec(self) -> None:
        """Become a new process, with packages and environment as they are now."""
        while any(number == signal.SIGKILL for _, number in self.dying.values()):
            self._wait(0.1)
        python = [sys.executable, *sys.orig_argv[1:]]
        environ = self.environ | {"_FLASK_DEV_CREATED": str(time.time())}
        os.execve(sys.executable, python, environ)  # noqa: S606  # its own command


class WebSupervisor(Supervisor):
    """Serve the application and, if there is a `command`, run that beside it."""

    def __init__(
        self, app: str | None, created: float, options: dict[str, Any]
    ) -> None:
        host, port, cert = options["host"], options["port"], options["cert"]
        self.listener = _listen(host, port)
        self.url = _url(host, self.listener, "https" if cert else "http")
        if cert == "adhoc":
            # Browsers accept it once: each child uses the same certificate.
            cert = make_ssl_devcert(os.path.join(tempfile.mkdtemp(), "dev"), host)
        child = WebChild(
            app=app,
            deadline=options["deadline"],
            host=host,
            port=port,
            listener=self.listener.fileno(),
            browser_reload=options["browser_reload"],
            debugger=options["debugger"] is not False,
            threads=options["with_threads"],
            cert=cert,
        )
        shared: dict[str, Any] = {
            "fork": options["fork"],
            "reload": options["reload"] is not False,
            "watch": (*options["watch"], *(options["extra_files"] or ())),
            "exclude": tuple(options["exclude_patterns"] or ()),
        }
        super().__init__(child, created=created, **shared)
        self.companion = 0
        self.companion_end = -1
        if command := options["command"]:
            companion = CommandChild(app=app, deadline=COMMAND_DEADLINE, name=command)
            self._start_companion(shared | {"child": asdict(companion)})

    def _start_companion(self, options: dict[str, Any]) -> None:
        # A process of its own, so that neither waits for the other to reload.
        pipe, self.companion_end = os.pipe()
        module = "flask_devserver.supervisor"
        command = [sys.executable, "-m", module, json.dumps(options), str(pipe)]
        self.companion = _popen(command, [pipe], self.environ)
        os.close(pipe)

    def _others(self) -> set[int]:
        return {self.companion}

    def _on_end(self, pid: int) -> None:
        super()._on_end(pid)
        if pid == self.companion:
            self.companion = 0

    def _close(self) -> None:
        self._close_companion()  # It ends while the application does.
        super()._close()
        self._await_companion()

    def _close_companion(self) -> None:
        if self.companion_end >= 0:
            os.close(self.companion_end)
            self.companion_end = -1

    def _await_companion(self) -> None:
        end = time.monotonic() + COMMAND_DEADLINE + 2
        while self.companion and not self.hurry and time.monotonic() < end:
            self._wait(0.1)
        if self.companion:
            _send_signal(self.companion, signal.SIGKILL)

    def _close_in_fork(self) -> None:
        super()._close_in_fork()
        self._close_companion()

    def _notify_ready(self) -> None:
        seconds = time.monotonic() - self.began
        if self.child.first:
            say(f" * Serving {self.url}; Ctrl-C ends it.")
        else:
            files = ", ".join(sorted(map(os.path.relpath, self.reloaded)))
            say(f" * Reloaded in {seconds:.2f} s: {files}")
        super()._notify_ready()

    def _reexec(self) -> None:
        say(" * Packages or settings have changed: starting again.")
        self._close_companion()
        self._await_companion()
        os.set_inheritable(self.listener.fileno(), True)
        self.environ["_FLASK_DEV_LISTENER"] = str(self.listener.fileno())
        super()._reexec()


class CommandSupervisor(Supervisor):
    """Run a command of the application beside the server, until that closes `pipe`."""

    def __init__(self, child: CommandChild, pipe: int, **options: Any) -> None:
        super().__init__(child, created=CREATED, **options)
        self.name = f"flask {child.name}"
        self.pipe = pipe

    def _register(self) -> None:
        os.set_inheritable(self.pipe, False)
        self.selector.register(self.pipe, EVENT_READ, self._on_end_of_server)

    def _on_end_of_server(self) -> None:
        self.ending = True

    def _close(self) -> None:
        self._stop_child(self.child.deadline)
        super()._close()


def say(text: str) -> None:
    """Print a line, if there is still somebody to read it."""
    with suppress(OSError, ValueError):
        print(text, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    if fd := os.environ.pop("_FLASK_DEV_LISTENER", None):
        return socket.socket(fileno=int(fd))
    family = select_address_family(host, port)
    listener = socket.socket(family)
    try:
        address = get_sockaddr(host, port, family)
        if family == socket.AF_UNIX:
            Path(str(address)).unlink(missing_ok=True)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sys.platform == "linux":
                # A connection stays in the kernel until there is a request: a child
                # that ends takes none of them along.
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 300)
        if family == socket.AF_INET6:
            only = host != "::"
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        message = f"Cannot listen on --host {host} --port {port} ({error.strerror})"
        hint = "stop the program that listens there, or use another port."
        raise click.ClickException(f"{message}: {hint}") from None
    return listener


def _url(host: str, listener: socket.socket, scheme: str) -> str:
    if listener.family == socket.AF_UNIX:
        return host
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    shown = f"[{shown}]" if ":" in shown else shown
    return f"{scheme}://{shown}:{listener.getsockname()[1]}"


def _own_environment() -> dict[str, str]:
    """Return the environment without what Flask has read from .env and .flaskenv."""
    read = dotenv_values(".flaskenv") | dotenv_values(".env")
    return {k: v for k, v in os.environ.items() if read.get(k) != v}


def _packages_changed_at() -> int:
    with suppress(OSError):
        return SITE_PACKAGES.stat().st_mtime_ns
    return 0


def _forget_bytecode(path: str) -> None:
    # Python takes it as valid when the file was saved twice within a second.
    if path.endswith(".py"):
        with suppress(OSError):  # There may be none, or another user's.
            Path(cache_from_source(path)).unlink()


def _terminal_settings() -> list[Any] | None:
    with suppress(termios.error, OSError, ValueError):
        return termios.tcgetattr(0)
    return None


def _restore_terminal(settings: list[Any] | None) -> None:
    """Undo what a debugger's prompt has set; a job in the background must not."""
    with suppress(termios.error, OSError):
        if settings and os.tcgetpgrp(0) == os.getpgrp():
            if termios.tcgetattr(0) != settings:
                termios.tcsetattr(0, termios.TCSADRAIN, settings)


def _send_signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _popen(command: list[str], fds: list[int], environ: dict[str, str] | None) -> int:
    """Start a process in which Ctrl-C waits until it is handled."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    process = subprocess.Popen(command, pass_fds=fds, env=environ)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    process.returncode = 0  # The supervisor waits for it, by its id.
    return process.pid


def _spawn(child: Child) -> int:
    kind, fields = type(child).__name__, json.dumps(asdict(child))
    command = [sys.executable, "-m", "flask_devserver.child", kind, fields]
    return _popen(command, child.descriptors(), None)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    command = CommandChild(**arguments.pop("child"))
    forked = CommandSupervisor(command, int(sys.argv[2]), **arguments).run()
    if forked:
        forked.run()
