import pytest
from flask.testing import FlaskClient


def test_page_without_notes_has_a_hint(client: FlaskClient) -> None:
    assert "Nothing here yet" in client.get("/notes").text


def test_note_from_the_form_is_on_the_page(client: FlaskClient) -> None:
    page = client.post("/notes", data={"body": " Buy milk "}, follow_redirects=True)
    assert "<li>Buy milk</li>" in page.text


def test_note_is_escaped_on_the_page(client: FlaskClient) -> None:
    body = "<script>alert('1')</script> 😀"
    client.post("/notes", data={"body": body})
    assert "<script>" not in client.get("/notes").text
    assert notes(client) == [{"id": 1, "body": body}]


def test_latest_note_comes_first(client: FlaskClient) -> None:
    for body in ("first", "second"):
        response = client.post("/notes", json={"body": body})
        assert response.status_code == 201
    assert response.json == {"id": 2, "body": "second"}
    assert [note["body"] for note in notes(client)] == ["second", "first"]


@pytest.mark.parametrize("body", ["", "  ", "a" * 1001, "\0", "\ud800", 1, None])
def test_invalid_note_is_rejected(client: FlaskClient, body: object) -> None:
    response = client.post("/notes", json={"body": body})
    assert response.status_code == 400
    assert notes(client) == []


@pytest.mark.parametrize("json", [[], "body", None, {}])
def test_invalid_json_is_rejected(client: FlaskClient, json: object) -> None:
    assert client.post("/notes", json=json).status_code == 400


def notes(client: FlaskClient) -> list[dict[str, object]]:
    response = client.get("/notes", headers={"Accept": "application/json"})
    assert isinstance(response.json, list)
    return response.json
