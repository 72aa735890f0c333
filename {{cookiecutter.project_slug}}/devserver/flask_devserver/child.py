"""A process that runs one version of the application until a file is saved."""

import _thread
import atexit
import gc
import json
import os
import selectors
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedWriter, TextIOWrapper
from selectors import EVENT_READ
from types import FrameType
from typing import Any, NoReturn, cast

from flask.cli import ScriptInfo, cli
from werkzeug.debug import DebuggedApplication

from .browser import BrowserReload
from .files import is_library, is_watched_module, module_files
from .server import RequestHandler, Server
from .shutdown import kill_after, remember_thread_origins
from .welcome import Welcome

if sys.platform == "win32":
    raise ImportError("flask dev needs Linux or macOS.")

Handler = Callable[[int, FrameType | None], object]

IDLE = 0.3  # seconds between two checks for modules that were imported
GRACE = 0.05  # seconds that the next version waits for the requests in flight
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(kw_only=True)
class Child:
    """The settings of a process that runs a version of `app`, an import path.

    `parent_pipe` ends with the supervisor, `status_pipe` leads to it; both are file
    descriptors. `deadline` is how many seconds it has to exit. It `began` to replace
    the version before at that monotonic time.
    """

    app: str | None
    deadline: float
    parent_pipe: int = -1
    status_pipe: int = -1
    first: bool = True
    began: float = 0.0

    def run(self) -> NoReturn:
        """Run until SIGTERM, and exit."""
        raise NotImplementedError

    def descriptors(self) -> list[int]:
        """Return the file descriptors that it needs."""
        return [self.parent_pipe, self.status_pipe]

    def _prepare(self) -> None:
        os.environ.update(FLASK_DEBUG="1", WERKZEUG_RUN_MAIN="true", _FLASK_DEV="1")
        # The supervisor handles Ctrl-C. A program that the application starts does not
        # inherit this handler, as it would inherit SIG_IGN.
        signal.signal(signal.SIGINT, do_nothing)
        for fd in self.descriptors():
            os.set_inheritable(fd, False)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(line_buffering=True)  # A killed process loses none.
        os.register_at_fork(after_in_child=self._reset_in_fork)
        self.root = os.path.join(os.getcwd(), "")
        self.written: set[str] = set()
        self.lock = threading.Lock()
        sys.addaudithook(self._on_audit)
        # The application may replace threads by greenlets, which this must not become.
        _thread.start_new_thread(_exit_with_parent, (self.parent_pipe,))
        remember_thread_origins()

    def _reset_in_fork(self) -> None:
        """Give back, in a process that the application forks, what is not for it."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is do_nothing:
                interrupt = number == signal.SIGINT
                default = signal.default_int_handler if interrupt else signal.SIG_DFL
                signal.signal(number, default)
        for fd in self.descriptors():
            with suppress(OSError):
                os.close(fd)
        self.status_pipe = -1

    def _on_audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Tell the supervisor which files the application itself writes."""
        if event not in ("open", "os.rename", "sqlite3.connect"):
            return
        with suppress(Exception):
            if event != "open" or args[2] & WRITING:
                path = os.path.abspath(os.fsdecode(args[event == "os.rename"]))
                if path.startswith(self.root) and path not in self.written:
                    self.written.add(path)
                    self._send(written=path)

    def _send(self, **message: object) -> None:
        with suppress(OSError), self.lock:
            os.write(self.status_pipe, json.dumps(message).encode() + b"\n")

    def _notify_ready(self) -> None:
        self._send(ready=True)
        threading.Thread(target=self._send_modules, daemon=True).start()

    def _send_modules(self) -> None:
        """Report new modules: the supervisor imports some, and watches the files."""
        known: set[tuple[str, str]] = set()
        count = 0
        while True:
            time.sleep(IDLE)  # The first request matters more now.
            if len(sys.modules) != count:
                count = len(sys.modules)
                new = set(module_files()) - known
                known |= new
                names = {name for name, path in new if is_library(path)}
                files = [path for _, path in new if is_watched_module(path)]
                self._send(modules=sorted(names - {"__main__"}), files=files)


@dataclass(kw_only=True)
class CommandChild(Child):
    """A version of the command `flask NAME`, such as a worker.

    It never gets the SIGINT of a terminal, on which Celery would shut down twice.
    """

    name: str

    def run(self) -> NoReturn:
        """Run the command, and exit."""
        self._prepare()
        self._notify_ready()
        app = ["--app", self.app] if self.app else []
        try:
            cli.main([*app, *shlex.split(self.name)])
        except SystemExit:
            pass
        except Exception:
            traceback.print_exc()
        _exit()


@dataclass(kw_only=True)
class WebChild(Child):
    """A version that serves the application on the socket `listener`.

    With `browser_reload`, a page in a browser reloads when the next version responds.
    The `first` version shows the debugger's PIN.
    """

    host: str
    port: int
    listener: int
    browser_reload: bool
    debugger: bool
    threads: bool
    cert: Any

    def descriptors(self) -> list[int]:
        return [self.listener, *super().descriptors()]

    def run(self) -> NoReturn:
        """Serve the application until SIGTERM, and exit."""
        self._prepare()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        ending = threading.Event()
        app = self._load()
        if self.browser_reload and self.threads:
            app = BrowserReload(app, ending)
        cert = tuple(self.cert) if isinstance(self.cert, list) else self.cert
        options: dict[str, Any] = {"fd": self.listener, "ssl_context": cert}
        server = Server(self.host, self.port, app, RequestHandler, **options)
        server.threads = self.threads
        os.register_at_fork(after_in_child=server.socket.close)
        # The application may have replaced the selectors, so none was imported by name.
        with selectors.DefaultSelector() as selector:
            selector.register(server.socket, EVENT_READ, server.handle_request)
            signals = on_signals(do_nothing, signal.SIGTERM)
            selector.register(signals, EVENT_READ, lambda: _set_at_end(ending, signals))
            self._notify_ready()
            while not ending.is_set():
                for key, _ in selector.select():
                    key.data()
        self._finish(server, signals)
        kill_after(self.deadline, exit_code=1)
        _exit()

    def _finish(self, server: Server, signals: socket.socket) -> None:
        """Finish the requests in flight while the next version starts.

        A second SIGTERM asks for an exit at once.
        """
        if not server.finish_requests(GRACE):
            self._send(draining=True)
            end = time.monotonic() + self.deadline
            while not server.finish_requests(0.02):
                if time.monotonic() > end:
                    for each in server.requests_in_flight():
                        print(f" * {each} was aborted by the reload", file=sys.stderr)
                    return
                with suppress(BlockingIOError):
                    if signal.SIGTERM in signals.recv(1024):
                        return

    def _load(self) -> Any:
        try:
            flask_app = ScriptInfo(app_import_path=self.app).load_app()
            seconds = f"{time.monotonic() - self.began:.2f} s"
            app: Any = Welcome(flask_app, "save a file" if self.first else seconds)
        except BaseException as raised:
            traceback.print_exc()
            app = _failing(raised)
        if self.debugger:
            app = DebuggedApplication(app, evalex=True, pin_logging=self.first)
            app.trusted_hosts.append(self.host)
        return app


def _failing(raised: BaseException) -> Any:
    """Return an application that raises what the import of another one has raised."""
    error, place = raised, raised.__traceback__
    if not isinstance(error, Exception):  # The debugger shows no others.
        error = RuntimeError(f"The application raised {raised!r} when it was imported.")

    def app(*_: object) -> Any:
        raise error.with_traceback(place)

    return app


def on_signals(handler: Handler, *numbers: signal.Signals) -> socket.socket:
    """Call `handler` on the signals; return a socket that can be read after any."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    for number in numbers:
        signal.signal(number, handler)
    signal.set_wakeup_fd(writing.detach())
    return reading


def do_nothing(*_: object) -> None:
    """Handle a signal that a socket or the supervisor takes care of."""


def _set_at_end(ending: threading.Event, signals: socket.socket) -> None:
    if signal.SIGTERM in signals.recv(1024):  # The application may handle others.
        ending.set()


def _exit_with_parent(parent_pipe: int) -> None:
    os.read(parent_pipe, 1)
    os._exit(1)


def _exit() -> NoReturn:
    """Exit as Python does, but without taking every module apart.

    That takes ten times as long as the rest of a reload. Forks of `multiprocessing`
    exit like this, too.
    """
    cast(Any, threading)._shutdown()
    atexit._run_exitfuncs()
    # The supervisor has frozen its objects, so the collector knows few in a fork.
    for each in [sys.stdout, sys.stderr, *gc.get_objects()]:
        if issubclass(type(each), (TextIOWrapper, BufferedWriter)):
            with suppress(Exception):  # It may be closed, or open for reading.
                each.flush()
    os._exit(0)


if __name__ == "__main__":
    kind = CommandChild if sys.argv[1] == "CommandChild" else WebChild
    kind(**json.loads(sys.argv[2])).run()
