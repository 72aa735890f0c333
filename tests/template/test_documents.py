"""Every command in a document works as it is written there."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from ..support.answers import combinations
from ..support.commands import (
    PROGRAMS,
    SETTINGS,
    TEMPLATE,
    command_lines,
    run,
    wait_for,
)
from ..support.documents import Command, Terminal, blocks, commands
from ..support.machine import broker_server
from ..support.projects import Bake, embedded_server, remove_database
from ..support.repository import copy_template, start_repository
from ..support.serving import free_port

# Parts of commands, and their replacements in these tests.
INSTEAD = {
    # The template is not published yet.
    "gh:org/flask-db-template": "../published",
    # The package of the project in these tests.
    "--app my_flask_app": "--app app",
    # The id of a failed job.
    "--retry ID": "--retry $(uv run flask worker --failed | cut -d' ' -f1)",
}

# Commands that these tests cannot run, and the reason.
NOT_HERE = {
    "docker": "needs an engine: test_docker.py executes the files without one",
    "sudo": "would restart services of this machine",
    "pg_dump": "needs a second database",
    "make test": "runs these tests",
    "make mutations": "takes ten minutes: test_mutations.py tests its parts",
    "uv run celery": "lasts: test_jobs.py has Celery's own worker and schedule",
    "uv run --no-dev celery": "as above",
}

# Other tests run these commands in full.
BRIEFLY = {"PYTEST_ADDOPTS": "--collect-only --quiet"}

# The READMEs of these workers have all the commands.
WORKERS = ["procrastinate", "celery"]

# Sections of a project's README whose commands need the settings of production.
PRODUCTION = ("Run workers", "Deploy")

# Sections that change the project: tests/project/test_recipes.py follows them.
RECIPES = ("Add a page with a table", "Remove the example", "Remove `devserver/`")
YOUR_APP = """
from flask import Flask

app = Flask(__name__)
app.add_url_rule("/notes", view_func=lambda: "<h1>Notes</h1>")
"""
FAIL = """
from app import create_app
from app.tasks import count_words
with create_app().app_context():
    count_words.delay("no number")
"""

# The documents, by where their commands are typed: in a copy of the repository, in a
# project in development or in production, in a project of test_updating.py, or in an
# app that has nothing of the template.
REPOSITORY = ["README.md", "CONTRIBUTING.md"]
DEVELOPMENT = ["docs/development.md"]
PROJECT = ["docs/deploying.md"]
UPDATING = ["docs/updating.md"]
ANY_APP = ["docs/why-reload-breaks.md"]
WITHOUT = [
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/benchmarks.md",
    "docs/choosing.md",
    "docs/reliability.md",
]
NAMES = [*REPOSITORY, *DEVELOPMENT, *PROJECT, *UPDATING, *ANY_APP, *WITHOUT]


def test_every_document_is_known() -> None:
    found = {path.relative_to(TEMPLATE) for path in TEMPLATE.glob("*.md")}
    found |= {path.relative_to(TEMPLATE) for path in TEMPLATE.glob("docs/*.md")}
    assert {path.as_posix() for path in found} == set(NAMES)
    assert [read(name) for name in WITHOUT if commands(read(name))] == []


@pytest.mark.minutes(1)
@pytest.mark.slow
def test_commands_of_the_repository(tmp_path: Path) -> None:
    copy_template(tmp_path / "published")
    clone = copy_template(tmp_path / "clone")
    start_repository(clone)
    typed = [command for name in REPOSITORY for command in commands(read(name))]
    type_all(clone, typed, PATH=path(tmp_path), **BRIEFLY)
    wait_for(lambda: str(clone) not in "\n".join(command_lines()), "end of its servers")
    for database in clone.glob("**/instance/postgres"):
        remove_database(database)


@pytest.mark.slow
def test_commands_of_an_app_without_the_template(tmp_path: Path) -> None:
    copy_template(tmp_path / "flask-db-template")
    app = tmp_path / "app"
    run(PROGRAMS / "uv", "init", "--bare", "--name=app", app, cwd=tmp_path)
    run(PROGRAMS / "uv", "add", "flask", cwd=app)
    (app / "your_app.py").write_text(YOUR_APP)
    typed = [command for name in ANY_APP for command in commands(read(name))]
    type_all(app, typed, PATH=path(tmp_path))
    assert (app / "devserver" / "README.md").exists()


@pytest.mark.minutes(2)
@pytest.mark.slow
@pytest.mark.parametrize("worker", WORKERS)
def test_commands_of_a_project(
    bake: Bake, shared: Path, tmp_path: Path, worker: str
) -> None:
    project = bake(project_slug="app", worker=worker)
    typed = commands((project / "README.md").read_text())
    environ = {"PATH": path(tmp_path)} | BRIEFLY
    in_development = [c for c in typed if c.section not in PRODUCTION + RECIPES]
    if worker == WORKERS[0]:
        in_development += [c for name in DEVELOPMENT for c in commands(read(name))]
    type_all(project, in_development, **environ)
    with production(shared, tmp_path) as settings:
        run(project / ".venv/bin/flask", "migrate", cwd=project, **settings)
        run(project / ".venv/bin/python", "-c", FAIL, cwd=project, **settings)
        typed = [command for command in typed if command.section in PRODUCTION]
        if worker == WORKERS[0]:
            typed += [command for name in PROJECT for command in commands(read(name))]
        type_all(project, typed, **environ | settings)


def test_other_answers_add_no_command(bake: Bake) -> None:
    readmes = [readme(bake, worker=worker) for worker in WORKERS]
    typed = {command for text in readmes for command in commands(text)}
    for answers in combinations("worker") + combinations("ci", "docker"):
        assert set(commands(readme(bake, **answers))) <= typed
    text = "\n".join([*map(read, REPOSITORY + PROJECT), *readmes])
    assert [part for part in [*INSTEAD, *NOT_HERE] if part not in text] == []


def test_python_in_documents_is_python(bake: Bake) -> None:
    texts = [read(name) for name in NAMES]
    for answers in combinations("worker"):
        texts.append(readme(bake, **answers))
    found = [code for text in texts for code in blocks(text, "python")]
    for code in found:
        compile(code, code, "exec")
    assert len(found) > 5


def test_every_picture_is_shown() -> None:
    text = "\n".join(map(read, NAMES))
    pictures = [path for path in TEMPLATE.glob("docs/images/*") if path.is_file()]
    assert [path.name for path in pictures if f"images/{path.name})" not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_links_within_the_documents_lead_somewhere(name: str) -> None:
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", read(name)):
        path, _, anchor = link.partition("#")
        target = (TEMPLATE / name).parent / path if path else TEMPLATE / name
        if not target.exists() or anchor and anchor not in anchors(target):
            broken.append(link)
    assert broken == []


def anchors(document: Path) -> list[str]:
    """Return the anchors that GitHub gives to the headings of the document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


def readme(bake: Bake, **answers: Any) -> str:
    """Return the README of a project with the answers."""
    return (bake(project_slug="app", **answers) / "README.md").read_text()


def read(name: str) -> str:
    """Return the text of a document of the template."""
    return (TEMPLATE / name).read_text()


def path(folder: Path) -> str:
    """Return a PATH with the programs that these documents require."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("cookiecutter", "uv", "uvx"):
        (programs / name).symlink_to(PROGRAMS / name)
    return f"{programs}:{os.environ['PATH']}"


def type_all(folder: Path, typed: list[Command], **environ: str) -> None:
    """Run the commands, with a new terminal for each section."""
    for _, section in groupby(typed, lambda command: command.section):
        with Terminal(folder, **environ) as terminal:
            for _, command in section:
                if not any(command.startswith(each) for each in NOT_HERE):
                    for written, here in INSTEAD.items():
                        command = command.replace(written, here)
                    terminal.type(command)


@contextmanager
def production(shared: Path, folder: Path) -> Iterator[dict[str, str]]:
    """Run PostgreSQL and a broker, and yield the settings of production."""
    port = free_port()
    redis = [broker_server(), "--port", str(port), "--save", "", "--dir", str(folder)]
    with embedded_server(shared) as url, Popen(redis) as broker:
        try:
            yield {
                "CELERY_BROKER_URL": f"redis://127.0.0.1:{port}/0",
                "DATABASE_URL": url,
                **SETTINGS,
            }
        finally:
            broker.terminate()
