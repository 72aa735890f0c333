"""The page that greets in development, until the application has a first page.

To be rid of it, remove its paragraph from `create_app`, this file and `start.html`.
"""

import logging
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from operator import itemgetter

from flask import Blueprint, Flask, Response, current_app, render_template, request

from .browser import PREFIX

Figures = dict[str, dict[str, object]]

SCRIPT = """\
(async () => {
  const problem = document.getElementById("problem");
  const path = problem ? "status?connect" : "status";
  const status = new URL(path, document.currentScript.src);
  for (;;) {
    await new Promise((resume) => setTimeout(resume, 1000));
    if (document.hidden) continue;
    const answer = await fetch(status).catch(() => null); // while there is no server
    if (!answer?.ok) continue;
    const figures = await answer.json();
    if (!figures.problem === !!problem) return location.reload();
    for (const element of document.querySelectorAll("[data-figure]")) {
      const [group, name] = element.dataset.figure.split(".");
      const property = element.tagName === "METER" ? "value" : "textContent";
      element[property] = figures[group]?.[name] ?? element[property];
    }
  }
})();
"""

bp = Blueprint("start", __name__, template_folder=".")


@bp.get("/")
def index() -> str:
    """Show what runs, how it does, and what to do next."""
    return render_template(
        "start.html",
        app=current_app,
        versions={"Flask": version("flask"), "Python": platform.python_version()},
        figures=_figures(connect=True),
        routes=sorted(_routes(), key=itemgetter(1)),
    )


@bp.get(PREFIX + "status")
def status() -> Figures:
    """Return the figures of the page, which asks every second while it is visible."""
    return _figures(connect="connect" in request.args)


@bp.get(PREFIX + "start.js")
def script() -> Response:
    """Return what keeps the page up to date."""
    return Response(SCRIPT, mimetype="text/javascript")


def init_app(app: Flask) -> None:
    """Let the page answer at `/`, before what `app` has there."""
    app.register_blueprint(bp)
    logging.getLogger(f"{app.name}.core.log").addFilter(_is_no_status)


def _is_no_status(record: logging.LogRecord) -> bool:
    return PREFIX not in record.getMessage()  # or there is a line a second


def _figures(connect: bool) -> Figures:
    """Return what is known of this process and, with `connect`, of its database.

    Whatever takes a connection gives it back before the next does, and an exhausted
    pool does not keep its own figures waiting.
    """
    pool = current_app.extensions["pool"].status()
    worker = current_app.extensions.get("worker")
    figures: Figures = {"process": _process(), "pool": pool}
    try:
        if connect:
            figures["postgresql"] = {"version": _postgresql_version()}
        if worker and pool["in_use"] != pool.get("size"):
            figures["worker"] = worker.status()
    except Exception as error:  # whatever is wrong, the page is there to say it
        sentence = str(error).partition("\n")[0] or repr(error)
        figures["problem"] = {"sentence": sentence}
    return figures


def _process() -> dict[str, object]:
    reload = os.environ.get("FLASK_DEV_RELOAD")  # not under `flask run --debug`
    return {"id": os.getpid()} | ({"reload": reload} if reload else {})


def _postgresql_version() -> str:
    pool = current_app.extensions["pool"]
    conn = pool.getconn()
    try:
        return str(conn.info.parameter_status("server_version")).split()[0]
    finally:
        pool.putconn(conn)


def _routes() -> Iterator[tuple[str, str, str]]:
    """Yield the methods, the path and what it is for, by its docstring."""
    for rule in current_app.url_map.iter_rules():
        if rule.endpoint.partition(".")[0] not in ("index", "start", "static"):
            methods = (rule.methods or set()) - {"HEAD", "OPTIONS"}
            summary = current_app.view_functions[rule.endpoint].__doc__ or ""
            yield " ".join(sorted(methods)), rule.rule, summary.partition("\n")[0]
