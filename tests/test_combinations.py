"""Every combination of all choices: the right files, and nothing wrong in them."""

import json
import tomllib
from pathlib import Path

import pytest
import yaml

from .conftest import PROGRAMS, Answers, Bake, combinations, label, run

ALWAYS = """
    .env.example .flaskenv .gitignore LICENSE README.md
    gunicorn.conf.py pyproject.toml
    app/__init__.py app/config.py app/db.py app/health.py app/log.py app/migrate.py
    app/notes.py app/security.py app/migrations/0001_notes.sql app/templates/notes.html
    devserver/__init__.py devserver/browser.py devserver/guard.py
    devserver/postgres.py devserver/start.html devserver/start.py
    devserver/supervisor.py devserver/version.py devserver/watcher.py
    tests/__init__.py tests/conftest.py tests/live.py tests/probe.py
    tests/test_app.py tests/test_config.py tests/test_db.py tests/test_migrate.py
    tests/test_notes.py tests/test_reload.py
"""
WITH_POOL = "app/pool.py tests/test_pool.py"
WITH_WORKER = """
    app/tasks.py app/worker.py
    tests/probe_tasks.py tests/test_reload_tasks.py tests/test_worker.py
"""
WITH_JOBS = "app/jobs.py"
FAILED_TASKS = "app/migrations/0002_failed_tasks.sql"
CI = {
    "github": ".github/dependabot.yml .github/workflows/ci.yml",
    "gitlab": ".gitlab-ci.yml renovate.json",
    "none": "",
}


def expected(answers: Answers) -> set[str]:
    """Return the files that the answers ask for."""
    names = ALWAYS + CI[answers["ci"]]
    names += f" {WITH_POOL}" if answers["pool"] != "none" else ""
    names += f" {WITH_WORKER}" if answers["worker"] != "none" else ""
    names += f" {WITH_JOBS}" if answers["worker"] in ("procrastinate", "celery") else ""
    names += f" {FAILED_TASKS}" if answers["worker"] == "celery" else ""
    names += " Dockerfile compose.yaml" if answers["docker"] else ""
    return set(names.split())


def files(project: Path) -> list[Path]:
    return [path for path in project.rglob("*") if path.is_file()]


@pytest.mark.parametrize("answers", combinations(), ids=label)
def test_combination(bake: Bake, answers: Answers) -> None:
    project = bake(project_slug="app", **answers)
    found = {path.relative_to(project).as_posix() for path in files(project)}
    assert found == expected(answers)
    assert [path for path in project.rglob("*") if not any_file(path)] == []
    for path in files(project):
        check_text(path)
    check_style(project)


@pytest.mark.parametrize("slug", ["a", "a" * 40, "z" * 40, "a_1"], ids=len)
@pytest.mark.parametrize("answers", combinations("pool", "worker"), ids=label)
def test_slug(bake: Bake, answers: Answers, slug: str) -> None:
    check_style(bake(project_slug=slug, **answers))


def test_default_project_is_small(bake: Bake) -> None:
    assert len(files(bake())) <= 44


def any_file(path: Path) -> bool:
    """Say whether the path is a file or a folder that leads to one."""
    return path.is_file() or bool(files(path))


def check_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n") and not text.endswith("\n\n"), path
    assert "cookiecutter" not in text.lower(), path
    if path.suffix != ".html":
        assert "{{" not in text and "{%" not in text, path
    if path.suffix == ".toml":
        tomllib.loads(text)
    if path.suffix in (".yaml", ".yml"):
        yaml.safe_load(text)
    if path.suffix == ".json":
        json.loads(text)


def check_style(project: Path) -> None:
    run(PROGRAMS / "ruff", "check", "--no-cache", cwd=project)
    run(PROGRAMS / "ruff", "format", "--check", "--no-cache", cwd=project)
