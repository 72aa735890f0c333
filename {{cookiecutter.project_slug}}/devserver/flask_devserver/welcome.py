"""The welcome page of the development server, shown while `/` is not found."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from flask import Flask, request
from jinja2 import Environment, FileSystemLoader
from werkzeug.wrappers import Request, Response
from werkzeug.wsgi import get_host

from .browser import PREFIX, asks_for_page

Figures = dict[str, dict[str, object]]

FOLDER = Path(__file__).parent
POLICY = "default-src 'self'; img-src data:; style-src 'unsafe-inline'"


class Welcome:
    """Show a page at `/` as long as the application `app` responds with 404 there.

    `last_reload` is how long the last reload took, as the page shows it.
    """

    def __init__(self, app: Flask, last_reload: str) -> None:
        self.app = app
        self.last_reload = last_reload
        # Hooks run in reverse order, so the application's hooks see its own response.
        app.after_request_funcs.setdefault(None, []).insert(0, self._show_page)

    @Request.application  # type: ignore[arg-type, unused-ignore]
    def __call__(self, request: Request) -> Any:  # type: ignore[misc, unused-ignore]
        """Respond to a request of the page, or let the application respond."""
        if request.path == PREFIX + "welcome.js":
            script = (FOLDER / "welcome.js").read_text()
            return Response(script, mimetype="text/javascript")
        if request.path == PREFIX + "status":
            # Another site can make its name lead here. This raises `SecurityError`.
            get_host(request.environ, self.app.config["TRUSTED_HOSTS"])
            figures = self._figures(connect=request.query_string == b"connect")
            return Response(json.dumps(figures), mimetype="application/json")
        return self.app

    def _show_page(self, response: Response) -> Response:
        missing = request.path == "/" and response.status_code == 404
        if not (missing and asks_for_page(request)):
            return response
        headers = {"Content-Security-Policy": POLICY}
        return Response(self._page(), headers=headers, mimetype="text/html")

    def _page(self) -> str:
        environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True)
        return environment.get_template("welcome.html").render(
            app=self.app,
            prefix=PREFIX,
            description=self._description(),
            versions={"Flask": version("flask"), "Python": sys.version.split()[0]},
            figures=self._figures(connect=True),
            routes=sorted(self._routes()),
        )

    def _description(self) -> str:
        with suppress(PackageNotFoundError, KeyError, ValueError):
            return str(metadata(self.app.name)["Summary"])
        module = sys.modules.get(self.app.import_name)
        return (getattr(module, "__doc__", "") or "").partition("\n")[0]

    def _figures(self, connect: bool) -> Figures:
        """Return the figures of this process and, with `connect`, of its database.

        In `extensions`, the application may keep a pool, a worker, and as "problem" a
        function that returns what is wrong. This checks out one connection at a time,
        and does not wait for an exhausted pool.
        """
        figures: Figures = {"process": {"id": os.getpid(), "reload": self.last_reload}}
        pool, worker = map(self.app.extensions.get, ("pool", "worker"))
        try:
            with self.app.app_context():
                figures["pool"] = _stats(pool)
                if connect and hasattr(pool, "getconn"):
                    figures["postgresql"] = {"version": _postgresql_version(pool)}
                    if problem := self.app.extensions.get("problem", str)():
                        figures["problem"] = {"sentence": problem}
                if figures["pool"].get("in_use") != figures["pool"].get("size", -1):
                    figures["worker"] = _stats(worker)
        except Exception as error:  # The page reports a problem, whatever it is.
            sentence = str(error).partition("\n")[0] or repr(error)
            figures["problem"] = {"sentence": sentence}
        return {name: found for name, found in figures.items() if found}

    def _routes(self) -> Iterator[tuple[str, str, str]]:
        """Yield path, methods and the first line of the docstring of each route."""
        for rule in self.app.url_map.iter_rules():
            if rule.endpoint != "static":
                methods = (rule.methods or set()) - {"HEAD", "OPTIONS"}
                view = self.app.view_functions.get(rule.endpoint)
                summary = str(getattr(view, "__doc__", "") or "")
                yield rule.rule, " ".join(sorted(methods)), summary.partition("\n")[0]


def _stats(extension: object) -> dict[str, object]:
    status = getattr(extension, "status", dict)
    return dict(getattr(extension, "stats", status)())


def _postgresql_version(pool: Any) -> str:
    conn = pool.getconn()
    try:
        return str(conn.info.parameter_status("server_version")).split()[0]
    finally:
        pool.putconn(conn)
