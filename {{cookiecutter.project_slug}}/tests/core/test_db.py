import re

import pytest
from flask import Flask, g
from psycopg2 import InterfaceError
from psycopg2.errors import DivisionByZero
from psycopg2.extensions import connection, make_dsn

from {{ cookiecutter.project_slug }} import create_app
from {{ cookiecutter.project_slug }}.core.db import get_db, on_commit

from .items import bp
from .reload_server import has_backend, poll


def test_a_context_has_one_connection(app: Flask) -> None:
    with app.app_context():
        assert get_db() is get_db()


def test_a_context_takes_none_before_it_asks(app: Flask) -> None:
    with app.app_context():
        assert "db" not in g


def test_connection_tells_whose_it_is(app: Flask) -> None:
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("SHOW application_name")
        assert cursor.fetchone() == (app.name,)


def test_url_wins_over_the_defaults(database_url: str) -> None:
    url = make_dsn(database_url, application_name="mine")
    app = create_app({"TESTING": True, "DATABASE_URL": url})
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("SHOW application_name")
        assert cursor.fetchone() == ("mine",)


def test_statement_takes_effect_at_once(app: Flask, db: connection) -> None:
    with app.app_context():
        add_item(get_db())
        assert count_items(db) == 1


def test_transaction_is_committed_at_the_end(app: Flask, db: connection) -> None:
    with app.app_context():
        with get_db() as conn:
            add_item(conn)
            assert count_items(db) == 0
        assert count_items(db) == 1


def test_what_is_put_off_follows_the_commit(app: Flask, db: connection) -> None:
    found: list[int] = []
    with app.app_context():
        with get_db() as conn:
            add_item(conn)
            on_commit(lambda: found.append(count_items(db)))
            assert found == []
        assert found == [1]


def test_what_is_put_off_is_dropped_with_the_transaction(app: Flask) -> None:
    found: list[int] = []
    with app.app_context():
        with pytest.raises(RuntimeError), get_db():
            on_commit(lambda: found.append(1))
            raise RuntimeError
        on_commit(lambda: found.append(2))
        assert found == [2]


def test_transaction_is_rolled_back_on_an_error(app: Flask, db: connection) -> None:
    with app.app_context():
        with pytest.raises(RuntimeError), get_db() as conn:
            add_item(conn)
            raise RuntimeError
        assert count_items(db) == 0


def test_what_is_open_at_the_end_is_rolled_back(app: Flask, db: connection) -> None:
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("BEGIN")
        add_item(get_db())
    assert count_items(db) == 0
    idle = "state LIKE 'idle in transaction%'"
    assert poll(lambda: not has_backend(db, idle))


def test_next_context_has_a_connection_as_new(app: Flask) -> None:
    with app.app_context():
        get_db().set_session(readonly=True, autocommit=False)
    with app.app_context():
        assert get_db().autocommit
        add_item(get_db())


def test_unreachable_database_is_answered_503(caplog: pytest.LogCaptureFixture) -> None:
    url = "postgresql://user:hunter2@127.0.0.1:1/none"
    app = create_app({"TESTING": True, "DATABASE_URL": url})
    app.register_blueprint(bp)
    response = app.test_client().get("/items")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert "DATABASE_URL" in caplog.text
    assert "hunter2" not in caplog.text + response.text


def test_connection_that_is_lost_in_a_request_is_answered_503(
    app: Flask, db: connection, caplog: pytest.LogCaptureFixture
) -> None:
    @app.get("/lose")
    def lose() -> str:
        with db.cursor() as cursor:
            backend = get_db().info.backend_pid
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [backend])
        get_db().cursor().execute("SELECT 1")
        return "not lost"

    response = app.test_client().get("/lose")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert "The connection was lost: " in caplog.text


def test_other_error_of_a_query_is_left_to_the_view(app: Flask) -> None:
    @app.get("/divide")
    def divide() -> str:
        get_db().cursor().execute("SELECT 1 / 0")
        return "divided"

    with pytest.raises(DivisionByZero):
        app.test_client().get("/divide")


def test_connection_that_the_view_closed_is_its_own_fault(app: Flask) -> None:
    @app.get("/close")
    def close() -> str:
        get_db().close()
        get_db().cursor()
        return "closed"

    with pytest.raises(InterfaceError):
        app.test_client().get("/close")


def test_connection_that_took_long_is_logged(
    app: Flask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "{{ cookiecutter.project_slug }}.core.db.SLOW_CHECKOUT"
    monkeypatch.setattr(name, 0.0)
    with app.app_context():
        get_db()
    assert re.search(r"It took \d+ ms to get a connection .*'in_use': 1", caplog.text)


def test_unreachable_database_ends_a_command_with_one_sentence() -> None:
    app = create_app({"TESTING": True, "DATABASE_URL": "postgresql://127.0.0.1:1/a"})
    result = app.test_cli_runner().invoke(args=["migrate"])
    assert result.exit_code == 1
    [sentence] = result.output.splitlines()
    assert sentence.startswith("Error: DATABASE_URL: connection to server at")


def add_item(conn: connection) -> None:
    with conn.cursor() as cursor:
        cursor.execute("INSERT INTO items (body) VALUES ('an item')")


def count_items(conn: connection) -> int:
    with conn.cursor() as cursor:
        cursor.execute("SELECT FROM items")
        return cursor.rowcount
