"""The recipes in a project's README work when followed literally."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from ..support.answers import choices
from ..support.commands import PROGRAMS, clean_environment, run, wait_for
from ..support.documents import Terminal, commands
from ..support.projects import Bake, install
from ..support.repository import commit, start_repository

ADD, REMOVE_EXAMPLE = "Add a page with a table", "Remove the example"
REMOVE_DEVSERVER = "Remove `devserver/`"

pytestmark = pytest.mark.slow

SOME_RELOADS = ["-m", "reload", "-k", "many_reloads or port_is_free"]

# The job of the first test takes longer than the test.
ORDER = """
import time
from app.core.db import get_db
from app.core.jobs import task

@task
def shout():
    time.sleep(0.5)
    with get_db() as db, db.cursor() as cursor:
        cursor.execute("UPDATE notes SET body = body || '!'")

def enqueue(app, db):
    db.cursor().execute("INSERT INTO notes (body) VALUES ('a')")
    with app.app_context():
        shout.delay()

def test_first(app, db):
    enqueue(app, db)

def test_second(app, db, client, run_jobs):
    enqueue(app, db)
    run_jobs()
    assert "a!<" in client.get("/notes").text
"""

AUDIT = """
CREATE SCHEMA audit;
CREATE TABLE audit.log (what text);
CREATE TABLE audit.kinds (kind text);
CREATE SEQUENCE audit.invoices;
CREATE SEQUENCE audit.orders;
ALTER SEQUENCE audit.orders RESTART WITH 1000;
CREATE SEQUENCE audit.parcels;
SELECT setval('audit.parcels', 50);
CREATE TABLE audit.final (what text);
CREATE FUNCTION audit.reject() RETURNS trigger LANGUAGE plpgsql
AS 'BEGIN RAISE EXCEPTION $$append only$$; END';
CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON audit.final
EXECUTE FUNCTION audit.reject();
CREATE MATERIALIZED VIEW audit.lines AS SELECT what FROM audit.log;
"""
TEST_AUDIT = """
import os
import psycopg2
import pytest

def test_settings_of_development_are_dropped():
    assert "POOL_SIZE" not in os.environ and "OWN" not in os.environ

@pytest.mark.parametrize("number", [1, 2])
def test_log(db, number):
    with db.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM audit.log")
        assert cursor.fetchone() == (0,)
        cursor.execute("SELECT count(*) FROM audit.lines")
        assert cursor.fetchone() == (0,)
        for name, first in ("invoices", 1), ("orders", 1000), ("parcels", 51):
            cursor.execute("SELECT nextval(%s)", [f"audit.{name}"])
            assert cursor.fetchone() == (first,)
        cursor.execute("INSERT INTO audit.log VALUES ('test')")
        cursor.execute("REFRESH MATERIALIZED VIEW audit.lines")

@pytest.mark.parametrize("number", [1, 2])
def test_append_only(db, number):
    with db.cursor() as cursor:
        cursor.execute("INSERT INTO audit.final VALUES ('test')")
        cursor.execute("SELECT count(*) FROM audit.final")
        assert cursor.fetchone() == (1,)

@pytest.mark.parametrize("number", [1, 2])
def test_rejected_row(db, number):
    with db.cursor() as cursor:
        cursor.execute("SELECT pg_sequence_last_value('notes_id_seq')")
        assert cursor.fetchone() == (None,)
        with pytest.raises(psycopg2.IntegrityError):
            cursor.execute("INSERT INTO notes (body) VALUES (NULL)")
"""

# The server ends sessions that are idle for a second.
TEST_SESSIONS = """
import time
import psycopg2
from psycopg2.extensions import make_dsn

kept = []

def test_idle(client):
    time.sleep(2)

def test_after_it(client):
    assert client.get("/readyz").status_code == 200

def test_connection_of_another_role_stays_open(db, database_url):
    db.cursor().execute("CREATE ROLE reader LOGIN PASSWORD 'secret'")
    url = make_dsn(database_url, user="reader", password="secret")
    kept.append(psycopg2.connect(url, options="-c idle_session_timeout=0"))
"""

TEST_WAIT = """
import time
from pathlib import Path

def test_wait(db):
    Path(f"{db.info.dbname}.name").touch()
    time.sleep(600)
"""

DATABASES = """
import os, psycopg2
cursor = psycopg2.connect(os.environ["DATABASE_URL"]).cursor()
cursor.execute("SELECT datname FROM pg_database")
print(cursor.fetchall())
"""

PERIODIC = """
from .core.jobs import queue

@queue.periodic(cron="* * * * * *")
@task
def tick(timestamp: int) -> None:
    pass
"""

# Everything here is right in an application, so it must not matter to tests/core.
OWN_APPLICATION = """

def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    app = Flask(__name__)
    core.init_app(app, config, {"PAYMENT_KEY": text_setting(example="a key")})
    for path in PATHS:
        app.add_url_rule(path, path, lambda: "mine", methods=["GET", "POST"])
    for code in (404, 500):
        app.register_error_handler(code, lambda error: ("mine", error.code))
    app.before_request(lambda: redirect("/login"))
    app.after_request(lambda response: abort(418))
    app.context_processor(lambda: {}["user"])
    return app
"""


@pytest.mark.parametrize("worker", ["none", "celery"])
def test_page_with_a_table(bake: Bake, worker: str) -> None:
    project = bake(project_slug="app", worker=worker)
    programs = install(project)
    assert follow(project, ADD) == 5
    check(programs, project)
    environ = {"PATH": f"{PROGRAMS}:/usr/bin:/bin"}
    with Terminal(project, **environ) as terminal:
        for command in commands((project / "README.md").read_text()):
            if command.section == ADD:
                terminal.type(command.text)
    assert "/books/<int:book_id>" in run(programs / "flask", "routes", cwd=project)


@pytest.mark.parametrize("worker", ["thread", "procrastinate", "celery"])
def test_task_with_a_test(bake: Bake, server_url: str, worker: str) -> None:
    project = bake(project_slug="app", worker=worker)
    programs = install(project)
    name = "tests/test_tasks.py"
    blocks = shown(project, "Test a task")
    [text] = [text for names, _, text in blocks if names == [name]]
    (project / name).write_text(text)
    check(programs, project)
    run(programs / "pytest", name, cwd=project, DATABASE_URL=server_url)


def test_job_of_a_test_ends_before_the_next_test(bake: Bake, server_url: str) -> None:
    project = bake(project_slug="app", worker="thread")
    programs = install(project)
    name = "tests/test_order.py"
    (project / name).write_text(ORDER)
    run(programs / "pytest", name, cwd=project, DATABASE_URL=server_url)


@pytest.mark.parametrize("seed", ["", "INSERT INTO audit.kinds VALUES ('seen')"])
def test_each_test_starts_with_what_the_migrations_create(
    bake: Bake, server_url: str, seed: str
) -> None:
    project = bake(project_slug="app")
    programs = install(project)
    (project / "app" / "migrations" / "0002_audit.sql").write_text(AUDIT + seed)
    (project / "tests" / "test_audit.py").write_text(TEST_AUDIT)
    # This plugin gives a request to every test with the fixture `app`.
    plugin = [PROGRAMS / "uv", "pip", "install", "--quiet", "pytest-flask"]
    run(*plugin, cwd=project)
    # An editor may load the settings of development from `.env`.
    editor = {"TRUSTED_HOSTS": "myphone.local", "FLASK_SERVER_NAME": "example.com"}
    editor |= {"POOL_SIZE": "many", "OWN": "text"}
    (project / ".env").write_text("OWN=text\n")
    tests = "tests/test_audit.py" if seed else "tests"
    run(programs / "pytest", tests, cwd=project, DATABASE_URL=server_url, **editor)


def test_idle_and_open_sessions_end_no_run(bake: Bake, superuser_url: str) -> None:
    project = bake(project_slug="app")
    programs = install(project)
    (project / "tests" / "test_sessions.py").write_text(TEST_SESSIONS)
    url = f"{superuser_url}?options=-c%20idle_session_timeout%3D1000"
    run(programs / "pytest", "tests/test_sessions.py", cwd=project, DATABASE_URL=url)


def test_databases_of_a_killed_run_are_dropped(bake: Bake, server_url: str) -> None:
    project = bake(project_slug="app")
    programs = install(project)
    (project / "tests" / "test_wait.py").write_text(TEST_WAIT)
    environ = {"DATABASE_URL": server_url}
    command = [programs / "pytest", "tests/test_wait.py"]

    @contextmanager
    def waiting() -> Iterator[str]:
        """Run a test until the end of the block, and yield the database's name."""
        before = {*project.glob("*.name")}
        env = clean_environment() | environ
        with subprocess.Popen(command, cwd=project, env=env) as test:
            try:
                wait_for(lambda: {*project.glob("*.name")} - before, "database")
                [name] = {*project.glob("*.name")} - before
                yield name.stem
            finally:
                test.kill()

    with waiting() as killed:
        pass
    with waiting() as running:
        run(programs / "pytest", "tests/test_notes.py", cwd=project, **environ)
        left = run(programs / "python", "-c", DATABASES, cwd=project, **environ)
    assert running in left
    assert killed not in left


def test_periodic_task_does_not_run_in_the_reload_tests(
    bake: Bake, server_url: str
) -> None:
    project = bake(project_slug="app", worker="procrastinate")
    programs = install(project)
    with (project / "app" / "tasks.py").open("a") as module:
        module.write(PERIODIC)
    tests = ["-m", "reload", "-k", "each_job_runs_once", "tests/core"]
    environ = {"RELOADS": "2", "DATABASE_URL": server_url}
    run(programs / "pytest", *tests, cwd=project, **environ)


@pytest.mark.minutes(2)
@pytest.mark.parametrize("worker", choices()["worker"])
def test_example_can_be_removed(bake: Bake, server_url: str, worker: str) -> None:
    project = bake(project_slug="app", worker=worker)
    programs = install(project)
    remove(project, REMOVE_EXAMPLE)
    assert "notes" not in run(programs / "flask", "routes", cwd=project)
    check(programs, project)
    run(programs / "pytest", cwd=project, DATABASE_URL=server_url)


@pytest.mark.minutes(2)
@pytest.mark.parametrize("worker", ["none", "procrastinate"])
def test_devserver_can_be_removed(bake: Bake, server_url: str, worker: str) -> None:
    project = bake(project_slug="app", worker=worker, docker=False)
    remove(project, REMOVE_DEVSERVER)
    assert not (project / "devserver").exists()
    programs = install(project)
    # In the shared cache, mypy has the types of flask_devserver.
    check(programs, project, MYPY_CACHE_DIR=".mypy_cache")
    server = {"DATABASE_URL": server_url, "RELOADS": "2"}
    run(programs / "pytest", "tests/core", cwd=project, **server)
    if worker == "none":
        run(programs / "pytest", *SOME_RELOADS, cwd=project, **server)


@pytest.mark.minutes(2)
@pytest.mark.parametrize("worker", ["none", "thread"])
def test_tests_of_core_pass_with_any_application(bake: Bake, worker: str) -> None:
    project = bake(project_slug="app", worker=worker)
    programs = install(project)
    tests = [path.read_text() for path in project.glob("tests/core/*.py")]
    paths = set(re.findall(r'"(/[a-z-]+)[/"]', "\n".join(tests)))
    module = project / "app" / "__init__.py"
    text = module.read_text().partition("\n\ndef create_app")[0]
    text = text.replace("import Flask", "import Flask, abort, redirect")
    text += "\nfrom .core.config import text_setting\n"
    text += f"\nPATHS = {sorted(paths - {'/healthz', '/readyz'})}\n"
    module.write_text(text + OWN_APPLICATION)
    run(programs / "pytest", "tests/core", cwd=project)
    run(programs / "pytest", *SOME_RELOADS, cwd=project, RELOADS="2")


def check(programs: Path, project: Path, **environ: str) -> None:
    run(programs / "ruff", "check", cwd=project)
    run(programs / "ruff", "format", "--check", cwd=project)
    run(programs / "mypy", cwd=project, **environ)


def remove(project: Path, section: str) -> None:
    """Run the `git rm` commands of a section, and apply its edits."""
    start_repository(project)
    for command in commands((project / "README.md").read_text()):
        if command.section == section:
            run(*command.text.split(), cwd=project)
    assert follow(project, section) == 1
    commit(project)


def follow(project: Path, section: str) -> int:
    """Write the files of a section and apply its edits; return the number of both.

    The paragraph before a block names the file: the first name is the file of an edit,
    the last name is that of a new file.
    """
    done = 0
    for names, language, text in shown(project, section):
        if language == "diff":
            edit(project / names[0], text)
        else:
            (project / names[-1]).write_text(text)
        done += 1
    return done


def shown(project: Path, section: str) -> Iterator[tuple[list[str], str, str]]:
    """Yield the files that a paragraph names, and the block below it."""
    heading = before = ""
    names: list[str] = []
    for token in MarkdownIt().parse((project / "README.md").read_text()):
        if before == "heading_open":
            heading = token.content
        elif before == "paragraph_open":
            names = re.findall(r"`([\w./]+\.\w+)`", token.content)
        elif token.type == "fence" and heading == section:
            yield names, token.info, token.content
        before = token.type


def edit(path: Path, diff: str) -> None:
    """Remove each line with a minus, and insert those with a plus below the others."""
    lines, at = path.read_text().splitlines(), 0
    for line in diff.splitlines():
        if line.startswith("+"):
            lines.insert(at, line[1:])
            at += 1
        else:
            assert lines.count(line[1:]) == 1, f"{line[1:]!r} is not once in {path}"
            at = lines.index(line[1:])
            if line.startswith("-"):
                del lines[at]
            else:
                at += 1
    path.write_text("\n".join(lines) + "\n")
