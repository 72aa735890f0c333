"""Protection of visitors and the application: rejected requests and headers."""

import logging
import re
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import IO, Any

import flask
from flask import Flask, current_app, request
from flask.sessions import SecureCookieSessionInterface, SessionMixin
from werkzeug import exceptions
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.utils import cached_property

from .config import Setting, Settings, number_setting, split

logger = logging.getLogger(__name__)


def _parse_hosts(raw: Any) -> list[str] | None:
    hosts = [host.lower() for host in split(raw)]
    if hosts == ["*"]:
        return None
    if not all(re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*", host) for host in hosts):
        raise ValueError
    return hosts


def _parse_origins(raw: Any) -> list[str]:
    origins = [origin.lower() for origin in split(raw)]
    if not all(re.fullmatch(r"https?://[\w.-]+(:\d+)?", origin) for origin in origins):
        raise ValueError
    return origins


SETTINGS: Settings = {
    "TRUSTED_HOSTS": Setting(
        _parse_hosts,
        "write hosts like example.com,.example.org, or * for any.",
        # With any host, a site whose name leads to this machine could read its data.
        default=["localhost", ".localhost", "127.0.0.1"],
        example="the host names of the site, such as example.com",
    ),
    "TRUSTED_ORIGINS": Setting(
        _parse_origins, "write origins like https://app.example.com.", default=()
    ),
    "TRUSTED_PROXIES": number_setting(0),
    "MAX_CONTENT_LENGTH": number_setting(1024 * 1024),  # bytes
}

# The headers of every response, unless the view sets them. They follow
# https://cheatsheetseries.owasp.org/cheatsheets/HTTP_Headers_Cheat_Sheet.html
# The policy rejects inline scripts and styles, and everything from other sites, such as
# a CDN. A view can set another policy for itself. `app.after_request` can for all.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:;"
    " object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
# A browser that has seen this uses TLS for the host from then on.
PRODUCTION_HEADERS = HEADERS | {"Strict-Transport-Security": "max-age=31536000"}


class SessionInterface(SecureCookieSessionInterface):
    """Keep responses that depend on a session out of shared caches."""

    def open_session(self, app: Flask, request: flask.Request) -> Any:
        """Return the session of the request."""
        # Without a cookie, Flask would make a serializer that nothing uses.
        if "HTTP_COOKIE" not in request.environ:
            return self.session_class()
        return super().open_session(app, request)

    def save_session(self, app: Flask, session: SessionMixin, response: Any) -> None:
        """Set the cookie."""
        super().save_session(app, session, response)
        # Flask renews the cookie of a permanent session with every response.
        if session.accessed or "Set-Cookie" in response.headers:
            response.cache_control.public = None
            response.cache_control.private = True


class Request(flask.Request):
    """Reject more kinds of hostile bodies than Flask, with a 400, 411 or 413."""

    def get_json(self, *args: Any, **kwargs: Any) -> Any:
        """Return the body, parsed as JSON."""
        try:
            return super().get_json(*args, **kwargs)
        except RecursionError:
            raise exceptions.BadRequest("The JSON is nested too deeply.") from None

    @cached_property
    def stream(self) -> IO[bytes]:
        """The body. A form may have `MAX_FORM_PARTS` fields."""
        if "Transfer-Encoding" in self.headers:
            # A server may treat a truncated body of unknown length as complete.
            raise exceptions.LengthRequired("A body needs the header Content-Length.")
        # With this flag, Werkzeug takes a body for complete if its client disconnects.
        self.environ.pop("wsgi.input_terminated", None)
        stream = super().stream
        if self.mimetype != "application/x-www-form-urlencoded":
            return stream
        body = stream.read()
        if body.count(b"&") >= (self.max_form_parts or 1e9):
            raise exceptions.RequestEntityTooLarge
        return BytesIO(body)


def init_app(app: Flask) -> None:
    """Protect every request of `app`."""
    app.request_class = Request
    app.session_interface = SessionInterface()
    added = HEADERS if app.debug else PRODUCTION_HEADERS
    headers = {name.lower(): (name, value) for name, value in added.items()}
    app.full_dispatch_request = partial(_dispatch, app.full_dispatch_request)  # type: ignore[method-assign]
    app.wsgi_app = partial(_add_headers, app.wsgi_app, headers)  # type: ignore[method-assign]
    if count := app.config["TRUSTED_PROXIES"]:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=count, x_proto=count)  # type: ignore[method-assign]


def accept_cross_site(view: Any) -> Any:
    """Let other sites post to a view, which must itself check the request."""
    view.accepts_cross_site = True
    return view


def _dispatch(dispatch: Any, *args: Any) -> Any:
    # No hook of the application runs for a rejected request, because a hook may rely on
    # another one.
    error = request.routing_exception
    if isinstance(error, exceptions.BadRequest):
        host = request.headers.get("Host")
        logger.info("The host %.200r is rejected: see TRUSTED_HOSTS", host)
        # Flask builds no URL for an untrusted host, so no page responds either.
        request.__dict__["host"] = "untrusted.invalid"  # for functions of teardown
        return error.get_response()
    if _is_cross_site():
        app: Any = current_app
        is_url = "://" in (request.origin or "")
        hint = ": see TRUSTED_ORIGINS, TRUSTED_PROXIES" if is_url else ""
        logger.info("A request from %.200r is rejected%s", request.origin, hint)
        forbidden = exceptions.Forbidden("This request comes from another site.")
        return app.make_response(app.handle_user_exception(*args, forbidden))
    return dispatch(*args)


def _is_cross_site() -> bool:
    # Browsers say which site a request comes from, so no token is needed. Other clients
    # need no protection: see https://words.filippo.io/csrf/.
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return False
    view = current_app.view_functions.get(request.endpoint or "")
    is_accepted = getattr(view, "accepts_cross_site", False)
    if is_accepted or request.origin in current_app.config["TRUSTED_ORIGINS"]:
        return False
    if site := request.headers.get("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    own = f"{request.scheme}://{request.host}"
    return request.origin not in (None, "", own)


def _add_headers(
    wsgi_app: Any, headers: Mapping[str, Any], environ: Any, start_response: Any
) -> Any:
    # Names of hosts are not case-sensitive, but Werkzeug's check is.
    if host := environ.get("HTTP_HOST"):
        environ["HTTP_HOST"] = host.lower()

    # The server's list takes a tenth of the time that Werkzeug's `Headers` takes.
    def start(status: str, given: list[tuple[str, str]], *error: Any) -> Any:
        names = {name.lower() for name, _ in given}
        added = [headers[name] for name in headers if name not in names]
        return start_response(status, given + added, *error)

    return wsgi_app(environ, start)
