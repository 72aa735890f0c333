"""The browser's part of `flask dev`: a page reloads when a new version responds."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from secrets import token_hex
from threading import Event
from typing import Any

from werkzeug.wrappers import Request, Response

PREFIX = "/_flask_dev/"
SCRIPT = Path(__file__).with_name("reload.js")
HEARTBEAT = 2.0  # seconds; a closed page is noticed at the second heartbeat

# A response of 304 would keep the previous version's script. The script cannot be added
# to a compressed page, nor to a part of a page.
UNWANTED = ("IF_NONE_MATCH", "IF_MODIFIED_SINCE", "RANGE", "ACCEPT_ENCODING")


class BrowserReload:
    """Add a script to the pages of the WSGI application `app` that reloads them.

    A page listens to events, which name the version that responds. The events stop when
    `ending` is set.
    """

    def __init__(self, app: Any, ending: Event) -> None:
        self.app = app
        self.ending = ending
        self.version = token_hex(8)

    @Request.application  # type: ignore[arg-type, unused-ignore]
    def __call__(self, request: Request) -> Any:  # type: ignore[misc, unused-ignore]
        """Respond to the script, or let the application respond."""
        if request.path == PREFIX + "reload.js":
            return Response(SCRIPT.read_text(), mimetype="text/javascript")
        if request.path == PREFIX + "events":
            return Response(self._events(), mimetype="text/event-stream")
        return self._with_script(request) if asks_for_page(request) else self.app

    def _events(self) -> Iterator[str]:
        yield f"data: {self.version}\n\n"
        while not self.ending.wait(HEARTBEAT):
            yield ":\n\n"

    def _with_script(self, request: Request) -> Response:
        wanted = {k: v for k, v in request.environ.items() if k[5:] not in UNWANTED}
        response = Response.from_app(self.app, wanted)
        if _is_page(response):
            query = f"version={self.version}&amp;method={request.method}"
            tag = f'<script src="{PREFIX}reload.js?{query}"></script>\n'.encode()
            if response.content_length is not None:
                response.content_length += len(tag)
            response.call_on_close(getattr(response.response, "close", bool))
            response.response = chain(response.iter_encoded(), [tag])
        return response


def asks_for_page(request: Request) -> bool:
    """Return whether a browser shows the response, unlike a script or curl."""
    shown = request.headers.get("Sec-Fetch-Dest", "document") == "document"
    html = "text/html" in request.headers.get("Accept", "")
    return shown and html and request.method != "HEAD"


def _is_page(response: Response) -> bool:
    html = response.mimetype == "text/html" and not response.content_encoding
    saved = response.headers.get("Content-Disposition", "").startswith("attachment")
    return html and not saved and response.status_code not in (204, 206, 304)
