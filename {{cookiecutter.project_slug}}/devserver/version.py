"""A version of the application, served until a file is saved or the server ends."""

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
from dataclasses import dataclass
from selectors import EVENT_READ, DefaultSelector
from types import FrameType
from typing import Any

from flask.cli import ScriptInfo
from werkzeug.debug import DebuggedApplication
from werkzeug.serving import ThreadedWSGIServer

from .guard import remember_starts, what_blocks

Handler = Callable[[int, FrameType | None], object]

GRACE = 0.25  # seconds for the requests that are being answered when it is to end


class Server(ThreadedWSGIServer):
    """Werkzeug's server, which knows the requests that are being answered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answering: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.answering.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.answering.discard(request)


@dataclass
class Version:
    """What a process needs to serve a version.

    `listener` is the socket, `life` a pipe that ends with the supervisor, `news` one
    to it; all are file descriptors. `deadline` is in seconds. The `first` version says
    the debugger's PIN.
    """

    app: str | None
    host: str
    port: int
    listener: int
    life: int
    news: int
    deadline: float
    first: bool = True

    def serve(self) -> None:
        """Serve the application until SIGTERM; return when the process is to end."""
        # Python takes bytecode for good when the file was saved in the same second.
        sys.dont_write_bytecode = True
        os.environ.update(FLASK_DEBUG="1", WERKZEUG_RUN_MAIN="true", FLASK_DEV="1")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor ends it
        threading.Thread(target=self._end_with_supervisor, daemon=True).start()
        remember_starts()
        server = Server(self.host, self.port, self._load(), fd=self.listener)
        server.timeout = 0
        ending = threading.Event()
        threading.Thread(target=self._end_in_time, args=[ending], daemon=True).start()
        with DefaultSelector() as selector:
            selector.register(server.socket, EVENT_READ, server.handle_request)
            signals = on_signals(lambda *_: None, signal.SIGTERM)
            selector.register(signals, EVENT_READ, ending.set)
            os.write(self.news, json.dumps(_installed_modules()).encode() + b"\n")
            while not ending.is_set():
                for key, _ in selector.select():
                    key.data()
        end = time.monotonic() + GRACE
        while server.answering and time.monotonic() < end:
            time.sleep(0.005)

    def _load(self) -> Any:
        try:
            app: Any = ScriptInfo(app_import_path=self.app).load_app()
        except (Exception, SystemExit) as raised:
            traceback.print_exc()
            error = raised

            def app(*_: object) -> Any:
                raise error from None

        return DebuggedApplication(app, evalex=True, pin_logging=self.first)

    def _end_with_supervisor(self) -> None:
        os.read(self.life, 1)
        os._exit(1)

    def _end_in_time(self, ending: threading.Event) -> None:
        ending.wait()
        time.sleep(self.deadline)
        print(what_blocks(self.deadline), file=sys.stderr, flush=True)
        os._exit(1)


def on_signals(handler: Handler, *numbers: signal.Signals) -> socket.socket:
    """Call `handler` on the signals; return a socket that can be read after any."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    for number in numbers:
        signal.signal(number, handler)
    signal.set_wakeup_fd(writing.detach())
    return reading


def _installed_modules() -> list[str]:
    """Return the modules that are not the project's: Python's own and its packages'."""
    places = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platlib"))
    return [
        name
        for name, module in sorted(sys.modules.items())
        if (getattr(module, "__file__", None) or "").startswith(places)
        and name != "__main__"
    ]


if __name__ == "__main__":
    Version(**json.loads(sys.argv[1])).serve()
