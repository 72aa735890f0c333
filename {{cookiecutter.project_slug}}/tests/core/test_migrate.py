import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Event
from unittest.mock import Mock

import click
import psycopg2
import pytest
from flask import Flask
from flask.testing import FlaskCliRunner
from psycopg2.extensions import connection, make_dsn

from {{ cookiecutter.project_slug }}.core import migrate as module
from {{ cookiecutter.project_slug }}.core.migrate import (
    MigrationError,
    migrate,
)

from ..conftest import connect
from .application import create_app


@pytest.fixture
def empty(empty_url: str) -> Iterator[connection]:
    with closing(connect(empty_url)) as conn:
        yield conn


@pytest.fixture
def app(empty_url: str, tmp_path: Path) -> Flask:
    """An application with a migration of its own, on an empty database."""
    app = create_app({"TESTING": True, "DATABASE_URL": empty_url})
    app.root_path = str(tmp_path)
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "0001_made.sql").write_text("CREATE TABLE made (a int)")
    return app


def test_command_applies_pending_migrations_once(runner: FlaskCliRunner) -> None:
    assert "Applied 0001_made.sql\n" in runner.invoke(args=["migrate"]).output
    assert runner.invoke(args=["migrate"]).output == "Nothing to apply\n"


def test_closed_output_does_not_stop_the_migrations(
    runner: FlaskCliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "migrations" / "0002_more.sql").write_text("CREATE TABLE more (a int)")
    with monkeypatch.context() as patch:
        patch.setattr(click, "echo", Mock(side_effect=BrokenPipeError))
        assert runner.invoke(args=["migrate"]).exit_code == 0
    assert runner.invoke(args=["migrate"]).output == "Nothing to apply\n"


def test_readiness_reads_no_file(
    app: Flask, empty: connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_read", None)
    record = "INSERT INTO schema_migrations VALUES (%s, 'other')"
    with app.app_context(), empty.cursor() as cursor:
        cursor.execute(module.TABLE)
        while found := re.match(r"Migration (\S+) is", module.find_problem(empty)):
            cursor.execute(record, [name := found[1]])
    assert name == "0001_made.sql"  # Those of libraries come first.


def test_command_shows_notices(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path
) -> None:
    notice = "DO $$ BEGIN RAISE NOTICE 'moved 7 rows'; END $$"
    sql = f"DROP TABLE IF EXISTS unknown; {notice}"
    (tmp_path / "migrations" / "0002_moved.sql").write_text(sql)
    lines = runner.invoke(args=["migrate"]).output.splitlines()
    second = ["NOTICE:  moved 7 rows", "Applied 0002_moved.sql"]
    assert lines[-3:] == ["Applied 0001_made.sql", *second]


def test_command_lists_the_files_before_a_rejected_one(
    runner: FlaskCliRunner, tmp_path: Path
) -> None:
    (tmp_path / "migrations" / "0002_bad.sql").write_text("CREATE")
    output = runner.invoke(args=["migrate"]).output
    last = output.rpartition("Applied ")[2]
    assert last.startswith("0001_made.sql\nError: 0002_bad.sql, line 1: ")


def test_command_lists_pending_migrations(runner: FlaskCliRunner) -> None:
    listed = ["migrate", "--status"]
    assert "Pending 0001_made.sql\n" in runner.invoke(args=listed).output
    assert "Applied 0001_made.sql\n" in runner.invoke(args=["migrate"]).output
    assert "Applied 0001_made.sql\n" in runner.invoke(args=listed).output


def test_status_leaves_out_what_a_library_has_applied(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path
) -> None:
    (tmp_path / "0001_library.sql").write_text("SELECT 1")
    module.add_folder(app, tmp_path)
    listed = ["migrate", "--status"]
    assert "Pending 0001_library.sql\n" in runner.invoke(args=listed).output
    assert "Applied 0001_library.sql\n" in runner.invoke(args=["migrate"]).output
    assert runner.invoke(args=listed).output == "Applied 0001_made.sql\n"


def test_not_ready_while_some_are_pending(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    assert app.test_client().get("/readyz").status_code == 503
    [message] = [text for text in caplog.messages if "Not ready" in text]
    assert re.search(r"Migration \S+\.sql is pending: run `flask migrate`\.$", message)
    app.test_cli_runner().invoke(args=["migrate"])
    assert app.test_client().get("/readyz").status_code == 200


def test_files_are_applied_in_order(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0002_b.sql").write_text("INSERT INTO a VALUES ('50 %')")
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b text); SELECT 1")
    assert migrate(empty, tmp_path) == ["0001_a.sql", "0002_b.sql"]
    assert migrate(empty, tmp_path) == []


def test_rejected_file_changes_nothing(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b text);\nNONSENSE;")
    message = '^0001_a.sql, line 2: syntax error at or near "NONSENSE"; nothing of it'
    with pytest.raises(MigrationError, match=message):
        migrate(empty, tmp_path)
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b text)")
    assert migrate(empty, tmp_path) == ["0001_a.sql"]


def test_line_is_that_of_the_file_and_not_of_a_function(
    empty: connection, tmp_path: Path
) -> None:
    body = "'BEGIN EXECUTE ''\n\n\n NONSENSE''; RETURN 1; END'"
    run(empty, f"CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS {body}")
    (tmp_path / "0001_a.sql").write_text("SELECT 1;\nSELECT f();")
    with pytest.raises(MigrationError, match="^0001_a.sql: syntax error"):
        migrate(empty, tmp_path)


def test_file_without_a_line_to_blame_is_named_all_the_same(
    empty: connection, tmp_path: Path
) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT 1;\nSELECT 1 / 0;")
    with pytest.raises(MigrationError, match="^0001_a.sql: division by zero; nothing"):
        migrate(empty, tmp_path)


def test_advice_of_postgresql_is_passed_on(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_text("CREATE TYPE a AS ENUM ()")
    (tmp_path / "0002_b.sql").write_text("ALTER TYPE a ADD VALUE 'b'; SELECT 'b'::a")
    with pytest.raises(MigrationError, match="New enum values must be committed"):
        migrate(empty, tmp_path)


def test_timeout_of_the_role_does_not_end_a_file(
    empty_url: str, tmp_path: Path
) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT pg_sleep(0.6)")
    (tmp_path / "0002_b.sql").write_text("-- no transaction\nSELECT pg_sleep(0.6)")
    url = make_dsn(empty_url, options="-c statement_timeout=500")
    with closing(connect(url)) as conn:
        assert migrate(conn, tmp_path) == ["0001_a.sql", "0002_b.sql"]


def test_timeout_of_transactions_does_not_end_a_file(
    empty: connection, tmp_path: Path
) -> None:
    if empty.server_version < 170000:
        pytest.skip("This PostgreSQL has no transaction_timeout.")
    run(empty, "SET transaction_timeout = 500")
    (tmp_path / "0001_a.sql").write_text("SELECT pg_sleep(0.6)")
    assert migrate(empty, tmp_path) == ["0001_a.sql"]


def test_settings_of_a_file_end_with_it(empty: connection, tmp_path: Path) -> None:
    unset = "SELECT set_config('search_path', '', false); CREATE TABLE public.a ()"
    (tmp_path / "0001_a.sql").write_text(unset)
    (tmp_path / "0002_b.sql").write_text("CREATE TABLE b ()")
    assert migrate(empty, tmp_path) == ["0001_a.sql", "0002_b.sql"]


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TEMP TABLE a AS SELECT 1 AS b",
        "PREPARE a AS SELECT 1",
        "CREATE TEMP TABLE t AS SELECT 1 AS b; DECLARE c CURSOR FOR SELECT * FROM t",
        "CREATE TEMP TABLE p (i int PRIMARY KEY); CREATE TEMP TABLE r (i int REFERENCES"
        " p DEFERRABLE INITIALLY DEFERRED); INSERT INTO p VALUES (1);"
        " INSERT INTO r VALUES (1)",
    ],
)
def test_session_of_a_file_ends_with_it(
    empty: connection, tmp_path: Path, sql: str
) -> None:
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a ()")
    (tmp_path / "0002_b.sql").write_text(sql)
    (tmp_path / "0003_c.sql").write_text(sql)
    (tmp_path / "0004_d.sql").write_text("ALTER TABLE a ADD c int")
    assert len(migrate(empty, tmp_path)) == 4
    run(empty, "SELECT c FROM public.a")


def test_slow_file_is_no_slow_query(
    app: Flask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app.config["SLOW_QUERY"] = 0.0
    app.test_cli_runner().invoke(args=["migrate"])
    assert "A query took" not in caplog.text


def test_edited_file_is_rejected(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT 1")
    migrate(empty, tmp_path)
    (tmp_path / "0001_a.sql").write_text("SELECT 2")
    with pytest.raises(MigrationError, match="^0001_a.sql was edited after"):
        migrate(empty, tmp_path)


def test_command_lists_edited_migrations(app: Flask, tmp_path: Path) -> None:
    for name in ("0002_b.sql", "0003_c.sql"):
        (tmp_path / "migrations" / name).write_text("SELECT 1")
    runner = app.test_cli_runner()
    runner.invoke(args=["migrate"])
    (tmp_path / "migrations" / "0003_c.sql").write_text("SELECT 2")
    lines = runner.invoke(args=["migrate", "--status"]).output.splitlines()
    assert {"Applied 0002_b.sql", "Edited 0003_c.sql"} <= set(lines)


@pytest.mark.parametrize("draft", ["0001_a.sql", "0002_b.sql"])
def test_only_the_newest_edited_file_is_offered_a_way_out(
    empty: connection, tmp_path: Path, draft: str
) -> None:
    for name in ("0001_a.sql", "0002_b.sql"):
        (tmp_path / name).write_text("SELECT 1")
    migrate(empty, tmp_path)
    (tmp_path / draft).write_text("SELECT 2")
    with pytest.raises(MigrationError) as error:
        migrate(empty, tmp_path)
    assert (f"--forget {draft}" in str(error.value)) is (draft == "0002_b.sql")


def test_library_comes_first_and_its_edited_file_is_accepted(
    empty: connection, tmp_path: Path
) -> None:
    own, library = tmp_path / "own", tmp_path / "library"
    for folder in (own, library):
        folder.mkdir()
        (folder / f"{folder.name}.sql").write_text("SELECT 1")
    (own / "own.sql").write_text("DROP TABLE of_the_library")
    (library / "library.sql").write_text("CREATE TABLE of_the_library ()")
    assert migrate(empty, library, own) == ["library.sql", "own.sql"]
    (library / "library.sql").write_text("SELECT 2")
    assert migrate(empty, library, own) == []


ENDS = {
    "ROLLBACK": "CREATE TABLE a (b text); ROLLBACK",
    "COMMIT": "CREATE TABLE a (b text); COMMIT",
    "BEGIN": "BEGIN; CREATE TABLE a (b text); COMMIT",
    "failure": "CREATE TABLE a (b text); COMMIT; SELECT 1 / 0",
    "second": "CREATE TABLE a (b text); COMMIT; BEGIN; SELECT 1 / 0",
    "SAVEPOINT": "CREATE TABLE a (b text); SAVEPOINT c; ROLLBACK TO c",
}


@pytest.mark.parametrize("sql", ENDS.values(), ids=ENDS)
def test_file_that_ends_its_transaction_is_rejected(
    empty: connection, tmp_path: Path, sql: str
) -> None:
    (tmp_path / "0001_a.sql").write_text(sql)
    message = "^0001_a.sql: .*; nothing of it is applied: leave out BEGIN, COMMIT"
    with pytest.raises(MigrationError, match=message):
        migrate(empty, tmp_path)
    with empty.cursor() as cursor:
        cursor.execute("SELECT to_regclass('a'), count(*) FROM schema_migrations")
        assert cursor.fetchone() == (None, 0)


def test_other_error_says_nothing_of_transactions(
    empty: connection, tmp_path: Path
) -> None:
    run(empty, "CREATE TABLE a (b int); CREATE VIEW c AS SELECT b FROM a")
    (tmp_path / "0001_a.sql").write_text("ALTER TABLE a ALTER b TYPE bigint")
    message = "used by a view.*; nothing .* applied. rule _RETURN on view c depends on"
    with pytest.raises(MigrationError, match=message):
        migrate(empty, tmp_path)
    (tmp_path / "0001_a.sql").write_text("COPY a FROM stdin")
    with pytest.raises(MigrationError, match="COPY .*; nothing of it is applied.$"):
        migrate(empty, tmp_path)


def test_error_quotes_no_data(empty: connection, tmp_path: Path) -> None:
    run(empty, "CREATE TABLE a (b text); INSERT INTO a VALUES ('mine'), ('mine')")
    (tmp_path / "0001_a.sql").write_text("CREATE UNIQUE INDEX ON a (b)")
    with pytest.raises(MigrationError, match="; nothing of it is applied.$"):
        migrate(empty, tmp_path)


def test_file_may_end_with_select_into(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT 1 AS b INTO a -- the end")
    assert migrate(empty, tmp_path) == ["0001_a.sql"]
    run(empty, "SELECT b FROM a")


def test_connection_lost_in_a_file_leaves_it_to_the_status(
    empty: connection, tmp_path: Path
) -> None:
    sql = "SELECT pg_terminate_backend(pg_backend_pid())"
    (tmp_path / "0001_a.sql").write_text(sql)
    with pytest.raises(MigrationError, match="--status` tells whether it is applied"):
        migrate(empty, tmp_path)


def test_deferred_constraint_fails_within_the_file(
    empty: connection, tmp_path: Path
) -> None:
    key = "b int UNIQUE DEFERRABLE INITIALLY DEFERRED"
    (tmp_path / "0001_a.sql").write_text(
        f"CREATE TABLE a ({key}); INSERT INTO a VALUES (1), (1)"
    )
    with pytest.raises(MigrationError, match="unique.*; nothing of it is applied"):
        migrate(empty, tmp_path)


def test_file_waits_for_a_lock_only_for_a_while(
    empty: connection, empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b int)")
    migrate(empty, tmp_path)
    monkeypatch.setattr(module, "LOCK_TIMEOUT", 0.1)
    (tmp_path / "0002_b.sql").write_text("ALTER TABLE a ADD c int")
    with closing(connect(empty_url)) as conn:
        run(conn, "BEGIN; LOCK a")
        with pytest.raises(MigrationError, match="timeout; nothing .*: end the trans"):
            migrate(empty, tmp_path)
    assert migrate(empty, tmp_path) == ["0002_b.sql"]


@pytest.mark.parametrize(
    "sql", ["", "\n", ";", "-- Books\n", "/* 1\n */", "-- no transaction"]
)
def test_file_without_a_statement_is_not_applied(
    empty: connection, tmp_path: Path, sql: str
) -> None:
    (tmp_path / "0001_a.sql").write_text(sql)
    with pytest.raises(MigrationError, match="^0001_a.sql has no statement: write"):
        migrate(empty, tmp_path)
    (tmp_path / "0001_a.sql").write_text(f"{sql}\nSELECT 1 /* -- */")
    assert migrate(empty, tmp_path) == ["0001_a.sql"]


def test_byte_order_mark_is_ignored(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT 1", encoding="utf-8-sig")
    assert migrate(empty, tmp_path) == ["0001_a.sql"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_other_encoding_is_named(
    empty: connection, tmp_path: Path, encoding: str
) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT 1", encoding=encoding)
    with pytest.raises(MigrationError, match="^0001_a.sql is not text in UTF-8: save"):
        migrate(empty, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux has such names.")
def test_name_of_a_file_that_is_not_in_utf8_is_rejected(
    app: Flask, runner: FlaskCliRunner
) -> None:
    Path(app.root_path, "migrations", "0002_\udcff.sql").write_text("SELECT 1")
    for arguments in (["migrate"], ["migrate", "--status"]):
        result = runner.invoke(args=arguments)
        assert r"The name 0002_\udcff.sql is not in UTF-8" in result.output


def test_command_shows_notices_that_the_terminal_cannot(app: Flask) -> None:
    notice = "DO $$ BEGIN FOR i IN 1..60 LOOP RAISE NOTICE '→'; END LOOP; END $$"
    Path(app.root_path, "migrations", "0001_made.sql").write_text(notice, "utf-8")
    result = app.test_cli_runner(charset="latin-1").invoke(args=["migrate"])
    assert result.exit_code == 0
    assert result.output.count(r"\u2192") == 60


def test_hint_on_an_isolation_level_is_not_about_statements_outside(
    empty: connection, tmp_path: Path
) -> None:
    (tmp_path / "0001_a.sql").write_text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
    with pytest.raises(MigrationError, match="any query; nothing of it is applied"):
        migrate(empty, tmp_path)


def test_connection_may_have_another_encoding(empty_url: str, tmp_path: Path) -> None:
    sql = "SELECT 'é%s\\' AS b INTO a"
    (tmp_path / "0001_a.sql").write_text(sql, encoding="utf-8")
    url = make_dsn(empty_url, client_encoding="LATIN1")
    with closing(connect(url)) as conn, conn.cursor() as cursor:
        assert migrate(conn, tmp_path) == ["0001_a.sql"]
        cursor.execute("SELECT b FROM a")
        assert cursor.fetchone() == ("é%s\\",)


def test_ending_may_be_in_upper_case(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0001_a.SQL").write_text("SELECT 1")
    assert migrate(empty, tmp_path) == ["0001_a.SQL"]


def test_files_of_editors_are_ignored(empty: connection, tmp_path: Path) -> None:
    (tmp_path / ".#0001_a.sql").symlink_to("user@host.1234")  # Emacs's lock
    (tmp_path / "._0001_a.sql").write_bytes(b"\0\5\x16\7")  # macOS's attributes
    (tmp_path / "0001_a.sql").write_text("SELECT 1")
    assert migrate(empty, tmp_path) == ["0001_a.sql"]


@pytest.mark.parametrize("line", ["", "-- no transaction\nSET lock_timeout = 9;\n"])
def test_statement_that_needs_its_own_file_is_named(
    empty: connection, tmp_path: Path, line: str
) -> None:
    sql = f"{line}CREATE INDEX CONCURRENTLY a ON schema_migrations (name)"
    (tmp_path / "0001_a.sql").write_text(sql)
    message = "^0001_a.sql: CREATE INDEX CONCURRENTLY cannot .*; put it alone into a"
    with pytest.raises(MigrationError, match=f"{message}.*`-- no transaction`[.]$"):
        migrate(empty, tmp_path)


def test_procedure_that_commits_needs_a_file_of_its_own(
    empty: connection, tmp_path: Path
) -> None:
    body = "LANGUAGE plpgsql AS 'BEGIN COMMIT; END'"
    run(empty, f"CREATE PROCEDURE p() {body}")
    (tmp_path / "0001_a.sql").write_text("CALL p()")
    with pytest.raises(MigrationError, match="begins with `-- no transaction`"):
        migrate(empty, tmp_path)


def test_file_that_leaves_a_transaction_open_is_not_applied(
    empty_url: str, tmp_path: Path
) -> None:
    text = "-- no transaction\nBEGIN; CREATE TABLE a ()"
    (tmp_path / "0001_a.sql").write_text(text)
    with (
        closing(connect(empty_url)) as conn,
        pytest.raises(MigrationError, match="^0001_a.sql leaves a transaction open"),
    ):
        migrate(conn, tmp_path)
    (tmp_path / "0001_a.sql").write_text(f"{text}; COMMIT")
    with closing(connect(empty_url)) as conn:
        assert migrate(conn, tmp_path) == ["0001_a.sql"]


def test_table_of_another_tool_is_named(empty_url: str, empty: connection) -> None:
    run(empty, "CREATE TABLE schema_migrations (version text)")
    app = create_app({"TESTING": True, "DATABASE_URL": empty_url})
    for options in ([], ["--status"]):
        result = app.test_cli_runner().invoke(args=["migrate", *options])
        assert result.exit_code == 1
        assert "rename the table of another tool" in result.output


def test_role_that_may_not_create_tables_has_nothing_to_apply(
    empty_url: str, empty: connection, tmp_path: Path
) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT 1")
    migrate(empty, tmp_path)
    run(empty, "REVOKE CREATE ON SCHEMA public FROM current_user, public")
    run(empty, "ALTER SCHEMA public OWNER TO pg_database_owner")
    assert migrate(empty, tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE schema_migrations RENAME checksum TO version",
        "REVOKE ALL ON schema_migrations FROM current_user",
    ],
)
def test_role_that_cannot_read_the_list_is_told_what_to_grant(
    app: Flask, empty: connection, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    if "REVOKE" in change and empty.info.parameter_status("is_superuser") == "on":
        pytest.skip("A superuser may read every table.")
    runner = app.test_cli_runner()
    runner.invoke(args=["migrate"])
    run(empty, change)
    response = app.test_client().get("/readyz")
    assert response.json == {"status": "migrations unreadable"}
    assert "GRANT SELECT ON schema_migrations" in caplog.text
    assert "GRANT SELECT" in runner.invoke(args=["migrate"]).output


@pytest.mark.parametrize("error", [OSError("disk"), psycopg2.Error("server")])
def test_every_failure_of_the_command_is_one_sentence(
    empty_url: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(module, "migrate", fail)
    app = create_app({"TESTING": True, "DATABASE_URL": empty_url})
    result = app.test_cli_runner().invoke(args=["migrate"])
    assert (result.exit_code, result.output) == (1, f"Error: {error}\n")


def test_forgotten_file_is_applied_again(
    runner: FlaskCliRunner, empty: connection
) -> None:
    runner.invoke(args=["migrate"])
    run(empty, "INSERT INTO schema_migrations VALUES ('0000_lost.sql', '')")
    assert "Gone 0000_lost.sql\n" in runner.invoke(args=["migrate", "--status"]).output
    forget = ["migrate", "--forget", "0000_lost.sql"]
    assert runner.invoke(args=forget).output == "Pending 0000_lost.sql\n"
    assert runner.invoke(args=forget).exit_code == 1


def test_reset_makes_the_database_again(
    empty_url: str, empty: connection, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    seeded = []
    app.cli.command("seed")(lambda: seeded.append(1))
    run(empty, "CREATE TABLE in_the_way (a int); CREATE SCHEMA other")
    run(empty, "CREATE PUBLICATION other FOR TABLE in_the_way; SELECT lo_create(7)")
    result = app.test_cli_runner().invoke(args=["migrate", "--reset"], input="y")
    assert "Applied 0001_made.sql\n" in result.output
    assert result.output.endswith("Ran the command seed\n")
    assert "NOTICE" not in result.output
    assert seeded == [1]
    with closing(connect(empty_url)) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT to_regclass('in_the_way'), to_regclass('made')")
        assert cursor.fetchone() == (None, "made")
        cursor.execute("SELECT to_regnamespace('other')")
        assert cursor.fetchone() == (None,)
        for catalog in ("pg_largeobject_metadata", "pg_publication"):
            cursor.execute(f"TABLE {catalog}")
            assert cursor.fetchone() is None


def test_reset_needs_no_schema(
    empty: connection, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    run(empty, "DROP SCHEMA public CASCADE")
    result = app.test_cli_runner().invoke(args=["migrate", "--reset"], input="y")
    assert "Applied 0001_made.sql\n" in result.output


def test_reset_succeeds_while_a_client_reconnects(
    empty_url: str, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    connected, ending = Event(), Event()

    def reconnect() -> None:
        while not ending.is_set():
            with suppress(psycopg2.Error), closing(connect(empty_url)) as conn:
                connected.set()
                while not ending.is_set():
                    run(conn, "SELECT pg_sleep(0.01)")

    with ThreadPoolExecutor() as threads:
        for _ in range(4):
            threads.submit(reconnect)
        assert connected.wait(10)
        result = app.test_cli_runner().invoke(args=["migrate", "--reset"], input="y")
        ending.set()
    assert "Applied 0001_made.sql\n" in result.output


@pytest.mark.parametrize("answer", ["", "n"])
def test_reset_of_another_server_asks_first(
    empty: connection, app: Flask, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setenv("FLASK_DEBUG", "1")
    run(empty, "CREATE TABLE kept (a int)")
    result = app.test_cli_runner().invoke(args=["migrate", "--reset"], input=answer)
    assert f"Drop all tables of {empty.info.dbname} on " in result.output
    assert result.exit_code == 1
    run(empty, "SELECT FROM kept")


def test_reset_is_for_development(empty_url: str, empty: connection) -> None:
    app = create_app({"TESTING": True, "DATABASE_URL": empty_url})
    result = app.test_cli_runner().invoke(args=["migrate", "--reset"])
    assert (result.exit_code, "flask --debug" in result.output) == (1, True)
    run(empty, "SELECT 1")  # The connection is still open.


@pytest.mark.parametrize("option", ["--reset", "--status"])
def test_command_takes_one_option(runner: FlaskCliRunner, option: str) -> None:
    result = runner.invoke(args=["migrate", option, "--forget", "0001_made.sql"])
    assert "Use only one option." in result.output


def test_forgetting_no_name_applies_nothing(
    app: Flask, runner: FlaskCliRunner, empty: connection
) -> None:
    assert runner.invoke(args=["migrate", "--forget", ""]).exit_code == 1
    with app.app_context():
        assert module.status(empty)["0001_made.sql"] == "Pending"


def test_runners_that_start_together_apply_each_file_once(
    empty_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (); SELECT pg_sleep(1.3)")
    assert run_together(empty_url, tmp_path) == [[], [], [], ["0001_a.sql"]]
    assert "Another process migrates this database" in caplog.text


CONCURRENTLY = "-- no transaction\nCREATE INDEX CONCURRENTLY a_b ON a (b)"


def test_runners_that_start_together_make_an_index_concurrently_once(
    empty_url: str, tmp_path: Path
) -> None:
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b text); SELECT pg_sleep(.1)")
    (tmp_path / "0002_b.sql").write_text(CONCURRENTLY)
    applied = run_together(empty_url, tmp_path)
    assert applied == [[], [], [], ["0001_a.sql", "0002_b.sql"]]


def test_failed_index_is_made_once_it_was_dropped(
    empty: connection, tmp_path: Path
) -> None:
    rows = "CREATE TABLE a (b text); INSERT INTO a VALUES ('1'), ('1')"
    (tmp_path / "0001_a.sql").write_text(rows)
    (tmp_path / "0002_b.sql").write_text(CONCURRENTLY.replace("INDEX", "UNIQUE INDEX"))
    for reason in ("could not create unique index", 'relation "a_b" already exists'):
        with pytest.raises(MigrationError, match=f"{reason}.*; drop what it left"):
            migrate(empty, tmp_path)
    with empty.cursor() as cursor:
        cursor.execute("DROP INDEX a_b; DELETE FROM a")
    assert migrate(empty, tmp_path) == ["0002_b.sql"]


def run_together(url: str, folder: Path) -> list[list[str]]:
    """Return what each of four processes applied, the least first."""

    def run(_: int) -> list[str]:
        with closing(connect(url)) as conn:
            return migrate(conn, folder)

    with ThreadPoolExecutor(4) as threads:
        return sorted(threads.map(run, range(4)))


def run(conn: connection, query: str) -> None:
    with conn.cursor() as cursor:
        cursor.execute(query)
