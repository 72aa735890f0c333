"""Every request gets a log line, limits and error pages."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import BytesIO, StringIO, TextIOWrapper
from logging.handlers import MemoryHandler
from pathlib import Path
from threading import Event
from typing import Any, TextIO

import pytest
from flask import Blueprint, Flask, abort, g, redirect, session
from flask.testing import FlaskClient
from psycopg2.errors import QueryCanceled
from psycopg2.extras import RealDictCursor, execute_values

from {{ cookiecutter.project_slug }}.core import health, migrate
from {{ cookiecutter.project_slug }}.core.db import get_db
from {{ cookiecutter.project_slug }}.core.log import (
    TEXT,
    JsonFormatter,
    RequestIdFilter,
)

from .application import PRODUCTION, bp, create_app

JSON = {"Accept": "application/json"}
CYCLE: list[object] = []
CYCLE.append(CYCLE)


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """The log as production writes it."""
    monkeypatch.setattr(caplog.handler, "formatter", JsonFormatter())
    monkeypatch.setattr(caplog.handler, "filters", [RequestIdFilter()])
    return caplog


def test_healthy_and_ready_with_a_database(client: FlaskClient) -> None:
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})


def test_healthy_but_not_ready_without_a_database() -> None:
    url = "postgresql://127.0.0.1:1/none"
    client = create_app({"TESTING": True, "DATABASE_URL": url}).test_client()
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503


def test_checks_of_a_database_that_hangs_occupy_one_thread(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, started = Event(), Event()

    def hang(_: object) -> str:
        started.set()
        ended.wait(30)
        return ""

    monkeypatch.setattr(migrate, "find_problem", hang)
    monkeypatch.setattr(health, "CHECK_TIMEOUT", 0.1)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(app.test_client().get, "/readyz")
        started.wait(30)
        later = app.test_client().get("/readyz")
        ended.set()
        assert (later.status_code, later.json) == (503, {"status": "not responding"})
        assert first.result(30).status_code == 200
    assert app.test_client().get("/readyz").status_code == 200


def test_health_checks_need_no_login(app: Flask) -> None:
    app.before_request(lambda: redirect("/login"))
    client = app.test_client()
    paths = ("/healthz", "/readyz", "/items")
    assert [client.get(path).status_code for path in paths] == [200, 200, 302]


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_checks_run_no_hook_of_the_application(app: Flask, path: str) -> None:
    app.url_value_preprocessor(lambda *_: abort(401))
    app.after_request(lambda response: g.began)  # A hook that did not run sets it.
    app.teardown_request(lambda _: g.began)
    app.register_blueprint(Blueprint("health", __name__))
    client = app.test_client()
    assert client.get(path).json == {"status": "ok"}
    head = client.head(path)
    assert (head.status_code, head.data) == (200, b"")
    assert client.post(path).status_code == 405


def test_request_is_logged(app: Flask, log: pytest.LogCaptureFixture) -> None:
    app.test_client().get("/items?secret=1", headers={"X-Request-ID": "mine"})
    [line] = lines(log)
    assert line.pop("ms") > 0
    assert line["message"].startswith("GET /items 200 ")
    expected = {"method": "GET", "path": "/items", "status": 200, "request_id": "mine"}
    assert expected.items() <= line.items()


def production_handler(stream: TextIO) -> logging.Handler:
    """Return a handler of the log like that of production."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RequestIdFilter())
    return handler


def test_production_log_has_the_fields_of_the_formatter(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = production_handler(stream := StringIO())
    began = datetime.now(UTC) - timedelta(milliseconds=1)
    for others in ([], [logging.NullHandler()]):
        monkeypatch.setattr(logging.root, "handlers", [handler, *others])
        app.test_client().get('/a"%5C', headers={"X-Request-ID": "mine"})
    quick, formatted = map(json.loads, stream.getvalue().splitlines())
    assert list(quick) == list(formatted)
    for line in (quick, formatted):
        assert began <= datetime.fromisoformat(line.pop("time")) <= datetime.now(UTC)
        assert line.pop("message") == f"GET /a%22%5C 404 {line.pop('ms')} ms"
    assert quick == formatted


@pytest.mark.parametrize("place", ["logger", "handler"])
def test_filter_of_the_owner_applies_to_the_lines_of_requests(
    app: Flask, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    handler = production_handler(stream := StringIO())
    monkeypatch.setattr(logging.root, "handlers", [handler])
    logger = logging.getLogger(JsonFormatter.__module__)
    monkeypatch.setattr(logger, "filters", [])
    (logger if place == "logger" else handler).addFilter(is_no_health_check)
    for path in ("/healthz", "/items"):
        app.test_client().get(path)
    # On a busy machine, a slow connection adds a line to the log.
    lines = map(json.loads, stream.getvalue().splitlines())
    assert [line["path"] for line in lines if "path" in line] == ["/items"]


def test_line_of_a_request_is_written_at_once(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = production_handler(TextIOWrapper(written := BytesIO()))
    monkeypatch.setattr(logging.root, "handlers", [handler])
    app.test_client().get("/items")
    assert b"GET /items 200 " in written.getvalue()


class SlowStream(StringIO):
    """A stream that stores a text in two parts, as a pipe does with a long line."""

    def write(self, text: str) -> int:
        super().write(text[:9])
        time.sleep(0.001)
        return super().write(text[9:])


def test_lines_of_several_threads_are_whole(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = production_handler(stream := SlowStream())
    monkeypatch.setattr(logging.root, "handlers", [handler])
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(app.test_client().get, ["/items"] * 40))
    paths = [json.loads(line).get("path") for line in stream.getvalue().splitlines()]
    assert paths.count("/items") == 40


@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_requests_reach_a_handler_of_any_kind_at_its_level(
    app: Flask, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    handler = MemoryHandler(capacity=9)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RequestIdFilter())
    handler.setLevel(level)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    assert app.test_client().get("/items").status_code == 200
    names = [record.name for record in handler.buffer]  # A slow query logs one, too.
    assert names.count(JsonFormatter.__module__) == (level == logging.NOTSET)


def is_no_health_check(record: logging.LogRecord) -> bool:
    return "GET /healthz " not in record.getMessage()


@pytest.mark.parametrize(
    "value", [float("nan"), {("a", 1): 1}, {"a"}, b"a", CYCLE], ids=repr
)
def test_every_line_of_the_production_log_is_json(value: object) -> None:
    name = JsonFormatter.__module__
    record = logging.LogRecord(name, 20, "", 0, "%(a)s", ({"a": value},), None)
    line = json.loads(JsonFormatter().format(record), parse_constant=pytest.fail)
    assert line["message"] == str(value) == line["a"]


def test_stack_is_logged(log: pytest.LogCaptureFixture) -> None:
    logging.getLogger("a").warning("look", stack_info=True)
    [line] = lines(log)
    assert "test_stack_is_logged" in line["stack"]


@pytest.mark.parametrize("debug", [True, False])
def test_request_is_logged_once_per_process(database_url: str, debug: bool) -> None:
    settings = PRODUCTION | {"DATABASE_URL": database_url, "DEBUG": debug}
    code = f"import {create_app.__module__} as package\n"
    code += f"package.create_app({settings!r}).test_client().get('/healthz')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    [line] = done.stderr.splitlines()
    assert "GET /healthz 200" in line


def test_warnings_and_failed_threads_are_logged_as_json() -> None:
    code = f"import warnings, threading, {create_app.__module__} as package\n"
    code += f"package.create_app({PRODUCTION!r})\n"
    code += "warnings.warn('look')\n"
    code += "for task in (lambda: 1 / 0, lambda: exit(1)):\n"
    code += "    thread = threading.Thread(target=task)\n"
    code += "    thread.start(), thread.join()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    warning, error = map(json.loads, done.stderr.splitlines())
    assert "UserWarning: look" in warning["message"]
    assert "ZeroDivisionError" in error["exception"]


def test_path_cannot_add_a_line_to_the_log(
    app: Flask, log: pytest.LogCaptureFixture
) -> None:
    log.handler.setFormatter(logging.Formatter(TEXT))
    app.test_client().get("/a%0AINFO%20b%C3%BC")
    [line] = log.text.splitlines()
    assert "INFO GET /a%0AINFO%20b%C3%BC 404 " in line


@pytest.mark.parametrize("given", ["", "a b", "é", "a" * 129])
def test_invalid_request_id_is_replaced(app: Flask, given: str) -> None:
    answers = [
        app.test_client().get("/healthz", headers={"X-Request-ID": given})
        for _ in range(2)
    ]
    found = {answer.headers["X-Request-ID"] for answer in answers}
    assert len(found - {given}) == 2


def test_request_id_is_on_every_line_of_the_request(
    app: Flask, log: pytest.LogCaptureFixture
) -> None:
    @app.get("/fail")
    def fail() -> str:
        raise RuntimeError("on purpose")

    app.config["PROPAGATE_EXCEPTIONS"] = False
    answer = app.test_client().get("/fail", headers={"X-Request-ID": "mine"})
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (500, "mine")
    error, request = lines(log)
    assert error["request_id"] == request["request_id"] == "mine"
    assert error["exception"].endswith("RuntimeError: on purpose")


def test_error_in_the_debugger_is_logged(
    app: Flask, log: pytest.LogCaptureFixture
) -> None:
    app.add_url_rule("/divide", view_func=lambda: str(1 / 0))
    with pytest.raises(ZeroDivisionError):
        app.test_client().get("/divide")
    assert [line["status"] for line in lines(log)] == [500]


@pytest.mark.parametrize("factory", [None, RealDictCursor])
def test_slow_query_is_logged_without_its_parameters(
    app: Flask, log: pytest.LogCaptureFixture, factory: Any
) -> None:
    app.config["SLOW_QUERY"] = 0.1
    with app.app_context(), get_db().cursor(cursor_factory=factory) as cursor:
        cursor.execute("SELECT pg_sleep(%s),\n %s", [0.2, "hunter2"])
        cursor.execute("SELECT %s", ["fast"])
        cursor.executemany("SELECT %s, pg_sleep(%s)", [["hunter2", 0.2]])
        values = "SELECT pg_sleep(0.2) FROM (VALUES %s) AS v"
        execute_values(cursor, values, [["hunter2"]])
    first, second, third = (line["message"] for line in lines(log))
    assert first.endswith(" ms: SELECT pg_sleep(%s), %s")
    assert second.endswith(" ms: SELECT %s, pg_sleep(%s)")
    assert "hunter2" not in log.text


def test_slow_query_that_fails_is_logged(
    app: Flask, log: pytest.LogCaptureFixture
) -> None:
    app.config["SLOW_QUERY"] = 0.1
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("SET statement_timeout = 200")
        with pytest.raises(QueryCanceled):
            cursor.execute("SELECT pg_sleep(10)")
    [line] = lines(log)
    assert line["level"] == "WARNING"
    assert line["message"].endswith("SELECT pg_sleep(10)")


def test_text_log_shows_the_request_id(
    app: Flask, log: pytest.LogCaptureFixture
) -> None:
    log.handler.setFormatter(logging.Formatter(TEXT))
    app.test_client().get("/healthz", headers={"X-Request-ID": "mine"})
    assert log.text.endswith(" ms [mine]\n")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none", "Origin": "http://other.example"},
        {"Origin": "http://localhost"},
        {"Origin": ""},
    ],
    ids=str,
)
def test_post_from_the_same_site_is_accepted(
    client: FlaskClient, headers: Mapping[str, str]
) -> None:
    response = client.post("/items", data={"body": "an item"}, headers=headers)
    assert response.status_code == 201


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost"},
        {"Origin": "http://localhost.example"},
        {"Origin": "http://localhost:1"},
        {"Origin": "null"},
        {"Origin": "http://["},
    ],
    ids=str,
)
def test_post_from_another_site_is_rejected(
    client: FlaskClient, headers: Mapping[str, str]
) -> None:
    response = client.post("/items", data={"body": "an item"}, headers=headers)
    assert response.status_code == 403
    assert client.get("/items").json == []


def test_post_from_another_site_runs_no_hook(app: Flask, client: FlaskClient) -> None:
    app.after_request(lambda response: g.began)  # A hook that did not run sets it.
    app.register_error_handler(403, lambda _: ("mine", 403))
    response = client.post("/items", headers={"Sec-Fetch-Site": "cross-site"})
    assert (response.status_code, response.text) == (403, "mine")


@pytest.mark.parametrize("path", ["/items", "/none", "/healthz"])
def test_every_response_has_security_headers(client: FlaskClient, path: str) -> None:
    headers = client.get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_view_can_override_security_headers(app: Flask) -> None:
    policy = {"Content-Security-Policy": "sandbox"}
    app.add_url_rule("/sandbox", view_func=lambda: ("in it", policy))
    headers = app.test_client().get("/sandbox").headers
    assert headers.getlist("Content-Security-Policy") == ["sandbox"]


def test_session_cookie_is_for_this_site_and_tls_only() -> None:
    app = create_app(PRODUCTION)

    @app.get("/login")
    def login() -> str:
        session["user"] = 1
        return "welcome"

    cookie = app.test_client().get("/login").headers["Set-Cookie"]
    assert {"Secure", "HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))


def test_session_cookie_can_be_configured() -> None:
    settings = {"SESSION_COOKIE_SECURE": False, "SESSION_COOKIE_SAMESITE": "Strict"}
    assert settings.items() <= create_app(PRODUCTION | settings).config.items()


def test_other_host_gets_a_400(database_url: str) -> None:
    settings = {"DATABASE_URL": database_url, "TRUSTED_HOSTS": ["good.example"]}
    client = create_app({"TESTING": True} | settings).test_client()
    assert client.get("/none", base_url="http://good.example").status_code == 404
    assert client.get("/none", base_url="http://bad.example").status_code == 400


def test_large_body_is_rejected(client: FlaskClient) -> None:
    body = {"body": "a" * 1024 * 1024}
    assert client.post("/items", json=body).status_code == 413
    assert client.post("/items", data=body).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/items", 400),
        ("GET", "/none", 404),
        ("PUT", "/items", 405),
        ("GET", "/fail", 500),
        ("GET", "/items", 503),
    ],
)
def test_error_has_the_format_that_the_client_accepts(
    method: str, path: str, status: int
) -> None:
    app = create_app(PRODUCTION)
    app.register_blueprint(bp)
    app.add_url_rule("/fail", view_func=lambda: str(1 / 0))
    page = app.test_client().open(path, method=method)
    assert (page.status_code, page.mimetype) == (status, "text/html")
    answer = app.test_client().open(path, method=method, headers=JSON)
    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert answer.json and answer.json["status"] == status
    assert "Accept" in page.vary and "Accept" in answer.vary
    assert "Traceback" not in page.text + answer.text
    assert "ZeroDivision" not in page.text + answer.text


def lines(log: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.text.splitlines()]
    # On a busy machine, a slow connection adds a line to the log.
    return [line for line in found if "to get a connection" not in line["message"]]
