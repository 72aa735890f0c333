from flask.testing import FlaskClient

from {{ cookiecutter.project_slug }} import create_app


def test_alive_and_ready_with_a_database(client: FlaskClient) -> None:
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json and answer.json["pool"]["in_use"] == 1


def test_alive_but_not_ready_without_one() -> None:
    url = "postgresql://127.0.0.1:1/none"
    client = create_app({"TESTING": True, "DATABASE_URL": url}).test_client()
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
