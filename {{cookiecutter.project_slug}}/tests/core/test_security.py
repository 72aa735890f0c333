"""Each protection stops its attack."""

import json
import logging
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import click
import psycopg2
import pytest
from flask import Flask, request, session, url_for
from psycopg2.extensions import connection, cursor

from {{ cookiecutter.project_slug }}.core.db import get_db
from {{ cookiecutter.project_slug }}.core.log import JsonFormatter
from {{ cookiecutter.project_slug }}.core.security import accept_cross_site

from .application import PRODUCTION, create_app

DATA = b"hunter2"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
def production(database_url: str) -> Iterator[Flask]:
    """An application as in production, which returns the body of a request."""
    app = create_app(PRODUCTION | {"DATABASE_URL": database_url})

    @app.post("/echo")
    def echo() -> Any:
        if request.is_json:
            return {"length": len(request.get_json())}
        return {"length": len(request.form or request.data)}

    yield app
    app.extensions["pool"].close()


@pytest.mark.parametrize("path", ["/none", "/static//example.com"])
def test_other_host_is_rejected_in_production(production: Flask, path: str) -> None:
    client = production.test_client()
    assert client.get(path, base_url="http://other.example").status_code == 400


def test_log_names_the_setting_that_rejects_a_request(
    production: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    client = production.test_client()
    client.get("/", base_url="http://other.example")
    assert "'other.example' is rejected: see TRUSTED_HOSTS" in caplog.text
    client.post("/", headers={"Origin": "http://other.example"})
    assert "'http://other.example' is rejected: see TRUSTED_ORIGINS" in caplog.text


def test_host_may_be_in_upper_case(production: Flask) -> None:
    client = production.test_client()
    assert client.get("/none", headers={"Host": "LocalHost"}).status_code == 404


def test_rebound_name_is_rejected_in_debug() -> None:
    client = create_app({"DEBUG": True}).test_client()
    for host in ("localhost:5000", "a.localhost", "127.0.0.1:5000"):
        assert client.get("/none", base_url=f"http://{host}").status_code == 404
    assert client.get("/none", base_url="http://other.example").status_code == 400


@pytest.mark.parametrize(
    ("host", "names"),
    [
        ("mine.example", ["mine.example"]),
        ("::1", ["[::1]", "localhost"]),
        ("0.0.0.0", ["192.168.0.7", "[fe80::1]", "a.localhost"]),  # noqa: S104
    ],
)
def test_host_of_the_command_is_trusted_in_debug(host: str, names: list[str]) -> None:
    with click.Context(click.Command("dev"), info_name="dev") as context:
        context.params["host"] = host
        client = create_app({"DEBUG": True}).test_client()
    for name in names:
        assert client.get("/none", base_url=f"http://{name}:5000").status_code == 404
    for name in ("other.example", "1.2.3.4.other.example"):
        assert client.get("/none", base_url=f"http://{name}:5000").status_code == 400


@pytest.mark.parametrize("hosts", ["*", "localhost", ".example.org"])
@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_check_may_name_any_host(hosts: str, path: str) -> None:
    client = create_app(PRODUCTION | {"TRUSTED_HOSTS": hosts}).test_client()
    response = client.get(path, base_url="http://10.0.0.7:8000")
    assert response.json in ({"status": "ok"}, {"status": "unavailable"})


def test_hsts_is_sent_in_production_only(production: Flask) -> None:
    name = "Strict-Transport-Security"
    headers = production.test_client().get("/healthz").headers
    assert headers[name] == "max-age=31536000"
    debug = create_app({"DEBUG": True}).test_client()
    assert name not in debug.get("/healthz").headers


def test_policy_allows_nothing_unsafe(production: Flask) -> None:
    headers = production.test_client().get("/healthz").headers
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "default-src 'self'" in headers["Content-Security-Policy"]


def test_origin_of_another_scheme_is_rejected(production: Flask) -> None:
    client = production.test_client()
    for origin, status in (("https://localhost", 200), ("http://localhost", 403)):
        answer = client.post(
            "/echo", base_url="https://localhost", headers={"Origin": origin}
        )
        assert answer.status_code == status


def test_view_can_accept_posts_from_other_sites(production: Flask) -> None:
    @production.post("/callback")
    @accept_cross_site
    def callback() -> str:
        return "checked"

    headers = {"Sec-Fetch-Site": "cross-site", "Origin": "https://other.example"}
    for path, status in (("/callback", 200), ("/echo", 403)):
        answer = production.test_client().post(path, headers=headers)
        assert answer.status_code == status


def test_trusted_origin_may_post(database_url: str) -> None:
    mine = "https://app.example.com"
    settings = PRODUCTION | {"DATABASE_URL": database_url, "TRUSTED_ORIGINS": mine}
    app = create_app(settings)
    app.add_url_rule("/", methods=["POST"], view_func=lambda: "page")
    for origin, status in ((mine, 200), (mine + ".example.org", 403)):
        headers = {"Sec-Fetch-Site": "same-site", "Origin": origin}
        assert app.test_client().post("/", headers=headers).status_code == status


def test_teardown_may_read_the_url_of_a_rejected_request(production: Flask) -> None:
    urls: list[str] = []
    production.teardown_request(lambda _: urls.append(request.url))
    client = production.test_client()
    assert client.get("/none", base_url="http://other.example").status_code == 400
    assert urls == ["http://untrusted.invalid/none"]


def test_response_with_a_session_is_private(
    production: Flask,
) -> None:
    production.add_url_rule("/me", view_func=lambda: f"{session.get('user')}")
    client = production.test_client()
    assert client.get("/me").headers["Cache-Control"] == "private"
    assert "Cache-Control" not in client.get("/healthz").headers


def test_response_that_renews_a_session_is_private(production: Flask) -> None:
    @production.get("/public")
    def public() -> Any:
        return "", {"Cache-Control": "public, max-age=60"}

    client = production.test_client()
    assert client.get("/public").headers["Cache-Control"] == "public, max-age=60"
    with client.session_transaction(base_url="https://localhost") as stored:
        stored.permanent = True
    headers = client.get("/public", base_url="https://localhost").headers
    assert "Set-Cookie" in headers
    assert set(headers["Cache-Control"].split(", ")) == {"private", "max-age=60"}


@pytest.mark.parametrize("count, scheme", [(0, "http"), (1, "https")])
def test_scheme_comes_from_a_trusted_proxy_only(count: int, scheme: str) -> None:
    app = create_app(PRODUCTION | {"TRUSTED_PROXIES": count})
    app.add_url_rule("/url", "url", lambda: url_for("url", _external=True))
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/evil"}
    answer = app.test_client().get("/url", headers=headers)
    assert answer.text == f"{scheme}://localhost/url"


def test_deeply_nested_json_is_rejected(production: Flask) -> None:
    depth = 100_000
    body = "[" * depth + "]" * depth
    answer = production.test_client().post(
        "/echo", data=body, content_type="application/json"
    )
    assert answer.status_code == 400


@pytest.mark.parametrize("headers", [{}, FORM])
@pytest.mark.parametrize(
    ("name", "value", "status"),
    [("HTTP_TRANSFER_ENCODING", "chunked", 411), ("CONTENT_LENGTH", "4", 400)],
)
def test_body_that_may_be_truncated_is_rejected(
    production: Flask, headers: dict[str, str], name: str, value: str, status: int
) -> None:
    environ = {"wsgi.input": BytesIO(b"a=1"), "wsgi.input_terminated": True}
    answer = production.test_client().post(
        "/echo", headers=headers, environ_overrides=environ | {name: value}
    )
    assert answer.status_code == status
    assert "code&gt;" not in answer.text


def test_form_with_too_many_fields_is_rejected(production: Flask) -> None:
    client = production.test_client()
    for count, status in ((1000, 200), (1001, 413)):
        body = "&".join(["a=1"] * count)
        assert client.post("/echo", data=body, headers=FORM).status_code == status


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO people VALUES ('hunter2')",
        "INSERT INTO people VALUES (NULL, 'hunter2')",
        "SELECT 'hunter2'::int",
        "SELECT 'hunter2' FROM nowhere",
        "SET CONSTRAINTS ALL DEFERRED; INSERT INTO people VALUES ('hunter2')",
    ],
)
def test_error_of_a_query_quotes_no_data_in_the_log(
    production: Flask, db: connection, query: str
) -> None:
    columns = "(name text NOT NULL, UNIQUE (name) DEFERRABLE)"
    db.cursor().execute(f"DROP TABLE IF EXISTS people; CREATE TABLE people {columns}")
    insert = "INSERT INTO people VALUES ('hunter2')"
    db.cursor().execute(f"ALTER TABLE people ADD other text; {insert}")
    with production.app_context(), pytest.raises(psycopg2.Error) as error:
        with get_db() as conn:
            conn.cursor().execute(query)
    record = logging.LogRecord("app", 40, "", 0, "", None, error._excinfo)
    assert "SQLSTATE" in (line := JsonFormatter().format(record))
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "query",
    [
        lambda cursor: cursor.copy_expert("COPY numbers FROM STDIN", BytesIO(DATA)),
        lambda cursor: cursor.copy_from(BytesIO(DATA), "numbers"),
        lambda cursor: cursor.callproc("int4in", ["hunter2"]),
        lambda cursor: fetch(cursor, "SELECT ('hunter' || n)::int FROM numbers"),
    ],
    ids=["copy_expert", "copy_from", "callproc", "fetch"],
)
def test_no_way_to_query_quotes_data_in_the_log(
    production: Flask, query: Callable[[cursor], object]
) -> None:
    with production.app_context(), pytest.raises(psycopg2.DataError) as error:
        with get_db() as conn, conn.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE numbers (n int)")
            cursor.execute("INSERT INTO numbers VALUES (2)")
            query(cursor)
    assert "hunter2" not in str(error.value)


def fetch(cursor: cursor, query: str) -> None:
    with cursor.connection.cursor("server_side") as rows:
        rows.execute(query)
        rows.fetchall()


def test_log_merges_the_named_parts_of_our_own_messages_only() -> None:
    package = JsonFormatter.__module__.partition(".")[0]
    for name, merged in ((f"{package}.core", True), ("celery.app.trace", False)):
        record = logging.LogRecord(name, 20, "", 0, "%(a)s", ({"a": 1},), None)
        assert ("a" in json.loads(JsonFormatter().format(record))) == merged
