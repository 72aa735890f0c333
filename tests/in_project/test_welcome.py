"""The welcome page is shown while `/` is a 404, even without a database."""

import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from app import create_app
from flask import Flask, request
from flask.json.provider import DefaultJSONProvider
from flask_devserver.welcome import Welcome
from psycopg2.extensions import connection, make_dsn
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client

from .conftest import scratch_database
from .core.reload_server import has_backend

SETTINGS = {"DEBUG": True, "TESTING": True, "POOL_SIZE": 1}
PAGE = {"Accept": "text/html"}
OURS = "application_name = 'app'"


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    app = create_app(SETTINGS | {"DATABASE_URL": database_url})
    yield app
    app.extensions["pool"].close()


@pytest.fixture
def client(app: Flask) -> Client:
    return browser(app)


def test_page_is_for_browsers_only(client: Client) -> None:
    assert "<h2>Routes</h2>" in client.get("/", headers=PAGE).text
    assert client.get("/").status_code == 404


def test_figures_reject_an_untrusted_host(client: Client) -> None:
    path = "/_flask_dev/status"
    assert client.get(path).status_code == 200
    assert client.get(path, base_url="http://other.example").status_code == 400


def test_page_disappears_once_the_application_has_one(
    app: Flask, client: Client
) -> None:
    app.add_url_rule("/", view_func=lambda: "Mine")
    assert client.get("/", headers=PAGE).text == "Mine"


def test_page_shows_versions_figures_and_routes(client: Client) -> None:
    page = client.get("/", headers=PAGE).text
    for name in ("Flask", "Python", "PostgreSQL"):
        assert re.search(rf"<dt>{name}</dt><dd>\d+\.\d", page)
    assert f'<dd data-figure="process.id">{os.getpid()}</dd>' in page
    assert '<dd data-figure="pool.in_use">0</dd>' in page
    assert '<a href="/notes"><code>/notes</code></a>' in page
    assert "List the latest 100 notes, the newest first." in page
    assert "_flask_dev/status" not in page


def test_documentation_of_a_view_may_be_anything(app: Flask, client: Client) -> None:
    view: Any = lambda: ""  # noqa: E731
    view.__doc__ = 7
    app.add_url_rule("/seven", "seven", view)
    assert "/seven" in client.get("/", headers=PAGE).text


def test_figures_need_no_context(app: Flask, client: Client) -> None:
    class Provider(DefaultJSONProvider):
        def dumps(self, obj: Any, **options: Any) -> str:
            return super().dumps({"data": obj, "url": request.url}, **options)

    app.json = Provider(app)
    assert "process" in client.get("/_flask_dev/status?connect").text
    assert "url" not in client.get("/_flask_dev/status?connect").text


def test_first_page_works_as_it_is_shown(client: Client) -> None:
    page = client.get("/", headers=PAGE).text
    [code] = re.findall(r"<code>(@app.*?)</code>", page, re.DOTALL)
    app = Flask("fresh")
    exec(code, {"app": app})  # noqa: S102
    assert app.test_client().get("/").text == "Hello!"
    assert re.search(r"\.next li > code {[^}]* white-space: pre;", page)


def test_page_returns_its_connection(app: Flask, client: Client) -> None:
    for _ in range(3):
        assert "Problem" not in client.get("/", headers=PAGE).text
    assert app.extensions["pool"].stats()["in_use"] == 0


def test_figures_take_no_connection(client: Client, db: connection) -> None:
    client.get("/_flask_dev/status")
    assert not has_backend(db, OURS)
    client.get("/", headers=PAGE)
    assert has_backend(db, OURS)


def test_polls_of_the_figures_are_not_logged(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.get("/_flask_dev/status")
    assert caplog.text == ""
    client.get("/healthz")
    assert "GET /healthz 200" in caplog.text


def test_request_for_the_page_is_logged_as_it_is_answered(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    page = client.get("/", headers=PAGE)
    assert "GET / 200" in caplog.text
    assert "style-src 'unsafe-inline'" in page.headers["Content-Security-Policy"]
    client.get("/")
    assert "GET / 404" in caplog.text


def test_figures_of_an_exhausted_pool_do_not_wait(app: Flask, client: Client) -> None:
    pool = app.extensions["pool"]
    with app.app_context():
        conn = pool.getconn()
    began = time.monotonic()
    answer = client.get("/_flask_dev/status").json
    assert time.monotonic() - began < app.config["POOL_TIMEOUT"] / 2
    assert answer and answer["pool"] == {"size": 1, "in_use": 1, "waiting": 0}
    pool.putconn(conn)


@pytest.mark.parametrize("change", [{"port": 1}, {"user": "nobody"}], ids=str)
def test_page_works_without_a_database(
    database_url: str, change: dict[str, object]
) -> None:
    url = make_dsn(database_url, password="hidden-word", **change)
    client = browser(create_app(SETTINGS | {"DATABASE_URL": url}))
    page = client.get("/", headers=PAGE)
    assert page.status_code == 200
    [sentence] = re.findall('"problem.sentence">(.*?)</p>', page.text)
    assert re.match("DATABASE_URL: connection to server at .* failed: ", sentence)
    assert "<dt>Python</dt>" in page.text
    assert "PostgreSQL</dt>" not in page.text
    assert "hidden-word" not in page.text
    answer = client.get("/_flask_dev/status?connect").json
    assert answer and "hidden-word" not in str(answer) and "problem" in answer


def test_page_and_log_name_pending_migrations(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with scratch_database(server_url) as url:
        app = create_app(SETTINGS | {"DATABASE_URL": url})
        sentence = ".sql is pending: run `flask migrate`."
        assert sentence in browser(app).get("/", headers=PAGE).text
        assert sum(sentence in message for message in caplog.messages) == 1
        app.test_cli_runner().invoke(args=["migrate"])
        assert "Problem" not in browser(app).get("/", headers=PAGE).text


def test_broken_worker_is_shown_as_a_problem(app: Flask, client: Client) -> None:
    class Worker:
        def status(self) -> dict[str, int]:
            raise RuntimeError("The broker does not answer.\nIts password is x.")

    app.extensions["worker"] = Worker()
    page = client.get("/", headers=PAGE)
    assert '"problem.sentence">The broker does not answer.</p>' in page.text
    answer = client.get("/_flask_dev/status").json
    assert answer and answer["problem"]


def test_any_name_of_a_route_or_figure_is_shown(app: Flask, client: Client) -> None:
    class Worker:
        def status(self) -> dict[str, float]:
            return {"waiting": 3, "oldest_seconds": 1.2}

    app.extensions["worker"] = Worker()
    app.add_url_rule("/<int:each>", view_func=lambda each: "", methods=["GET", "PUT"])
    app.add_url_rule("/soon", "soon")  # It has no view yet.
    page = client.get("/", headers=PAGE).text
    assert (
        '<dt>oldest seconds</dt><dd data-figure="worker.oldest_seconds">1.2</dd>'
        in page
    )
    assert "<code>GET PUT</code>" in page
    assert "<code>/&lt;int:each&gt;</code>" in page
    assert "<code>/soon</code>" in page


def test_last_reload_is_shown_once_there_was_one(client: Client) -> None:
    assert "Last reload" not in client.get("/", headers=PAGE).text
    page = Client(Welcome(Flask("any.app"), "0.04 s")).get("/", headers=PAGE).text
    assert '<dt>Last reload</dt><dd data-figure="process.reload">0.04 s</dd>' in page


def test_any_application_has_the_page() -> None:
    """An application without pool or worker."""
    app = Flask("any.app")
    page = browser(app).get("/", headers=PAGE)
    assert "<h1>any.app</h1>" in page.text
    assert "Connections" not in page.text


def test_application_may_have_a_proxy() -> None:
    app = Flask("any.app")
    app.config["TRUSTED_HOSTS"] = ["shop.example"]
    app.wsgi_app = ProxyFix(app.wsgi_app, x_host=1)  # type: ignore[method-assign]
    forwarded = PAGE | {"X-Forwarded-Host": "shop.example"}
    assert "<h1>any.app</h1>" in browser(app).get("/", headers=forwarded).text
    assert browser(app).get("/", headers=PAGE).status_code == 400


def browser(app: Flask) -> Client:
    return Client(Welcome(app, ""))
