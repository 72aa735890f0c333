"""Every combination of answers generates the right files without errors."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from ..support.answers import Answers, choices, combinations, label
from ..support.projects import Bake, check_style, files
from ..support.repository import replace

ALWAYS = """
    .env.example .flaskenv .gitattributes .gitignore LICENSE README.md
    pyproject.toml
    app/__init__.py app/notes.py app/migrations/0001_notes.sql
    app/static/style.css app/templates/base.html app/templates/error.html
    app/templates/notes.html
    app/core/__init__.py app/core/cli.py app/core/config.py app/core/db.py
    app/core/dev.py app/core/errors.py app/core/health.py app/core/log.py
    app/core/migrate.py app/core/pool.py app/core/security.py app/core/serve.py
    devserver/README.md devserver/pyproject.toml
    devserver/flask_devserver/__init__.py devserver/flask_devserver/browser.py
    devserver/flask_devserver/child.py devserver/flask_devserver/cli.py
    devserver/flask_devserver/embedded.py devserver/flask_devserver/files.py
    devserver/flask_devserver/packages.py
    devserver/flask_devserver/postgres.py devserver/flask_devserver/processes.py
    devserver/flask_devserver/reload.js devserver/flask_devserver/server.py
    devserver/flask_devserver/shutdown.py devserver/flask_devserver/supervisor.py
    devserver/flask_devserver/py.typed devserver/flask_devserver/valkey.py
    devserver/flask_devserver/welcome.html devserver/flask_devserver/welcome.js
    devserver/flask_devserver/welcome.py
    tests/__init__.py tests/conftest.py tests/test_notes.py
    tests/core/__init__.py tests/core/conftest.py tests/core/application.py
    tests/core/reload_app.py tests/core/reload_server.py
    tests/core/test_app.py tests/core/test_config.py tests/core/test_db.py
    tests/core/test_errors.py tests/core/test_migrate.py tests/core/test_reload.py
    tests/core/test_security.py
"""
WITH_POOL = "tests/core/test_pool.py"
WITH_WORKER = """
    app/tasks.py app/core/jobs.py tests/core/test_jobs.py
    tests/core/reload_app_tasks.py tests/core/test_reload_tasks.py
"""
WITH_JOBS = "app/worker.py app/core/engine.py app/core/worker.py"
WITH_CELERY = "app/core/celery.sql app/core/dev_broker.py"
CI = {
    "github": ".github/dependabot.yml .github/workflows/ci.yml",
    "gitlab": ".gitlab-ci.yml renovate.json",
    "none": "",
}


# The license changes only its own file: see `test_license`.
EVERY = combinations(*(name for name in choices() if name != "license"))


def expected(answers: Answers) -> set[str]:
    """Return the names of the files that the answers should generate."""
    names = ALWAYS + CI[answers["ci"]]
    names += f" {WITH_POOL}" if answers["pool"] != "none" else ""
    names += f" {WITH_WORKER}" if answers["worker"] != "none" else ""
    names += f" {WITH_JOBS}" if answers["worker"] in ("procrastinate", "celery") else ""
    names += f" {WITH_CELERY}" if answers["worker"] == "celery" else ""
    names += " Dockerfile compose.yaml" if answers["docker"] else ""
    return set(names.split())


@pytest.mark.parametrize("answers", EVERY, ids=label)
def test_combination(bake: Bake, answers: Answers) -> None:
    check_project(bake(project_slug="app", **answers), answers)


@pytest.mark.parametrize("license", choices()["license"])
def test_license(bake: Bake, license: str) -> None:
    check_project(bake(project_slug="app", license=license), EVERY[0])


# Imports stay sorted whether the slug comes first or last.
@pytest.mark.parametrize("slug", ["a", "z" * 40], ids=len)
@pytest.mark.parametrize("answers", combinations("pool", "worker"), ids=label)
def test_slug(bake: Bake, answers: Answers, slug: str) -> None:
    check_style(bake(project_slug=slug, **answers))


@pytest.mark.parametrize("answers", combinations("pool", "worker"), ids=label)
def test_style_is_right_for_a_later_python(bake: Bake, answers: Answers) -> None:
    project = bake(project_slug="app", **answers)
    replace(project / "pyproject.toml", r"python = \">=3.11", 'python = ">=3.15')
    check_style(project)


def test_default_project_is_small(bake: Bake) -> None:
    assert len(files(bake())) <= 66


def test_windows_can_check_out_every_path(template: Path) -> None:
    paths = [path.relative_to(template).as_posix() for path in files(template)]
    # Of 260 characters, the folder of Cookiecutter or cruft takes up to 100.
    assert max(map(len, paths)) <= 160
    assert [path for path in paths if re.search(r'[<>:"|?*\\]|[. ](/|$)', path)] == []
    assert len({path.lower() for path in paths}) == len(paths)


def check_project(project: Path, answers: Answers) -> None:
    """Check that the project has the right files, and that they are valid."""
    found = {path.relative_to(project).as_posix() for path in files(project)}
    assert found == expected(answers)
    assert [path for path in project.rglob("*") if not any_file(path)] == []
    for path in files(project):
        check_text(path)
    check_style(project)


def any_file(path: Path) -> bool:
    """Return whether the path is a file, or a folder that contains one."""
    return path.is_file() or bool(files(path))


def check_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n") and not text.endswith("\n\n"), path
    assert "cookiecutter" not in text.lower(), path
    if path.suffix not in (".html", ".md"):  # README shows a Jinja template.
        assert "{%" not in text, path
    if path.suffix == ".toml":
        tomllib.loads(text)
    if path.suffix in (".yaml", ".yml"):
        yaml.safe_load(text)
    if path.suffix == ".json":
        json.loads(text)
