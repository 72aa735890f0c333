"""Werkzeug's threaded server, which knows the requests that are in flight."""

import socket
import time
from io import BufferedReader
from typing import Any, cast

from werkzeug.serving import BaseWSGIServer, ThreadedWSGIServer, WSGIRequestHandler

from .browser import PREFIX

PATIENCE = 0.1  # seconds from a connection to its request, on a busy machine


class RequestHandler(WSGIRequestHandler):
    """Tell the server which request has begun; do not log those of the browser part."""

    server: "Server"

    def handle_one_request(self) -> None:
        if cast(BufferedReader, self.rfile).peek(1):
            self.server.handlers[self.connection] = self
        super().handle_one_request()

    def log_request(self, *args: Any) -> None:
        if not getattr(self, "path", "").startswith(PREFIX):
            super().log_request(*args)


class Server(ThreadedWSGIServer):
    """Handle each request in a thread or, without `threads`, one after the other."""

    threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout = 0
        self.accepted: dict[socket.socket, float] = {}  # connections, and since when
        self.handlers: dict[socket.socket, RequestHandler] = {}
        if self.ssl_context:
            # A thread of its own waits for the client, not the one that accepts.
            cast(Any, self.socket).do_handshake_on_connect = False

    def process_request(self, request: Any, client_address: Any) -> None:
        self.accepted[request] = time.monotonic()
        if self.threads:
            super().process_request(request, client_address)
        else:
            BaseWSGIServer.process_request(self, request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.accepted.pop(request, None)
        self.handlers.pop(request, None)

    def requests_in_flight(self) -> list[str]:
        """Return method and path of each request that has begun."""
        handlers = list(self.handlers.values())
        names = [(getattr(h, "command", ""), getattr(h, "path", "")) for h in handlers]
        return [" ".join(each) for each in names if not each[1].startswith(PREFIX)]

    def finish_requests(self, seconds: float) -> bool:
        """Wait for the requests in flight; return whether all are finished."""
        end = time.monotonic() + seconds
        idle = 0  # checks in a row at which no request had begun
        while self.accepted and idle < 2:
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
            begun = any(map(self._has_begun, list(self.accepted)))
            idle = 0 if begun else idle + 1
        return True

    def _has_begun(self, connection: socket.socket) -> bool:
        # Browsers open connections long before they send something, if they ever do.
        recent = time.monotonic() - self.accepted.get(connection, 0) < PATIENCE
        return recent or connection in self.handlers
