"""The browser's part of `flask dev`: a page reloads when a new version responds."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from secrets import token_hex
from threading import Event
from typing import Any

from werkzeug.datastructures import EnvironHeaders, Headers
from werkzeug.wrappers import Response
from werkzeug.wsgi import ClosingIterator

PREFIX = "/_flask_dev/"
SCRIPT = Path(__file__).with_name("reload.js")
HEARTBEAT = 2.0  # seconds; a closed page is noticed at the second one

# A response of 304 would keep the previous version's script. The script cannot be added
# to a compressed page, nor to a part of a page.
UNWANTED = ("IF_NONE_MATCH", "IF_MODIFIED_SINCE", "RANGE", "ACCEPT_ENCODING")


class BrowserReload:
    """Add a script to the pages of the WSGI application `app` that reloads them.

    A page listens to events, which name the version that responds. They end with it,
    when `ending` is set.
    """

    def __init__(self, app: Any, ending: Event) -> None:
        self.app = app
        self.ending = ending
        self.version = token_hex(8)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Respond to the script, or let the application respond."""
        if environ["PATH_INFO"] == PREFIX + "reload.js":
            script = Response(SCRIPT.read_text(), mimetype="text/javascript")
            return script(environ, start_response)
        if environ["PATH_INFO"] == PREFIX + "events":
            events = Response(self._events(), mimetype="text/event-stream")
            return events(environ, start_response)
        if asks_for_page(environ):
            return self._with_script(environ, start_response)
        response: Iterable[bytes] = self.app(environ, start_response)
        return response

    def _events(self) -> Iterator[str]:
        yield f"data: {self.version}\n\n"
        while not self.ending.wait(HEARTBEAT):
            yield ":\n\n"

    def _with_script(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        query = f"version={self.version}&amp;method={environ['REQUEST_METHOD']}"
        tag = f'<script src="{PREFIX}reload.js?{query}"></script>\n'.encode()
        added: list[bytes] = []

        def start(status: str, fields: list[tuple[str, str]], *error: Any) -> Any:
            headers = Headers(fields)
            is_page = _is_page(status, headers)
            if is_page and "Content-Length" in headers:
                length = int(headers["Content-Length"]) + len(tag)
                headers["Content-Length"] = str(length)
            write = start_response(status, headers.to_wsgi_list(), *error)
            added[:] = [tag] if is_page else []  # An error may start it again.
            return write

        wanted = {k: v for k, v in environ.items() if k[5:] not in UNWANTED}
        body = self.app(wanted, start)
        return ClosingIterator(chain(body, added), getattr(body, "close", None))


def asks_for_page(environ: dict[str, Any]) -> bool:
    """Return whether a browser shows the response, as no script and no curl does."""
    headers = EnvironHeaders(environ)
    shown = headers.get("Sec-Fetch-Dest", "document") == "document"
    return (
        shown
        and environ["REQUEST_METHOD"] != "HEAD"
        and "text/html" in headers.get("Accept", "")
    )


def _is_page(status: str, headers: Headers) -> bool:
    bodiless = status.startswith(("1", "204", "206", "304"))
    html = headers.get("Content-Type", "").startswith("text/html")
    saved = headers.get("Content-Disposition", "").startswith("attachment")
    return html and not (bodiless or saved or "Content-Encoding" in headers)
