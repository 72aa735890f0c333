"""A version of the application, served until a file is saved or the server ends."""

import atexit
import gc
import json
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter, TextIOWrapper
from selectors import EVENT_READ, DefaultSelector
from types import FrameType
from typing import Any, NoReturn, cast

from flask.cli import ScriptInfo, cli
from werkzeug.debug import DebuggedApplication
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from .browser import PREFIX, BrowserReload
from .shutdown import kill_after, remember_thread_origins
from .welcome import Welcome

Handler = Callable[[int, FrameType | None], object]

INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platlib"))

IDLE = 0.3  # seconds between two looks for modules that were imported
GRACE = 0.5  # seconds for the requests that are being answered when it is to end
PATIENCE = 0.1  # seconds from a connection to its request, on a busy machine


class Server(ThreadedWSGIServer):
    """Werkzeug's server, which knows the requests that are being answered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connections: dict[socket.socket, float] = {}  # and when they began
        self.begun: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.connections.pop(request, None)
        self.begun.discard(request)

    def finish_requests(self, seconds: float) -> None:
        """Wait for the requests that have begun, but no longer than `seconds`."""
        end = time.monotonic() + seconds
        looks = 0  # at two of which nothing has begun, in case that it just does
        while self.connections and looks < 2 and time.monotonic() < end:
            time.sleep(0.005)
            begun = any(map(self._has_begun, list(self.connections)))
            looks = 0 if begun else looks + 1

    def _has_begun(self, connection: socket.socket) -> bool:
        # Browsers open connections long before they send something, if they ever do.
        if time.monotonic() - self.connections.get(connection, 0) < PATIENCE:
            return True
        with suppress(OSError):
            peeking = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return connection in self.begun or bool(connection.recv(1, peeking))
        return False


class RequestHandler(WSGIRequestHandler):
    """Werkzeug's, which does not log what the browser asks to reload a page."""

    server: Server

    def handle_one_request(self) -> None:
        if cast(BufferedReader, self.rfile).peek(1):
            self.server.begun.add(self.connection)
        super().handle_one_request()

    def log_request(self, *args: Any) -> None:
        if not getattr(self, "path", "").startswith(PREFIX):
            super().log_request(*args)


@dataclass(kw_only=True)
class Version:
    """What a process needs to run a version of `app`, an import path.

    `life` is a pipe that ends with the supervisor, `news` one to it, as file
    descriptors. `deadline` is how many seconds it has to end. It `began` to replace
    the one before at that monotonic time.
    """

    app: str | None
    deadline: float
    life: int = -1
    news: int = -1
    first: bool = True
    began: float = 0.0

    def run(self) -> NoReturn:
        """Run until SIGTERM, and end the process."""
        raise NotImplementedError

    def descriptors(self) -> list[int]:
        """Return the file descriptors that it needs."""
        return [self.life, self.news]

    def _prepare(self) -> None:
        os.environ.update(FLASK_DEBUG="1", WERKZEUG_RUN_MAIN="true", _FLASK_DEV="1")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor ends it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for fd in self.descriptors():
            os.set_inheritable(fd, False)  # to what the application may start
        threading.Thread(target=self._end_with_supervisor, daemon=True).start()
        remember_thread_origins()

    def _say_ready(self) -> None:
        os.write(self.news, b"ready\n")
        threading.Thread(target=self._tell_modules, daemon=True).start()

    def _tell_modules(self) -> None:
        """Say whenever there are more modules, for the next version to have at once."""
        told = 0
        with suppress(Exception):  # a slower start is no reason to disturb this one
            while True:
                time.sleep(IDLE)  # for what matters now is the first request
                if len(sys.modules) != told:
                    told = len(sys.modules)
                    line = json.dumps(_installed_modules()) + "\n"
                    os.write(self.news, line.encode())

    def _end_with_supervisor(self) -> None:
        os.read(self.life, 1)
        os._exit(1)


@dataclass(kw_only=True)
class CommandVersion(Version):
    """A version of the command `flask NAME`, such as a worker, which ends by itself."""

    name: str

    def run(self) -> NoReturn:
        """Run the command, and end the process."""
        self._prepare()
        self._say_ready()
        app = ["--app", self.app] if self.app else []
        try:
            cli.main([*app, self.name])
        except SystemExit:
            pass
        except Exception:
            traceback.print_exc()
        _end_process()


@dataclass(kw_only=True)
class WebVersion(Version):
    """A version that serves the application on the socket `listener`.

    With `browser_reload`, a page in a browser reloads when the next version answers.
    The `first` version says the debugger's PIN.
    """

    host: str
    port: int
    listener: int
    browser_reload: bool

    def descriptors(self) -> list[int]:
        return [self.listener, *super().descriptors()]

    def run(self) -> NoReturn:
        """Serve the application until SIGTERM, and end the process."""
        self._prepare()
        ending = threading.Event()
        app = self._load()
        if self.browser_reload:
            app = BrowserReload(app, ending)
        server = Server(self.host, self.port, app, RequestHandler, fd=self.listener)
        server.timeout = 0
        threading.Thread(target=self._end_in_time, args=[ending], daemon=True).start()
        with DefaultSelector() as selector:
            selector.register(server.socket, EVENT_READ, server.handle_request)
            signals = on_signals(lambda *_: None, signal.SIGTERM)
            selector.register(signals, EVENT_READ, lambda: _set_at_end(ending, signals))
            self._say_ready()
            while not ending.is_set():
                for key, _ in selector.select():
                    key.data()
        server.finish_requests(GRACE)
        _end_process()

    def _load(self) -> Any:
        try:
            flask_app = ScriptInfo(app_import_path=self.app).load_app()
            seconds = f"{time.monotonic() - self.began:.2f} s"
            last_reload = "save a file" if self.first else seconds
            app: Any = Welcome(flask_app, last_reload)
        except (Exception, SystemExit) as raised:
            traceback.print_exc()
            error, place = raised, raised.__traceback__

            def app(*_: object) -> Any:
                raise error.with_traceback(place)

        return DebuggedApplication(app, evalex=True, pin_logging=self.first)

    def _end_in_time(self, ending: threading.Event) -> None:
        ending.wait()
        kill_after(self.deadline, exit_code=1)


def on_signals(handler: Handler, *numbers: signal.Signals) -> socket.socket:
    """Call `handler` on the signals; return a socket that can be read after any."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    for number in numbers:
        signal.signal(number, handler)
    signal.set_wakeup_fd(writing.detach())
    return reading


def _set_at_end(ending: threading.Event, signals: socket.socket) -> None:
    if signal.SIGTERM in signals.recv(1024):  # not one that the application handles
        ending.set()


def _end_process() -> NoReturn:
    """End the process as Python does, but for taking every module apart.

    In a fork, which has them from its parent, that takes ten times as long as the rest
    of a reload. What uses `multiprocessing` ends its forks so, too.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for each in gc.get_objects():  # of which a fork has few, for its parent froze most
        if issubclass(type(each), (TextIOWrapper, BufferedWriter)):
            with suppress(Exception):  # one may be closed, or for reading
                each.flush()
    os._exit(0)


def _installed_modules() -> list[str]:
    """Return the modules that are not the project's: Python's own and its packages'."""
    return [
        name
        for name, module in sorted(sys.modules.copy().items())
        if (getattr(module, "__file__", None) or "").startswith(INSTALLED)
        and name != "__main__"
    ]


if __name__ == "__main__":
    kind = CommandVersion if sys.argv[1] == "CommandVersion" else WebVersion
    kind(**json.loads(sys.argv[2])).run()
