from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from psycopg2.extensions import connection

from {{ cookiecutter.project_slug }} import create_app
from {{ cookiecutter.project_slug }}.core.migrate import (
    MigrationError,
    migrate,
)

from ..conftest import connect


@pytest.fixture
def empty(empty_url: str) -> Iterator[connection]:
    with closing(connect(empty_url)) as conn:
        yield conn


def test_command_applies_what_is_missing_once(empty_url: str) -> None:
    app = create_app({"TESTING": True, "DATABASE_URL": empty_url})
    runner = app.test_cli_runner()
    assert "Applied 0001_notes.sql\n" in runner.invoke(args=["migrate"]).output
    assert runner.invoke(args=["migrate"]).output == "Nothing to apply\n"


def test_command_lists_what_is_missing(empty_url: str) -> None:
    app = create_app({"TESTING": True, "DATABASE_URL": empty_url})
    runner = app.test_cli_runner()
    listed = ["migrate", "--status"]
    assert "Missing 0001_notes.sql\n" in runner.invoke(args=listed).output
    assert "Applied 0001_notes.sql\n" in runner.invoke(args=["migrate"]).output
    assert "Applied 0001_notes.sql\n" in runner.invoke(args=listed).output


def test_not_ready_while_some_are_missing(
    empty_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app({"TESTING": True, "DATABASE_URL": empty_url})
    assert app.test_client().get("/readyz").status_code == 503
    assert "Not ready: run `flask migrate` to apply " in caplog.text
    app.test_cli_runner().invoke(args=["migrate"])
    assert app.test_client().get("/readyz").status_code == 200


def test_files_are_applied_in_order(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0002_b.sql").write_text("INSERT INTO a VALUES ('50 %')")
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b text); SELECT 1")
    assert migrate(empty, tmp_path) == ["0001_a.sql", "0002_b.sql"]
    assert migrate(empty, tmp_path) == []


def test_refused_file_changes_nothing(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b text);\nNONSENSE;")
    message = '^0001_a.sql, line 2: syntax error at or near "NONSENSE"; nothing of it'
    with pytest.raises(MigrationError, match=message):
        migrate(empty, tmp_path)
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b text)")
    assert migrate(empty, tmp_path) == ["0001_a.sql"]


def test_file_without_a_line_to_blame_is_named_all_the_same(
    empty: connection, tmp_path: Path
) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT 1;\nSELECT 1 / 0;")
    with pytest.raises(MigrationError, match="^0001_a.sql: division by zero; nothing"):
        migrate(empty, tmp_path)


def test_what_a_file_sets_ends_with_it(empty: connection, tmp_path: Path) -> None:
    unset = "SELECT set_config('search_path', '', false); CREATE TABLE public.a ()"
    (tmp_path / "0001_a.sql").write_text(unset)
    (tmp_path / "0002_b.sql").write_text("CREATE TABLE b ()")
    assert migrate(empty, tmp_path) == ["0001_a.sql", "0002_b.sql"]


def test_edited_file_is_refused(empty: connection, tmp_path: Path) -> None:
    (tmp_path / "0001_a.sql").write_text("SELECT 1")
    migrate(empty, tmp_path)
    (tmp_path / "0001_a.sql").write_text("SELECT 2")
    with pytest.raises(MigrationError, match="^0001_a.sql was edited after"):
        migrate(empty, tmp_path)


def test_runners_that_start_together_apply_each_file_once(
    empty_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0001_a.sql").write_text("CREATE TABLE a (b text); SELECT pg_sleep(.1)")
    assert run_together(empty_url, tmp_path) == [[], [], [], ["0001_a.sql"]]
    assert "Another one migrates this database" in caplog.text


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
    """Return what each of four runners applied, who applied least first."""

    def run(_: int) -> list[str]:
        with closing(connect(url)) as conn:
            return migrate(conn, folder)

    with ThreadPoolExecutor(4) as threads:
        return sorted(threads.map(run, range(4)))
