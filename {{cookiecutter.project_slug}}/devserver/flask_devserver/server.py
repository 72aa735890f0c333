"""Werkzeug's threaded server, with a list of the requests in flight."""

import time
from typing import Any, cast

from werkzeug.serving import BaseWSGIServer, ThreadedWSGIServer, WSGIRequestHandler

from .browser import PREFIX


class RequestHandler(WSGIRequestHandler):
    """List each request at the server, and log none of `BrowserReload`."""

    server: "Server"

    def run_wsgi(self) -> None:
        if not self.path.startswith(PREFIX):
            self.server.in_flight[self.connection] = f"{self.command} {self.path}"
        super().run_wsgi()

    def log_request(self, *args: Any) -> None:
        if not getattr(self, "path", "").startswith(PREFIX):
            super().log_request(*args)


class Server(ThreadedWSGIServer):
    """Handle each request in a thread or, without `threads`, one after the other."""

    threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout = 0
        self.in_flight: dict[Any, str] = {}  # by connection; without a name at first
        if self.ssl_context:
            # Otherwise the thread that accepts connections would wait for the client.
            cast(Any, self.socket).do_handshake_on_connect = False

    def process_request(self, request: Any, client_address: Any) -> None:
        self.in_flight[request] = ""
        kind = ThreadedWSGIServer if self.threads else BaseWSGIServer
        kind.process_request(self, request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.in_flight.pop(request, None)

    def finish_requests(self, seconds: float) -> bool:
        """Wait for the requests in flight; return whether all are finished."""
        end = time.monotonic() + seconds
        while self.in_flight and time.monotonic() < end:
            time.sleep(0.002)
        return not self.in_flight
