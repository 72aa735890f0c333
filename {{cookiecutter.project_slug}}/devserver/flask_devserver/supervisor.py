"""The parent process of `flask dev`: starts children and replaces them on a change.

The parent owns the listening socket, so requests made during a reload wait instead of
failing. It imports third-party packages, which forked children inherit, but never the
application.
"""

import _thread
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from importlib.util import cache_from_source
from io import TextIOWrapper
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, cast

from dotenv import dotenv_values, find_dotenv
from werkzeug.serving import BaseWSGIServer, make_ssl_devcert

from . import say, shutdown
from .child import Child, Waker
from .files import SETTINGS, Files, is_installed, module_files
from .packages import Packages
from .processes import Processes, Runner, seconds_since_boot, send_signal

if sys.platform == "win32":
    raise ImportError("flask dev needs Linux or macOS.")

# The first save starts a reload at once. The next saves of a burst share one reload.
BURST_WINDOW = 0.5  # seconds between two saves of a burst, at most
DEBOUNCE = 0.2  # seconds without a save that end a burst
DATA_DELAY = 1.0  # seconds without a change of data, which a request may be writing
MAX_DELAY = 5.0  # seconds, if a program does not stop writing code

LAST_DEADLINE = 0.4  # seconds for requests when the server stops
RESTART_DELAY = 5.0  # seconds until a child that failed at once starts again
RETRY_DELAY = 3.0  # seconds until flask dev tries to start again
START_TIMEOUT = 10.0  # seconds for the trial of that
IMPORT_TIMEOUT = 10.0  # seconds for the import of a package, besides the app's own
SHOWN_FILES = 5  # in the line of a reload
KILL_MARGIN = 0.3  # seconds after the deadline, for a child to name the blockers


class Supervisor:
    """Serve `app`, run a command beside it, and restart both when a file is saved.

    `options` are those of `flask dev`. With `fork`, children are forks of this process,
    which imports the packages once. Without, each child is a new Python. `created` is a
    time, in seconds, before the first file of the application was read.
    """

    def __init__(
        self, app: str | None, created: float, options: dict[str, Any]
    ) -> None:
        self.options = options
        self.fork = options["fork"]
        self.listener = _listen(options["host"], options["port"])
        self.selector = DefaultSelector()
        # Every save after this time starts another child.
        created = float(os.environ.pop("_FLASK_DEV_CREATED", created))
        self.folder = os.environ.pop("_FLASK_DEV_FOLDER", "")  # for the certificate
        if options["cert"] == "adhoc":
            # Users accept a certificate once, so each child uses the same one.
            if not self.folder and "_FLASK_DEV_CHECK" not in os.environ:
                self.folder = tempfile.mkdtemp()
                make_ssl_devcert(f"{self.folder}/dev", options["host"])
            options["cert"] = f"{self.folder}/dev.crt", f"{self.folder}/dev.key"
        server = Child(app=app, options=options, listener=self.listener.fileno())
        self.web = Runner(server, created, self.selector, self._on_message)
        self.runners = [self.web]
        if command := options["command"]:
            companion = replace(server, command=command)
            self.runners.append(replace(self.web, child=companion))
        self.root = os.getcwd()
        self.files: Files | None = None
        self.changed: set[str] = set()  # files that no child has been started for
        self.reloaded: set[str] = set()  # files that this child was started for
        self.saved, self.burst_ends, self.reload_at = 0.0, 0.0, float("inf")
        self.draining: set[int] = set()  # children that finish their requests
        # The application has started, and failed, while another one was draining.
        self.beside = self.failed_beside = False
        self.packages = Packages()
        self.loaded = {path for _, path in module_files()}
        self.processes = Processes()
        self.ending = self.hurry = False
        self.importing = ""  # the package that is being imported
        self.imported_at, self.slowest = float("inf"), 0.0  # the slowest start
        self.interrupted = 0.0
        self.parent = os.getppid()
        self.environ = _own_environment()
        self.reexec_at, self.said = float("inf"), ""

    def run(self) -> None:
        """Run children until a signal."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                # Names may be bytes. With line buffering, a killed child loses no line.
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        self.handled = [signal.SIGCHLD, signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
            self.handled.append(signal.SIGHUP)
        self.waker = Waker()
        self.selector.register(self.waker.pipe, EVENT_READ, self._on_wakeup)
        self._catch_signals()
        self._watch_files()
        while not self.ending:
            self._wait(self._next_event())
            # A scan may see a file before this process has read who wrote it.
            if time.monotonic() >= self.reload_at:
                self._reload()
            if time.monotonic() >= self.reexec_at:
                self._reexec()
            if self.failed_beside and not self.draining:
                self._start_again()  # A port, for example, is free now.
            self._start_children()
            self._import_next()
            self._scan()
            if os.getppid() != self.parent and signal.SIGHUP in self.handled:
                say(" * The parent of flask dev has exited, so flask dev exits, too.")
                self.ending = True
        self._stop_children()
        for pid in self.processes.dying:
            send_signal(pid, signal.SIGKILL)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        # Python waits for threads and exit hooks of the packages that it has imported.
        shutdown.kill_after(self.options["deadline"], 0, (), "flask dev")

    def _wait(self, seconds: float) -> None:
        """Handle the events of the next `seconds`, and kill overdue processes."""
        for key, _ in self.selector.select(max(seconds, 0)):
            key.data()
        self.processes.signal_overdue()

    def _next_event(self) -> float:
        """Return the seconds until there is something to do without an event."""
        dying = self.processes.dying.values()
        times = [self.reload_at, *(due for due, *_ in dying)]
        times += [self.files.scan_at] if self.files else []
        return 0 if self.packages.waiting else min(0.5, min(times) - time.monotonic())

    def _catch_signals(self) -> None:
        for number in self.handled:
            signal.signal(number, self._on_signal)

    def _on_alarm(self, *_: object) -> None:
        if self.importing:
            # Half a package in this process would break the forks.
            say(f" * The import of {self.importing} hangs here: no more forks.")
            self.fork = False
            self.packages.waiting.clear()
            raise KeyboardInterrupt

    def _on_signal(self, number: int, _: object) -> None:
        self.waker()
        if number != signal.SIGCHLD:
            now = time.monotonic()
            # A program between the terminal and this one, such as uv, may repeat a
            # signal at once.
            self.hurry = self.ending and now - self.interrupted > 0.5
            self.interrupted, self.ending = now, True
            if self.importing:
                raise KeyboardInterrupt

    def _on_wakeup(self) -> None:
        """Handle the processes that have exited, and stop what they left running."""
        self.waker.clear()
        for pid, status in self.processes.ended():
            for runner in self.runners:
                if runner.pid == pid:
                    self._on_end(runner, status)
            self.draining.discard(pid)
            known = [runner.pid for runner in self.runners]
            self.processes.end_orphans(known, self.web.pid)

    def _on_end(self, runner: Runner, status: int | None) -> None:
        runner.pid = 0
        if status is not None:
            code, hint = os.waitstatus_to_exitcode(status), "save a file to restart it."
            if code == 1 or code < 0:
                now = time.monotonic()
                # It may fail again as soon as it starts.
                failed = now < runner.child.began + RESTART_DELAY
                runner.start_at = now + (RESTART_DELAY if failed else 0)
                runner.child.began, runner.child.first = runner.start_at, True
                hint = "it starts again in 5 s." if failed else "it starts again."
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            say(f" * {runner.child.name} exited ({cause}): {hint}")

    def _watch_files(self) -> None:
        """Watch the files, and find changes since the application was read."""
        if self.options["reload"] is not False:
            extra = [*self.options["watch"], *(self.options["extra_files"] or ())]
            # Flask finds these in the folders above, too.
            extra += filter(None, [find_dotenv(name, usecwd=True) for name in SETTINGS])
            exclude = self.options["exclude_patterns"] or ()
            self.files = Files(self.root, self.web.started, extra, exclude)
            self.files.add(dict.fromkeys(self.loaded, ()), self.web.started)
            if (descriptor := self.files.events.descriptor) >= 0:
                self.selector.register(descriptor, EVENT_READ, self.files.on_event)

    def _scan(self) -> None:
        if self.files and time.monotonic() >= self.files.scan_at:
            if changed := self.files.scan():
                now, is_source = time.monotonic(), self.files.is_source
                pending = any(map(is_source, self.changed))
                if any(map(is_source, changed)):
                    delay = DEBOUNCE if now - self.saved < BURST_WINDOW else 0
                    if not pending:
                        self.burst_ends = now + MAX_DELAY
                    self.saved = now
                    self.reload_at = min(now + delay, self.burst_ends)
                elif not pending:  # Data does not delay code.
                    self.reload_at = now + DATA_DELAY
                self.changed |= changed

    def _on_message(self, runner: Runner, message: dict[str, Any]) -> None:
        if message.get("patched") and self.fork:
            # This process has the packages as they are without that.
            say(" * The application replaces functions of Python: no more forks.")
            self.fork = False
            self.packages.waiting.clear()
            if runner.child.began > self.imported_at:
                self._start_again()
        if "ready" in message:
            self._on_ready(runner)
        if "failed" in message:
            self.failed_beside = self.beside
        if "draining" in message:
            self._on_draining(runner)
        if "written" in message and self.files:
            self.files.written[message["written"]] = time.monotonic()
        modules = message.get("modules", {})
        read = message.get("files", {}) | dict.fromkeys(modules.values(), ())
        if self.files and read:
            self.files.add(read, runner.started)
        if self.fork:
            self.packages.add(modules)

    def _on_ready(self, runner: Runner) -> None:
        seconds = time.monotonic() - runner.child.began
        self.slowest = max(self.slowest, seconds)
        if runner is self.web and runner.child.first:
            say(f" * Serving {self._url()}; press Ctrl-C to quit.")
        elif runner is self.web:
            names = sorted(os.path.relpath(path, self.root) for path in self.reloaded)
            if len(names) > SHOWN_FILES:  # as after a checkout of another branch
                names[SHOWN_FILES:] = [f"{len(names) - SHOWN_FILES} more"]
            changed = f": {', '.join(names)}" if names else ""
            say(f" * Reloaded in {seconds:.2f} s{changed}")
        runner.ready, runner.child.first = True, False
        is_alone = all(each.ready for each in self.runners) and not self.draining
        if self.files and is_alone:
            self.files.forget_writes(min(each.child.began for each in self.runners))

    def _on_draining(self, runner: Runner) -> None:
        """Let a child finish its requests while the next one starts."""
        if self.ending:
            send_signal(runner.pid, signal.SIGTERM)  # The second one stops it at once.
        else:
            seconds = 2 * runner.child.deadline + KILL_MARGIN
            self.processes.kill_after(runner.pid, seconds, runner.child.name)
            self.draining.add(runner.pid)
            runner.pid = 0

    def _import_next(self) -> None:
        """Import one of the packages that the application uses, for the next fork."""
        if not self.packages.waiting or self.ending:
            return
        began = seconds_since_boot()
        self.imported_at = min(self.imported_at, time.monotonic())
        former = signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, IMPORT_TIMEOUT + 2 * self.slowest)
        with suppress(KeyboardInterrupt):
            try:
                self.importing = self.packages.waiting[0]
                self.packages.import_next()
            finally:
                self.importing = ""
        if signal.getsignal(signal.SIGALRM) == self._on_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
        # The package may have handlers and programs of its own, and another folder.
        self._catch_signals()
        self.processes.keep_programs(began)
        self._return_to_root()
        if not self.packages.waiting:
            self.loaded = {path for _, path in module_files()}
            gc.freeze()  # A fork can then tell its own objects from these.

    def _reload(self) -> None:
        self.reload_at = float("inf")
        changed = self.files.settle(self.changed) if self.files else set()
        self.changed.clear()
        if not changed:
            return
        if self.web.ready:
            self.reloaded.clear()
        self.reloaded |= changed
        settings = any(path.endswith(SETTINGS) for path in self.reloaded)
        if settings or self.loaded & self.reloaded or self._is_shadowed():
            # If this fails, the next version has the former packages.
            self._reexec()
        self._start_again()

    def _is_shadowed(self) -> bool:
        """Return whether a changed file takes the place of an imported package."""
        paths = {os.path.relpath(path, self.root) for path in self.reloaded}
        tops = {path.partition(os.sep)[0] for path in paths}
        names = {t for t in tops if os.path.exists(f"{self.root}/{t}/__init__.py")}
        names |= {top.removesuffix(".py") for top in tops if top.endswith(".py")}
        imported = [sys.modules[name] for name in names & sys.modules.keys()]
        return any(is_installed(str(getattr(m, "__file__", ""))) for m in imported)

    def _start_again(self) -> None:
        self.failed_beside = False
        for runner in self.runners:
            runner.child.began = time.monotonic()
            runner.started = time.time() - 0.01
            runner.start_at, runner.ready = 0, False
            self._stop(runner)

    def _start_children(self) -> None:
        if self.fork and cast(Any, _thread)._count():
            self.fork = False
            say(" * A package starts a thread when it is imported: no more forks.")
        # A program of the previous version may still have a port that this one needs.
        current = {runner.pid for runner in self.runners}
        orphans = self.processes.dying.keys() - current - self.draining
        for runner in self.runners:
            due = time.monotonic() >= runner.start_at and not orphans
            if due and not runner.pid and not self.ending:
                self._return_to_root()
                _forget_bytecode(self.reloaded)
                self.beside = bool(self.draining)
                runner.start(self._close_in_fork if self.fork else None)

    def _return_to_root(self) -> None:
        with suppress(OSError):  # It may be a new folder by now, or gone.
            os.chdir(self.root)

    def _close_in_fork(self) -> None:
        os.close(self.waker.writing)
        # Temporary folders that packages made in this process belong to it.
        for each in list(cast(Any, weakref.finalize)._registry):
            each.atexit = False
        for number in self.handled:
            signal.signal(number, signal.SIG_DFL)
        for key in list(self.selector.get_map().values()):
            os.close(key.fd)
        self.selector.close()

    def _stop(self, runner: Runner) -> None:
        if runner.pid and runner.pid not in self.processes.dying:
            deadline = runner.child.deadline
            if self.ending and runner is self.web:
                deadline = min(deadline, LAST_DEADLINE)
            self.processes.end(runner.pid, deadline + KILL_MARGIN, runner.child.name)

    def _stop_children(self) -> None:
        for runner in self.runners:
            self._stop(runner)
        self.processes.end_programs_of_packages()
        while self.processes.dying and not self.hurry:
            self._wait(0.05)

    def _reexec(self) -> None:
        """Replace this process, to read the packages and the environment again."""
        if "_pydevd_bundle" in sys.modules:  # The debugger's connection would be lost.
            say(" * Packages or settings have changed: restart the debugger.")
            return
        os.set_inheritable(self.listener.fileno(), True)
        host, port = self.options["host"], self.options["port"]
        environ = self.environ | {
            "_FLASK_DEV_FOLDER": self.folder,
            "_FLASK_DEV_LISTENER": f"{self.listener.fileno()} {host} {port}",
        }
        python = [sys.executable, *sys.orig_argv[1:]]
        # A setting may be invalid, or an installer has removed a package for a moment.
        self.reexec_at = float("inf")
        error = _start_error(python, environ, self.listener.fileno())
        if self.ending:
            return
        if error:
            if error != self.said:
                say(f" * flask dev cannot start again, but tries to: {error}")
            self.said, self.reexec_at = error, time.monotonic() + RETRY_DELAY
            return
        say(" * Packages or settings have changed: starting again.")
        self._stop_children()
        if self.ending:
            return
        environ["_FLASK_DEV_CREATED"] = str(time.time())
        # The next process considers every save before this time as read.
        _forget_bytecode(self.reloaded | (self.files.scan() if self.files else set()))
        os.execve(sys.executable, python, environ)  # noqa: S606  # its own command

    def _url(self) -> str:
        host = self.options["host"]
        if self.listener.family == socket.AF_UNIX:
            return str(host)
        scheme = "https" if self.options["cert"] else "http"
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        shown = f"[{shown}]" if ":" in shown else shown
        return f"{scheme}://{shown}:{self.listener.getsockname()[1]}"


def _listen(host: str, port: int) -> socket.socket:
    fd, _, address = os.environ.pop("_FLASK_DEV_LISTENER", "").partition(" ")
    if fd:
        listener = socket.socket(fileno=int(fd))
        if address == f"{host} {port}":
            return listener
        listener.close()  # .flaskenv has another address now.
        if "_FLASK_DEV_CHECK" in os.environ and address.endswith(f" {port}"):
            port = 0  # The parent still has the port.
    listener = BaseWSGIServer(host, port, cast(Any, None)).socket
    if sys.platform == "linux" and listener.family != socket.AF_UNIX:
        # A connection stays in the kernel until it has a request, so a child that exits
        # does not lose it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 300)
    return listener


def _own_environment() -> dict[str, str]:
    """Return the environment without what Flask has read from .env and .flaskenv."""
    with suppress(OSError):  # Linux keeps the environment at the start of a process.
        given = Path("/proc/self/environ").read_bytes().split(b"\0")
        return dict(os.fsdecode(line).split("=", 1) for line in given if b"=" in line)
    read = dotenv_values(".flaskenv") | dotenv_values(".env")
    return {k: v for k, v in os.environ.items() if read.get(k) != v}


def _start_error(command: list[str], environ: dict[str, str], listener: int) -> str:
    """Return why the command would fail at once, or an empty string."""
    environ = environ | {"_FLASK_DEV_CHECK": "1"}
    try:
        done = subprocess.run(
            command,
            env=environ,
            pass_fds=[listener],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _forget_bytecode(paths: set[str]) -> None:
    # Python uses old bytecode if the file was saved twice within a second.
    for path in paths:
        with suppress(OSError):  # There may be none, or another user may own it.
            Path(cache_from_source(path)).unlink()
