"""Error responses: HTML pages for people, problem details for clients of the API."""

import json
from typing import Any

from flask import Flask, after_this_request, current_app, render_template, request
from jinja2 import TemplateNotFound
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response


def wants_json() -> bool:
    """Return whether the client of this request sent JSON or prefers it to HTML."""
    after_this_request(_vary)
    best = request.accept_mimetypes.best_match(["text/html", "application/json"])
    return request.is_json or best == "application/json"


def _vary(response: Response) -> Response:
    response.vary.add("Accept")  # Otherwise a cache mixes up the two forms.
    return response


def _render_error(error: HTTPException) -> Any:
    # Older Werkzeug declares a class without `data`.
    response: Any = error.get_response()
    if error.response is not None:
        return response
    if wants_json():
        # https://www.rfc-editor.org/rfc/rfc9457
        detail = {"title": error.name, "detail": error.description}
        response.data = json.dumps(detail | {"status": error.code}, default=str)
        response.content_type = "application/problem+json"
    else:
        try:
            response.data = render_template("error.html", error=error)
        except TemplateNotFound:
            pass
        except Exception:  # The page may need the database, which is unavailable.
            current_app.logger.exception("The page of the error cannot be rendered")
    return response


def init_app(app: Flask) -> None:
    """Render the HTTP errors of `app` in the form that the client prefers."""
    app.register_error_handler(HTTPException, _render_error)
