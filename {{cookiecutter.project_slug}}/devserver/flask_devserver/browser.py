"""The browser's part of `flask dev`: a page reloads when a new version answers."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from secrets import token_hex
from threading import Event
from typing import Any

from werkzeug.datastructures import EnvironHeaders, Headers
from werkzeug.wrappers import Response
from werkzeug.wsgi import ClosingIterator

PREFIX = "/_flask_dev/"
HEARTBEAT = 2.0  # seconds; a page that was left is noticed at the second

# A page that was not changed since would come without the new version's script, and a
# compressed one, or a part of one, could not be given any.
UNWANTED = ("IF_NONE_MATCH", "IF_MODIFIED_SINCE", "RANGE", "ACCEPT_ENCODING")

SCRIPT = """\
(() => {
  const script = new URL(document.currentScript.src);
  const shown = script.searchParams.get("version");
  const method = script.searchParams.get("method");
  const notice = document.createElement("p");
  notice.setAttribute("role", "alert");
  Object.assign(notice.style, {
    position: "fixed", inset: "0 0 auto", margin: 0, padding: "0.5em 1em",
    background: "#8a1c1c", color: "#fff", font: "1rem sans-serif", zIndex: 2147483647,
  });
  let events, timer, failures = 0;

  function say(text) {
    notice.textContent = text;
    document.body.append(notice);
  }

  function connect() {
    events?.close();
    clearTimeout(timer);
    if (document.hidden) return; // a browser has only six connections to a server
    events = new EventSource(new URL("events", script));
    events.onmessage = ({ data }) => {
      failures = 0;
      notice.remove();
      if (data === shown) return;
      if (method === "GET") return location.reload();
      say("There is a new version. To reload this page sends the form again.");
    };
    events.onerror = () => {
      events.close();
      failures += 1;
      if (failures > 1) say("The server does not answer. This page will come back.");
      timer = setTimeout(connect, failures > 1 ? 500 : 0);
    };
  }

  addEventListener("pageshow", connect);
  addEventListener("visibilitychange", connect);
})();
"""


class BrowserReload:
    """Add a script to the pages of the WSGI application `app` that reloads them.

    A page listens to events, which say the version that answers and end with it, when
    `ending` is set.
    """

    def __init__(self, app: Any, ending: Event) -> None:
        self.app = app
        self.ending = ending
        self.version = token_hex(8)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer what the script asks, or let the application answer."""
        if environ["PATH_INFO"] == PREFIX + "reload.js":
            script = Response(SCRIPT, mimetype="text/javascript")
            return script(environ, start_response)
        if environ["PATH_INFO"] == PREFIX + "events":
            events = Response(self._events(), mimetype="text/event-stream")
            return events(environ, start_response)
        if _asks_for_a_page(environ):
            return self._with_script(environ, start_response)
        answer: Iterable[bytes] = self.app(environ, start_response)
        return answer

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
            added[:] = [tag] if is_page else []  # where a second start was allowed
            return write

        wanted = {k: v for k, v in environ.items() if k[5:] not in UNWANTED}
        body = self.app(wanted, start)
        return ClosingIterator(chain(body, added), getattr(body, "close", None))


def _asks_for_a_page(environ: dict[str, Any]) -> bool:
    """Say whether a browser is to show the answer: not a script, nor curl."""
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
