import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from contextvars import copy_context
from functools import partial
from io import StringIO
from pathlib import Path
from threading import Event, Thread
from unittest.mock import Mock

import psycopg2
import pytest
from flask import Flask, g, request
from flask.testing import FlaskClient
from psycopg2 import InterfaceError
from psycopg2.errors import DivisionByZero, InFailedSqlTransaction
from psycopg2.extensions import TRANSACTION_STATUS_IDLE as IDLE
from psycopg2.extensions import connection, make_dsn, new_type, register_type
from psycopg2.extras import Json, RealDictCursor

from {{ cookiecutter.project_slug }}.core.db import (
    DatabaseUnavailable,
    close_db,
    get_db,
    on_commit,
)

from .application import bp, create_app
from .reload_server import has_backend, poll


def test_a_context_has_one_connection(app: Flask) -> None:
    with app.app_context():
        assert get_db() is get_db()


def test_a_context_takes_none_before_it_asks(app: Flask) -> None:
    with app.app_context():
        assert "db" not in g


def test_connection_has_the_name_of_the_application(app: Flask) -> None:
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("SHOW application_name")
        assert cursor.fetchone() == (app.name,)


def test_url_wins_over_the_defaults(database_url: str) -> None:
    url = make_dsn(database_url, application_name="mine")
    app = create_app({"TESTING": True, "DATABASE_URL": url})
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("SHOW application_name")
        assert cursor.fetchone() == ("mine",)


def test_url_may_change_with_each_connection(database_url: str) -> None:
    app = create_app({"TESTING": True, "DATABASE_URL": "postgresql:///none"})
    names = iter(["first", "second"])
    app.config["DATABASE_URL"] = lambda: make_dsn(
        database_url, application_name=next(names)
    )
    for name in ("first", "second"):
        with app.app_context():
            assert show("application_name") == name
            get_db().close()


def test_url_of_a_function_is_validated(app: Flask) -> None:
    for url in ("postgresql://a:hun%ter2@host/a", "postgresql://a:hunter2/a"):
        app.config["DATABASE_URL"] = lambda url=url: url
        with app.app_context(), pytest.raises(DatabaseUnavailable) as error:
            get_db()
        assert str(error.value).startswith("DATABASE_URL is invalid: write a")
        assert error.value.__suppress_context__
    app.config["DATABASE_URL"] = lambda: "postgresql://host/a?schema=b"
    with app.app_context(), pytest.raises(DatabaseUnavailable, match="leave out schem"):
        get_db()


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


def test_callback_follows_the_commit(app: Flask, db: connection) -> None:
    found: list[int] = []
    with app.app_context():
        with get_db() as conn:
            add_item(conn)
            on_commit(lambda: found.append(count_items(db)))
            assert found == []
        assert found == [1]


def test_callback_is_dropped_with_the_transaction(app: Flask) -> None:
    found: list[int] = []
    with app.app_context():
        with pytest.raises(RuntimeError), get_db():
            on_commit(lambda: found.append(1))
            raise RuntimeError
        on_commit(lambda: found.append(2))
        assert found == [2]


def test_callback_is_rejected_in_a_transaction_without_a_block(app: Flask) -> None:
    found: list[int] = []
    message = "without a block is open: use `with get_db"
    for autocommit, query in ((True, "BEGIN"), (False, "SELECT 1")):
        with app.app_context():
            get_db().autocommit = autocommit
            run(get_db(), query)
            with pytest.raises(psycopg2.ProgrammingError, match=message):
                on_commit(lambda: found.append(1))
    assert found == []


@pytest.mark.parametrize("end", [close_db, lambda: get_db().close()])
def test_callback_is_called_at_once_after_the_connection(
    app: Flask, end: Callable[[], None]
) -> None:
    found: list[int] = []
    with app.app_context():
        add_item(get_db())
        end()
        on_commit(lambda: found.append(1))
        assert found == [1]


def test_transaction_is_rolled_back_on_an_error(app: Flask, db: connection) -> None:
    with app.app_context():
        with pytest.raises(RuntimeError), get_db() as conn:
            add_item(conn)
            raise RuntimeError
        assert count_items(db) == 0


def test_open_transaction_at_the_end_is_rolled_back(app: Flask, db: connection) -> None:
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("BEGIN")
        add_item(get_db())
    assert count_items(db) == 0
    idle = "state LIKE 'idle in transaction%'"
    assert poll(lambda: not has_backend(db, idle))


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
def test_end_that_psycopg2_does_not_see_does_no_harm(app: Flask, end: str) -> None:
    for _ in range(2):
        with app.app_context():
            get_db().autocommit = False
            run(get_db(), "SELECT 1")
            run(get_db(), end)
        with app.app_context(), get_db() as conn:
            add_item(conn)


def test_connection_stays_in_autocommit_after_a_reset(
    app: Flask, db: connection
) -> None:
    found: list[int] = []
    with app.app_context():
        get_db().reset()
        add_item(get_db())
        with get_db() as conn:
            on_commit(lambda: found.append(1))
            add_item(conn)
            conn.reset()
    assert (count_items(db), found) == (1, [])


def test_cursor_that_is_held_is_closed_with_its_context(app: Flask) -> None:
    for _ in range(2):
        with app.app_context():
            cursor = get_db().cursor("held", withhold=True)
            cursor.execute("SELECT 1")
            with get_db() as conn:
                cursor = conn.cursor("later")
                cursor.withhold = True
                cursor.execute("SELECT 1")


def test_cursors_may_come_from_a_function(app: Flask) -> None:
    with app.app_context():
        make = partial(RealDictCursor)
        with get_db().cursor(cursor_factory=make) as cursor:
            cursor.execute("SELECT 1 AS a")
            assert cursor.fetchall() == [{"a": 1}]


def test_next_context_has_a_connection_as_new(app: Flask) -> None:
    with app.app_context():
        get_db().set_session(readonly=True, autocommit=False)
    with app.app_context():
        assert get_db().autocommit
        add_item(get_db())


def test_unreachable_database_gives_503(caplog: pytest.LogCaptureFixture) -> None:
    url = "postgresql://user:hunter2@127.0.0.1:1/none"
    app = create_app({"TESTING": True, "DATABASE_URL": url})
    app.register_blueprint(bp)
    response = app.test_client().get("/items")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert any(text.startswith("DATABASE_URL: ") for text in caplog.messages)
    assert "connections: " not in caplog.text
    assert "hunter2" not in caplog.text + response.text


@pytest.mark.parametrize("hook", ["open_session", "after_request"])
def test_unreachable_database_around_a_view_gives_503(hook: str) -> None:
    url = "postgresql://127.0.0.1:1/none"
    app = create_app({"TESTING": False, "DEBUG": True, "DATABASE_URL": url})
    app.add_url_rule("/", view_func=lambda: "page")
    if hook == "after_request":
        app.after_request(lambda response: get_db() and response)
    else:
        app.session_interface.open_session = Mock(side_effect=lambda *_: get_db())  # type: ignore[method-assign]
    response = app.test_client().get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


def test_handler_of_an_outage_may_fail_too() -> None:
    url = "postgresql://127.0.0.1:1/none"
    settings = {"DEBUG": True, "PROPAGATE_EXCEPTIONS": False}
    app = create_app(settings | {"DATABASE_URL": url})
    app.add_url_rule("/", view_func=lambda: "page")
    app.after_request(lambda response: get_db() and response)
    app.register_error_handler(503, lambda _: str(get_db()))
    response = app.test_client().get("/")
    assert response.status_code == 500
    assert "Internal Server Error" in response.text


@pytest.mark.parametrize("query", ["ROLLBACK; SELECT 1 / 0", "COMMIT"])
def test_failed_end_of_a_transaction_drops_its_functions(
    app: Flask, query: str
) -> None:
    called: list[str] = []
    with app.app_context():
        db = get_db()
        run(db, "CREATE TEMPORARY TABLE pairs (a int UNIQUE DEFERRABLE)")
        with db:
            on_commit(lambda: called.append("function"))
            run(db, "SET CONSTRAINTS ALL DEFERRED")
            run(db, "INSERT INTO pairs VALUES (1), (1)")
            with suppress(psycopg2.Error):
                run(db, query)
    assert called == []


def test_commit_after_a_failed_query_ends_the_transaction(app: Flask) -> None:
    with app.app_context():
        db = get_db()
        run(db, "BEGIN")
        with suppress(psycopg2.Error):
            run(db, "SELECT 1 / 0")
        with pytest.raises(InFailedSqlTransaction, match="was rolled back"):
            db.commit()
        assert db.info.transaction_status == IDLE


def test_connection_lost_in_a_request_gives_503(
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


@pytest.mark.parametrize("text", ["a\0b", "a\ud83d"])
def test_text_that_cannot_be_stored_gives_400(client: FlaskClient, text: str) -> None:
    assert client.post("/items", json={"body": text}).status_code == 400


@pytest.mark.parametrize("testing", [True, False])
def test_json_that_cannot_be_stored_gives_400(
    app: Flask, client: FlaskClient, testing: bool
) -> None:
    app.testing = testing  # Otherwise messages of queries are as in production.

    @app.post("/json")
    def store() -> str:
        get_db().cursor().execute("SELECT %s::jsonb", [Json(request.get_json())])
        return "stored"

    for body in (r'{"a": "\u0000"}', r'{"a": "\ud83d"}', '{"a": NaN}'):
        headers = {"Content-Type": "application/json"}
        assert client.post("/json", data=body, headers=headers).status_code == 400


def test_name_in_a_header_that_cannot_be_stored_gives_400(app: Flask) -> None:
    @app.get("/visit")
    def visit() -> str:
        name = request.authorization and request.authorization.username
        get_db().cursor().execute("SELECT %s", [name])
        return "visited"

    assert app.test_client().get("/visit", auth=("a\0b", "")).status_code == 400


def test_stored_text_that_cannot_be_read_is_an_error_of_the_server(app: Flask) -> None:
    @app.get("/read")
    def read() -> str:
        run(get_db(), "SELECT '{}'::json ->> 'a'".format(r'{"a": "\u0000"}'))
        return "read"

    app.testing = False
    assert app.test_client().get("/read").status_code == 500


def test_extension_that_handles_errors_itself_gets_the_http_error() -> None:
    url = "postgresql://127.0.0.1:1/none"
    app = create_app({"TESTING": True, "DATABASE_URL": url})
    app.add_url_rule("/", view_func=lambda: str(get_db()))
    # Flask-RESTX does this.
    handle = Mock(return_value=("mine", 500))
    app.handle_user_exception = handle  # type: ignore[method-assign]
    assert app.test_client().get("/").text == "mine"
    assert handle.call_args.args[-1].code == 503


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # other tests' threads
def test_forked_process_leaves_the_connection_of_the_context_alone(app: Flask) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no fork.")
    with app.app_context():
        parents = get_db().info.backend_pid
        child = os.fork()
        if child == 0:
            failed = True
            try:
                failed = get_db().info.backend_pid == parents
                close_db()
            finally:
                os._exit(failed)
        assert os.waitpid(child, 0)[1] == 0
        get_db().cursor().execute("SELECT 1")
        assert get_db().info.backend_pid == parents


def test_connection_that_the_view_closed_is_its_own_fault(app: Flask) -> None:
    @app.get("/close")
    def close() -> str:
        db = get_db()
        db.close()
        db.cursor()
        return "closed"

    with pytest.raises(InterfaceError):
        app.test_client().get("/close")


def test_connection_that_was_closed_is_replaced(app: Flask) -> None:
    with app.app_context():
        for _ in range(2):
            with closing(get_db()) as conn:
                run(conn, "SELECT 1")


def test_handler_of_the_log_may_use_the_connection(
    app: Flask, db: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            add_item(get_db())

    name = "{{ cookiecutter.project_slug }}.core.db.SLOW_CHECKOUT"
    monkeypatch.setattr(name, 0.0)
    app.logger.addHandler(handler := Store(logging.WARNING))
    thread = Thread(target=app.test_client().get, args=["/readyz"], daemon=True)
    thread.start()
    thread.join(10)
    app.logger.removeHandler(handler)
    assert not thread.is_alive()
    assert count_items(db) > 0


def test_connection_that_took_long_is_logged(
    app: Flask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "{{ cookiecutter.project_slug }}.core.db.SLOW_CHECKOUT"
    monkeypatch.setattr(name, 0.0)
    with app.app_context():
        get_db()
    assert re.search(r"It took \d+ ms to get a connection .*'in_use': 1", caplog.text)


def test_swallowed_error_is_not_taken_for_a_commit(app: Flask, db: connection) -> None:
    found: list[int] = []
    with app.app_context():
        with pytest.raises(InFailedSqlTransaction, match="rolled back"), get_db():
            on_commit(lambda: found.append(1))
            add_item(get_db())
            with suppress(DivisionByZero):
                get_db().cursor().execute("SELECT 1 / 0")
        add_item(get_db())  # The connection is usable.
    assert (found, count_items(db)) == ([], 1)


def test_commit_by_hand_raises_after_a_failed_query(app: Flask) -> None:
    with app.app_context():
        get_db().autocommit = False
        with suppress(DivisionByZero):
            get_db().cursor().execute("SELECT 1 / 0")
        with pytest.raises(InFailedSqlTransaction):
            get_db().commit()


def test_transaction_begun_by_a_query_is_committed(app: Flask, db: connection) -> None:
    with app.app_context():
        run(get_db(), "BEGIN")
        add_item(get_db())
        get_db().commit()
        run(get_db(), "BEGIN")
        add_item(get_db())
        get_db().rollback()
        add_item(get_db())
    assert count_items(db) == 2


def test_savepoint_saves_the_rest_of_the_transaction(
    app: Flask, db: connection
) -> None:
    with app.app_context(), get_db() as conn, conn.cursor() as cursor:
        add_item(conn)
        cursor.execute("SAVEPOINT before")
        with suppress(DivisionByZero):
            cursor.execute("SELECT 1 / 0")
        cursor.execute("ROLLBACK TO before")
    assert count_items(db) == 1


@pytest.mark.parametrize(
    "roll_back", [lambda conn: conn.rollback(), lambda conn: run(conn, "ROLLBACK")]
)
def test_callbacks_are_dropped_when_the_block_rolls_back(
    app: Flask, roll_back: Callable[[connection], None]
) -> None:
    found: list[int] = []
    with app.app_context(), get_db() as conn:
        add_item(conn)
        on_commit(lambda: found.append(1))
        roll_back(conn)
    assert found == []


@pytest.mark.parametrize(
    "commit", [lambda conn: conn.commit(), lambda conn: run(conn, "COMMIT")]
)
def test_callbacks_of_a_commit_by_hand_outlive_a_later_rollback(
    app: Flask, commit: Callable[[connection], None]
) -> None:
    found: list[int] = []
    with app.app_context(), pytest.raises(RuntimeError), get_db() as conn:
        on_commit(lambda: found.append(1))
        add_item(conn)
        commit(conn)
        on_commit(lambda: found.append(2))
        add_item(conn)
        raise RuntimeError
    assert found == [1]


def test_callbacks_of_a_commit_by_hand_outlive_a_later_failure(app: Flask) -> None:
    found: list[int] = []
    with app.app_context(), pytest.raises(InFailedSqlTransaction), get_db() as conn:
        on_commit(lambda: found.append(1))
        add_item(conn)
        conn.commit()
        on_commit(lambda: found.append(2))
        with suppress(DivisionByZero):
            run(conn, "SELECT 1 / 0")
    assert found == [1]


def test_transaction_may_be_ended_by_queries(app: Flask, db: connection) -> None:
    found: list[int] = []
    with app.app_context(), pytest.raises(RuntimeError), get_db() as conn:
        on_commit(lambda: found.append(1))
        add_item(conn)
        run(conn, "ROLLBACK")
        add_item(conn)
        on_commit(lambda: found.append(2))
        run(conn, "COMMIT")
        add_item(conn)
        on_commit(lambda: found.append(3))
        raise RuntimeError
    assert (count_items(db), found) == (1, [2])
    with app.app_context(), get_db() as conn:
        add_item(conn)
        run(conn, "COMMIT")
        add_item(conn)
        on_commit(lambda: found.append(4))
    assert (count_items(db), found) == (3, [2, 4])


def test_callbacks_follow_a_transaction_without_queries(app: Flask) -> None:
    found: list[int] = []
    with app.app_context(), get_db():
        on_commit(lambda: found.append(1))
    assert found == [1]


def test_server_side_cursor_works_in_a_transaction(app: Flask) -> None:
    with app.app_context(), get_db() as conn:
        with conn.cursor("numbers") as cursor:
            cursor.execute("SELECT generate_series(1, 3)")
            assert list(cursor) == [(1,), (2,), (3,)]
    with app.app_context():
        assert get_db().autocommit


def test_session_keeps_its_characteristics_after_a_transaction(app: Flask) -> None:
    with app.app_context():
        get_db().set_session(readonly=True)
        with get_db():
            run(get_db(), "SELECT 1")
        with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
            add_item(get_db())


def test_block_that_was_never_left_ends_with_its_context(app: Flask) -> None:
    with app.app_context():
        get_db().__enter__()  # as in a generator that nobody closes
    with app.app_context(), get_db() as conn:
        add_item(conn)


def test_nested_transaction_is_rejected(app: Flask) -> None:
    with app.app_context(), get_db(), pytest.raises(psycopg2.Error, match="already"):
        with get_db():
            pass


def test_threads_of_a_context_share_its_connection(app: Flask) -> None:
    async def ask() -> set[int]:
        jobs = [asyncio.to_thread(lambda: id(get_db())) for _ in range(4)]
        return set(await asyncio.gather(*jobs))

    with app.app_context():
        assert asyncio.run(ask()) == {id(get_db())}
        assert in_use(app) == 1
    assert in_use(app) == 0


def test_connection_returns_at_the_end_of_the_context(app: Flask) -> None:
    context = app.app_context()  # The test keeps it.
    with context:
        get_db()
    assert in_use(app) == 0


def test_connection_returns_when_a_teardown_function_fails(app: Flask) -> None:
    @app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        get_db()
        raise RuntimeError

    context = app.app_context()  # The test keeps it.
    with pytest.raises(RuntimeError), context:
        get_db()
    app.teardown_appcontext_funcs.clear()
    assert in_use(app) == 0


def test_connection_taken_during_teardown_returns(app: Flask) -> None:
    def ask_again(error: BaseException | None) -> None:
        close_db()
        run(get_db(), "SELECT 1")

    app.teardown_appcontext_funcs.insert(0, ask_again)  # It runs last.
    with app.app_context():
        get_db()
    assert in_use(app) == 0


def test_connection_of_a_thread_that_outlives_its_context_returns(app: Flask) -> None:
    ended = Event()

    def ask() -> None:
        ended.wait(10)
        run(get_db(), "SELECT 1")

    with app.app_context():
        thread = Thread(target=copy_context().run, args=[ask])
        thread.start()
    ended.set()
    thread.join(10)
    del thread
    assert poll(lambda: in_use(app) == 0)


def test_lost_connection_is_replaced_in_the_same_context(
    app: Flask, db: connection
) -> None:
    with app.app_context():
        lose(db)
        with pytest.raises(psycopg2.Error):
            run(get_db(), "SELECT 1")
        run(get_db(), "SELECT 1")
        assert in_use(app) == 1
    assert in_use(app) == 0


def test_error_of_a_block_is_not_replaced_by_that_of_its_rollback(
    app: Flask, db: connection
) -> None:
    found: list[int] = []
    with app.app_context(), pytest.raises(ValueError, match="mine"), get_db() as conn:
        run(conn, "SELECT 1")
        on_commit(lambda: found.append(1))
        run(db, f"SELECT pg_terminate_backend({conn.info.backend_pid}, 5000)")
        raise ValueError("mine")
    with app.app_context(), pytest.raises(ValueError, match="mine"), get_db() as conn:
        conn.tpc_begin("a")
        raise ValueError("mine")
    assert found == []


def test_lost_connection_is_not_replaced_in_a_transaction(
    app: Flask, db: connection
) -> None:
    with app.app_context(), pytest.raises(InterfaceError), get_db():
        lose(db)
        with suppress(psycopg2.Error):
            add_item(get_db())
        add_item(get_db())
    assert count_items(db) == 0


def test_block_whose_connection_is_returned_takes_effect_as_a_whole(
    app: Flask, db: connection
) -> None:
    found: list[int] = []
    with app.app_context():
        with pytest.raises(InterfaceError), get_db():
            add_item(get_db())
            close_db()
            on_commit(lambda: found.append(1))
            add_item(get_db())
        assert (count_items(get_db()), found) == (0, [])
        assert in_use(app) == 1


def test_transaction_that_stays_open_is_reported_in_debug_mode(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"TESTING": True, "DATABASE_URL": database_url}
    for debug in (True, False):
        app = create_app(settings | {"DEBUG": debug})
        with app.app_context():
            run(get_db(), "BEGIN; SELECT 1")
        assert ("A transaction was open" in caplog.text) == debug
        caplog.clear()


@pytest.mark.parametrize("error", [psycopg2.Error, psycopg2.OperationalError])
def test_error_reaches_the_handler_of_the_application(
    app: Flask, error: type[psycopg2.Error]
) -> None:
    app.register_error_handler(error, lambda error: ("mine", 418))

    @app.get("/time-out")
    def time_out() -> str:
        run(get_db(), "SET statement_timeout = 10; SELECT pg_sleep(5)")
        return "in time"

    assert app.test_client().get("/time-out").status_code == 418


def test_connection_lost_in_a_copy_is_unavailable(app: Flask, db: connection) -> None:
    app.register_error_handler(psycopg2.Error, lambda error: ("mine", 418))

    class Losing(StringIO):
        def write(self, text: str) -> int:
            lose(db)
            return len(text)

    @app.get("/copy")
    def copy() -> str:
        query = "COPY (SELECT generate_series(1, 1000000)) TO STDOUT"
        get_db().cursor().copy_expert(query, Losing())
        return "copied"

    assert app.test_client().get("/copy").status_code == 503


def change_types(conn: connection) -> None:
    register_type(new_type((23,), "INT", lambda value, cursor: "changed"), conn)


@pytest.mark.parametrize(
    "change",
    [
        change_types,
        lambda conn: conn.set_client_encoding("LATIN1"),
        lambda conn: run(conn, "DO $$BEGIN RAISE NOTICE 'a'; END$$"),
        lambda conn: run(conn, "LISTEN a; NOTIFY a"),
    ],
    ids=["types", "encoding", "notice", "notification"],
)
def test_next_context_finds_no_state_kept_by_psycopg2(
    app: Flask, change: Callable[[connection], None]
) -> None:
    with app.app_context():
        change(get_db())
    with app.app_context(), get_db().cursor() as cursor:
        cursor.execute("SELECT 1, 'é'")
        assert cursor.fetchone() == (1, "é")
        assert (get_db().notices, get_db().notifies) == ([], [])
        assert get_db().encoding == "UTF8"


def test_text_is_utf_8_whatever_the_server_prefers(database_url: str) -> None:
    run(admin := psycopg2.connect(database_url), "SELECT current_database()")
    name = admin.info.dbname
    run(admin, f"ALTER DATABASE {name} SET client_encoding = 'SQL_ASCII'; COMMIT")
    app = create_app({"TESTING": True, "DATABASE_URL": database_url})
    try:
        with app.app_context(), get_db().cursor() as cursor:
            cursor.execute("SELECT %s", ["é"])
            assert cursor.fetchone() == ("é",)
    finally:
        run(admin, f"ALTER DATABASE {name} RESET client_encoding; COMMIT")
        admin.close()


@pytest.mark.parametrize("by_url", [True, False])
def test_options_of_the_operator_join_the_projects(
    database_url: str, monkeypatch: pytest.MonkeyPatch, by_url: bool
) -> None:
    own = "-c statement_timeout=1234 -c tcp_keepalives_idle=77"
    url = make_dsn(database_url, options=own) if by_url else database_url
    monkeypatch.setenv("PGOPTIONS", "" if by_url else own)
    monkeypatch.setenv("PGAPPNAME", "theirs")
    app = create_app({"TESTING": True, "DATABASE_URL": url})
    with app.app_context():
        assert show("statement_timeout") == "1234ms"
        assert show("client_connection_check_interval") == "500ms"
        assert show("tcp_keepalives_idle") == "77"
        assert show("application_name") == "theirs"


def test_service_file_wins_over_the_defaults(
    database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "services").write_text("[it]\noptions=-c statement_timeout=1234\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    url = make_dsn(database_url, service="it")
    app = create_app({"TESTING": True, "DATABASE_URL": url})
    with app.app_context():
        assert show("statement_timeout") == "1234ms"


def test_open_transaction_is_not_ended_for_being_idle(app: Flask) -> None:
    with app.app_context():
        assert show("idle_in_transaction_session_timeout") == "0"
        assert show("tcp_keepalives_idle") == "10"


def test_message_in_another_encoding_is_unavailable(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        b"FATAL: r\xf4le inconnu".decode()

    monkeypatch.setattr(psycopg2, "connect", refuse)
    assert app.test_client().get("/items").status_code == 503


def test_unreachable_database_ends_migrate_with_one_sentence() -> None:
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


def run(conn: connection, query: str) -> None:
    with conn.cursor() as cursor:
        cursor.execute(query)


def show(setting: str) -> object:
    with get_db().cursor() as cursor:
        cursor.execute(f"SHOW {setting}")
        return cursor.fetchone()[0]


def lose(db: connection) -> None:
    """Terminate the backend of the context's connection."""
    backend = get_db().info.backend_pid
    run(db, f"SELECT pg_terminate_backend({backend}, 5000)")


def in_use(app: Flask) -> int:
    return int(app.extensions["pool"].stats()["in_use"])
