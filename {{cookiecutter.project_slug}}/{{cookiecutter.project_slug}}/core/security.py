"""Protection of visitors and the application: rejected requests and headers."""

from flask import Flask, abort, request
from werkzeug.wrappers import Response

from .config import Settings, hosts_setting, number_setting

SETTINGS: Settings = {
    "TRUSTED_HOSTS": hosts_setting(),
    "MAX_CONTENT_LENGTH": number_setting(1024 * 1024),  # bytes
}

# What a browser may do with an answer, unless the view says otherwise; see
# https://cheatsheetseries.owasp.org/cheatsheets/HTTP_Headers_Cheat_Sheet.html
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:;"
    " style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def init_app(app: Flask) -> None:
    """Protect every request of `app`."""
    app.before_request(_reject_cross_site)
    app.after_request(_add_headers)


def _reject_cross_site() -> None:
    # Browsers say where a request comes from, so no token is needed; what says nothing
    # is no browser: https://hosts.filippo.io/csrf/ and Go's CrossOriginProtection.
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    if site := request.headers.get("Sec-Fetch-Site"):
        same = site in ("same-origin", "none")
    else:
        origin = request.origin or f"//{request.host}"
        same = origin.partition("//")[2] == request.host
    if not same:
        abort(403, "This request comes from another site.")


def _add_headers(response: Response) -> Response:
    given = {name.lower() for name, _ in response.headers}
    for name, value in HEADERS.items():
        if name.lower() not in given:
            response.headers.add(name, value)
    return response
