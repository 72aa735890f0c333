"""The page of an error is the application's own, if it has a template for it."""

import pytest
from flask import Flask, abort, g, redirect, url_for
from flask.testing import FlaskClient
from jinja2 import DictLoader

LINKS = {
    "error.html": "{% raw %}{{ error.code }}: {{ url_for('static', filename='a') }}{% endraw %}",
}


@pytest.mark.parametrize("templates, text", [(LINKS, "404: /static/a"), ({}, "<h1>")])
def test_error_page_is_the_template_of_the_application(
    app: Flask, client: FlaskClient, templates: dict[str, str], text: str
) -> None:
    app.jinja_env.loader = DictLoader(templates)
    response = client.get("/none", headers={"Accept": "text/html"})
    assert (response.status_code, response.mimetype) == (404, "text/html")
    assert text in response.text


def test_error_page_that_fails_becomes_the_plain_page(
    app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    app.jinja_env.loader = DictLoader(LINKS)
    app.context_processor(lambda: {}["missing"])
    response = client.put("/items", headers={"Accept": "text/html"})
    assert (response.status_code, "<h1>" in response.text) == (405, True)
    assert "GET" in response.headers["Allow"]
    assert "KeyError: 'missing'" in caplog.text


def test_error_page_keeps_the_headers_of_the_error(
    app: Flask, client: FlaskClient
) -> None:
    app.jinja_env.loader = DictLoader(LINKS)
    response = client.put("/items", headers={"Accept": "text/html"})
    assert response.text.startswith("405: ")
    assert "GET" in response.headers["Allow"]


def test_description_may_be_translated_late(app: Flask, client: FlaskClient) -> None:
    class Lazy:
        def __str__(self) -> str:
            return "translated"

    app.add_url_rule("/lazy", view_func=lambda: abort(400, Lazy()))
    response = client.get("/lazy", headers={"Accept": "application/json"})
    assert response.json and response.json["detail"] == "translated"


@pytest.mark.parametrize("host", ["other.example", "a b"])
def test_untrusted_host_gets_the_plain_page(
    app: Flask, client: FlaskClient, host: str
) -> None:
    app.config["TRUSTED_HOSTS"] = ["localhost"]
    app.before_request(lambda: redirect(url_for("items.index")))
    app.after_request(lambda response: g.began)  # A hook that did not run sets it.
    app.register_error_handler(400, lambda _: url_for("static", filename="a"))
    app.jinja_env.loader = DictLoader(LINKS)
    headers = {"Accept": "text/html", "Host": host}
    response = client.get("/none", headers=headers)
    assert "<h1>Bad Request</h1>" in response.text
    headers["Sec-Fetch-Site"] = "cross-site"
    response = client.post("/none", headers=headers)
    assert "<h1>Bad Request</h1>" in response.text
