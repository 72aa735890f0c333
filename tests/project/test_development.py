"""A new project works in development without settings."""

import json
import subprocess
from pathlib import Path

import pytest

from ..support.commands import PROGRAMS, SETTINGS, clean_environment, run, wait_for
from ..support.projects import Bake, embedded_server, install
from ..support.serving import free_port, page

PRODUCTION = {"FLASK_APP": "app", "FLASK_SKIP_DOTENV": "1"}
COMMANDS = ["dev", "migrate", "routes", "run", "shell"]


def test_commands_need_no_setting_in_development(shared: Path) -> None:
    flask = shared / ".venv" / PROGRAMS.name / "flask"
    said = run(flask, "--help", cwd=shared)
    assert [name for name in COMMANDS if f"\n  {name} " not in said] == []
    assert "Error" not in said
    assert "Traceback" not in said
    assert "/notes" in run(flask, "routes", cwd=shared)


def test_production_reads_neither_flaskenv_nor_env(shared: Path) -> None:
    flask = shared / ".venv" / PROGRAMS.name / "flask"
    done = subprocess.run(
        [flask, "migrate"],
        cwd=shared,
        env=clean_environment() | PRODUCTION,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "DATABASE_URL is not set" in done.stderr


def test_environment_without_dev_prints_no_tip(bake: Bake) -> None:
    project = bake(project_slug="app")
    programs = install(project, "--no-dev")
    done = subprocess.run(
        [programs / "flask", "--help"],
        cwd=project,
        env=clean_environment() | PRODUCTION,
        capture_output=True,
        text=True,
    )
    assert "Tip" not in done.stderr


def test_each_test_starts_with_the_rows_of_the_migrations(bake: Bake) -> None:
    project = bake(project_slug="app")
    programs = install(project)
    (project / "app" / "migrations" / "0002_kinds.sql").write_text(KINDS)
    (project / "tests" / "test_kinds.py").write_text(TEST_KINDS.lstrip())
    run(programs / "pytest", "tests/test_kinds.py", cwd=project)


def test_long_sql_and_response_json_pass_the_checks(bake: Bake) -> None:
    project = bake(project_slug="app")
    programs = install(project)
    query = f"SELECT {', '.join(['id, body'] * 12)} FROM notes"
    (project / "app" / "query.py").write_text(f'QUERY = "{query}"\n')
    (project / "tests" / "test_title.py").write_text(TEST_TITLE.lstrip())
    run(programs / "ruff", "check", cwd=project)
    run(programs / "ruff", "format", "--check", cwd=project)
    run(programs / "mypy", cwd=project)


def test_every_log_line_of_the_server_is_json(shared: Path) -> None:
    port = free_port()
    flask = shared / ".venv" / PROGRAMS.name / "flask"
    with embedded_server(shared) as url:
        server = subprocess.Popen(
            [flask, "serve", f"--port={port}"],
            cwd=shared,
            env=clean_environment() | SETTINGS | PRODUCTION | {"DATABASE_URL": url},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: page(f"http://127.0.0.1:{port}/healthz"), "response")
        server.terminate()
        _, log = server.communicate(timeout=60)
    lines = [json.loads(line) for line in log.splitlines()]
    loggers = {line["logger"] for line in lines}
    assert "_granian" in loggers
    assert len(lines) > 3


KINDS = """
CREATE TABLE kinds (name text, note_id bigint REFERENCES notes (id));
INSERT INTO kinds VALUES ('reminder', NULL);
"""

TEST_KINDS = """
import pytest
from psycopg2.extensions import connection


@pytest.mark.parametrize("number", [1, 2])
def test_rows(db: connection, number: int) -> None:
    with db.cursor() as cursor:
        cursor.execute("SELECT name FROM kinds")
        assert cursor.fetchall() == [("reminder",)]
        cursor.execute("INSERT INTO notes (body) VALUES ('a') RETURNING id")
        assert cursor.fetchone() == (1,)
        cursor.execute("DELETE FROM kinds")
"""

TEST_TITLE = """
from flask.testing import FlaskClient


def test_title(client: FlaskClient) -> None:
    response = client.get("/none", headers={"Accept": "application/json"})
    assert response.json["title"] == "Not Found"
"""


@pytest.mark.parametrize("name", [".coverage", "htmlcov/a", ".idea/a", ".vscode/a"])
def test_git_ignores_files_of_tools(render: Bake, tmp_path: Path, name: str) -> None:
    run("git", "init", "--quiet", cwd=tmp_path)
    ignored = (render(project_slug="app") / ".gitignore").read_text()
    (tmp_path / ".gitignore").write_text(ignored)
    run("git", "check-ignore", name, cwd=tmp_path)
