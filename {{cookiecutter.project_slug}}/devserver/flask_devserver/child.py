"""A process that runs one version of the application until a file is saved."""

import _thread
import atexit
import ctypes
import gc
import importlib
import json
import os
import selectors
import shlex
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedWriter, StringIO, TextIOWrapper
from selectors import EVENT_READ
from typing import Any, NoReturn, cast

from flask.cli import ScriptInfo, cli
from werkzeug.debug import DebuggedApplication
from werkzeug.wsgi import get_host

from . import say, shutdown
from .browser import BrowserReload
from .files import Signature, module_files, signature
from .server import RequestHandler, Server
from .welcome import Welcome

if sys.platform == "win32":
    raise ImportError("flask dev needs Linux or macOS.")

COMMAND_DEADLINE = 5.0  # seconds; nobody waits for a command, so it may finish its work
IDLE = 0.3  # seconds between two checks for newly imported modules
SLOW_IMPORT = 10.0  # seconds; the line of a longer import is printed
SIGNAL_DELAY = 0.1  # seconds until this process handles a signal, at most
GRACE = 0.05  # seconds that the next version waits for the requests in flight
MAX_READ = 4000  # files; more are data, which would take long to watch
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(kw_only=True)
class Child:
    """The settings of a process that runs a version of `app`, an import path.

    It serves the application or, with a `command`, runs that. `options` are those of
    `flask dev`. `listener` is the socket and `status_pipe` leads to the `parent`; both
    are file descriptors. `root` is the folder in which it runs. At the monotonic time
    `began`, the version started to replace the previous one, unless it is the `first`.
    """

    app: str | None
    options: dict[str, Any]
    listener: int
    command: str = ""
    root: str = field(default_factory=lambda: os.path.join(os.getcwd(), ""))
    path: list[str] = field(default_factory=sys.path.copy)  # to import modules from
    parent: int = field(default_factory=os.getpid)
    status_pipe: int = -1
    first: bool = True
    began: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"flask {self.command}" if self.command else "The application"

    @property
    def deadline(self) -> float:
        """The seconds that it has to exit."""
        return COMMAND_DEADLINE if self.command else float(self.options["deadline"])

    def run(self) -> NoReturn:
        """Run until SIGTERM, and exit."""
        self._prepare()
        importlib.invalidate_caches()  # An archive on the path may have changed.
        if self.command:
            self._run_command()
        self._serve()

    def descriptors(self) -> tuple[int, int]:
        """Return the file descriptors that only this process needs."""
        return self.listener, self.status_pipe

    def _prepare(self) -> None:
        os.environ.update(FLASK_DEBUG="1", WERKZEUG_RUN_MAIN="true", _FLASK_DEV="1")
        os.environ["FLASK_RUN_HOST"] = self.options["host"]
        # The supervisor handles Ctrl-C. Programs that the application starts would
        # inherit SIG_IGN, but do not inherit this handler.
        signal.signal(signal.SIGINT, do_nothing)
        for fd in self.descriptors():
            os.set_inheritable(fd, False)
        # Without this, a fork could lose a SIGTERM that arrives before it has reset its
        # handlers, or pass the signal on to this process.
        self.masks: dict[int, Any] = {}  # by thread
        os.register_at_fork(before=self._block, after_in_parent=self._unblock)
        os.register_at_fork(after_in_child=self._reset_in_fork)
        self.read: dict[str, Signature] = {}
        self.written: set[str] = set()
        self.loaded = False
        self.unsent: deque[bytes] = deque()
        self.sending = False
        self.lock = threading.RLock()
        sys.addaudithook(self._on_audit)
        shutdown.exit_with_parent(self.parent)
        shutdown.remember_thread_origins()

    def _block(self) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        self.masks[_thread.get_ident()] = mask

    def _unblock(self) -> None:
        mask = self.masks.pop(_thread.get_ident())
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _reset_in_fork(self) -> None:
        """Undo `_prepare` in a process that the application forks."""
        if signal.getsignal(signal.SIGINT) is do_nothing:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if isinstance(signal.getsignal(signal.SIGTERM), Waker):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._unblock()
        for fd in self.descriptors():
            with suppress(OSError):
                os.close(fd)
        self.listener = self.status_pipe = -1
        self.lock = threading.RLock()  # A thread may have held it.

    def _on_audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Note what is read at the start, and tell the supervisor what is written."""
        if event not in ("open", "exec", "os.rename", "os.utime", "sqlite3.connect"):
            return
        with suppress(Exception):
            reads = event == "exec" or (event == "open" and not args[2] & WRITING)
            if reads and (self.loaded or len(self.read) > MAX_READ):
                return
            path = args[event == "os.rename"]
            path = os.fsdecode(getattr(path, "co_filename", path))
            if event == "sqlite3.connect":  # The path may be in a URI.
                path = path.removeprefix("file:").partition("?")[0]
            path = os.path.abspath(path)
            seen = path in self.written and not path.endswith(".py")
            if reads:
                found = signature(path) if event == "open" else ()
                self.read.setdefault(path, found)
            elif path.startswith(self.root) and not seen:
                self.written.add(path)
                self._send(written=path)

    def _send(self, **message: object) -> None:
        self.unsent.append(json.dumps(message).encode() + b"\n")
        with suppress(OSError), self.lock:
            if self.sending:  # A signal handler has interrupted another message.
                return
            self.sending = True
            try:
                while self.unsent:
                    line = self.unsent.popleft()
                    if rest := line[os.write(self.status_pipe, line) :]:
                        self.unsent.appendleft(rest)
            finally:
                self.sending = False

    def _notify_ready(self) -> None:
        self._send(ready=True)
        _thread.start_new_thread(self._send_modules, ())

    def _send_modules(self) -> None:
        """Report new modules: the supervisor imports some, and watches the files."""
        known: set[tuple[str, str]] = set()
        count = 0
        while True:
            time.sleep(IDLE)  # The first request has priority.
            if len(sys.modules) != count:
                count = len(sys.modules)
                new = [found for found in module_files() if found not in known]
                known.update(new)
                # Modules that import others come first.
                # gevent and eventlet replace functions of Python.
                patched = hasattr(os.waitpid, "__code__")
                self._send(modules=dict(reversed(new)), patched=patched)

    def _run_command(self) -> NoReturn:
        # SIGINT stays blocked: at Ctrl-C, Celery would shut down twice.
        os.close(self.listener)
        self.listener = -1
        self._notify_ready()
        # The parent has read .env, which may be invalid by now.
        info = ScriptInfo(app_import_path=self.app, load_dotenv_defaults=False)
        try:
            info.load_app()
        except BaseException as error:
            self._send(files=self.read, failed=True)
            # The server prints the traceback, which Flask puts into some messages.
            reason = str(error).strip().rpartition("\n")[2]
            say(f" * {self.name} cannot import the application: {reason}")
            _exit(2)
        self.loaded = True
        try:
            cli.main(shlex.split(self.command), obj=info)
        except SystemExit as error:
            _exit(error.code)
        except Exception:
            traceback.print_exc()
        _exit(1)

    def _serve(self) -> NoReturn:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        ending = threading.Event()
        _thread.start_new_thread(self._name_slow_import, (time.sleep,))
        app = self._load()
        names = "host", "port", "cert", "with_threads"
        host, port, cert, threads = (self.options[name] for name in names)
        # An open page would take the only thread.
        if self.options["browser_reload"] and threads:
            app = BrowserReload(app, ending)
        context = tuple(cert) if isinstance(cert, list) else cert
        server = Server(host, port, app, RequestHandler, False, context, self.listener)
        server.threads = threads
        os.register_at_fork(after_in_child=server.socket.close)
        waker = Waker()
        signal.signal(signal.SIGTERM, waker)
        # The application may have replaced the selectors, so look them up only now.
        with selectors.DefaultSelector() as selector:
            selector.register(server.socket, EVENT_READ, server.handle_request)
            selector.register(waker.pipe, EVENT_READ, ending.set)
            self._notify_ready()
            while not ending.is_set():
                # On macOS another thread may get the signal.
                for key, _ in selector.select(SIGNAL_DELAY):
                    key.data()
        waker.clear()
        requests = self._finish(server, waker)
        shutdown.kill_after(self.deadline, 1, requests)
        # Python waits for executors, so an asynchronous view may still finish.
        cast(Any, threading)._shutdown()
        server.finish_requests(GRACE)
        _exit(0, requests)

    def _name_slow_import(self, sleep: Callable[[float], None]) -> None:
        sleep(SLOW_IMPORT)
        if not self.loaded:
            place = shutdown.position(threading.main_thread())
            print(f" * The application is still being imported, at {place}", flush=True)

    def _finish(self, server: Server, waker: "Waker") -> Iterable[str]:
        """Finish the requests in flight while the next version starts.

        Return those that have not finished in time. A second SIGTERM asks for an exit
        at once.
        """
        if not server.finish_requests(GRACE):
            self._send(draining=True)
        end = time.monotonic() + self.deadline
        while not server.finish_requests(0.02) and time.monotonic() < end:
            if waker.clear():
                return ()
        return server.in_flight.values()

    def _load(self) -> Any:
        try:
            flask_app = ScriptInfo(app_import_path=self.app).load_app()
            if self.first:
                # The first request raises the same error.
                with suppress(Exception), flask_app.app_context():
                    flask_app.extensions.get("prepare", bool)()
            seconds = f"{time.monotonic() - self.began:.2f} s"
            app: Any = Welcome(flask_app, "" if self.first else seconds)
        except BaseException as raised:
            self._send(failed=True)
            app = _failing(raised, self.options["host"])
        self.loaded = True
        self._send(files=self.read)
        if self.options["debugger"] is not False:
            app = DebuggedApplication(app, evalex=True, pin_logging=self.first)
            app.trusted_hosts.append(self.options["host"])
        return app


def _failing(raised: BaseException, host: str) -> Any:
    """Return an application that raises the error of a failed import."""
    place = raised.__traceback__ and raised.__traceback__.tb_next  # below this module
    traceback.print_exception(raised.with_traceback(place))
    error = raised
    if not isinstance(error, Exception):  # The debugger shows no others.
        error = RuntimeError(f"The application raised {raised!r} when it was imported.")

    def app(environ: dict[str, Any], _: object) -> Any:
        # Werkzeug's debugger begins below this frame.
        __traceback_hide__ = True  # noqa: F841
        environ["wsgi.errors"] = StringIO()  # The log already has the error.
        # Another site can make its name lead here, but must not read the source.
        if ":" not in host and host != "0.0.0.0":  # noqa: S104
            get_host(environ, [".localhost", "127.0.0.1", host])
        raise error.with_traceback(place)

    return app


class Waker:
    """A signal handler that makes `pipe` readable.

    The application may replace Python's own wakeup descriptor.
    """

    def __init__(self) -> None:
        self.pipe, self.writing = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(self.writing, False)

    def __call__(self, *_: object) -> None:
        """Handle a signal."""
        with suppress(BlockingIOError):
            os.write(self.writing, b".")

    def clear(self) -> bool:
        """Return whether there was a signal since the last time."""
        with suppress(BlockingIOError):
            return bool(os.read(self.pipe, 1024))
        return False


def do_nothing(*_: object) -> None:
    """Handle a signal that the supervisor takes care of."""


def _exit(code: Any, requests: Iterable[str] = ()) -> NoReturn:
    """Exit as Python does, but without destroying every module. Name the `requests`.

    Destroying them takes ten times as long as the rest of a reload. Forks of
    `multiprocessing` exit like this, too.
    """
    cast(Any, threading)._shutdown()
    atexit._run_exitfuncs()
    shutdown.name_aborted(requests)
    # The supervisor has frozen its objects, so the collector lists few in a fork.
    for each in [sys.stdout, sys.stderr, *gc.get_objects()]:
        if issubclass(type(each), (TextIOWrapper, BufferedWriter)):
            with suppress(Exception):  # A file may be closed, or open for reading.
                each.flush()
    ctypes.CDLL(None).fflush(None)  # Libraries in C have their own buffers.
    os._exit(code if isinstance(code, int) else bool(code))


if __name__ == "__main__":
    child = Child(**json.loads(os.environ.pop("_FLASK_DEV_CHILD")))
    sys.path[:] = child.path
    child.run()
