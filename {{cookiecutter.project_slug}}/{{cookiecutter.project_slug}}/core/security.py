"""What protects visitors and the application: refusals, headers, errors."""

import json

from flask import Flask, abort, after_this_request, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from .config import hosts, number

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


def wants_json() -> bool:
    """Say whether the client of this request sent JSON or prefers it to HTML."""
    after_this_request(_vary)
    offered = ["text/html", "application/json"]
    best = request.accept_mimetypes.best_match(offered)
    return request.is_json or best == "application/json"


def _vary(response: Response) -> Response:
    response.vary.add("Accept")  # or a cache would mix them up
    return response


def init_app(app: Flask) -> None:
    """Protect every request of `app`."""
    hosts(app, "TRUSTED_HOSTS")
    number(app, "MAX_CONTENT_LENGTH", 1024 * 1024)
    app.before_request(_refuse_cross_site)
    app.after_request(_add_headers)
    app.register_error_handler(HTTPException, _answer_error)


def _refuse_cross_site() -> None:
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


def _answer_error(error: HTTPException) -> ResponseReturnValue:
    response = error.get_response()
    if wants_json() and error.response is None:
        # https://www.rfc-editor.org/rfc/rfc9457
        detail = {"title": error.name, "detail": error.description}
        response.data = json.dumps(detail | {"status": error.code})
        response.content_type = "application/problem+json"
    return response
