"""Run the tests of tests/in_project inside baked projects."""

from pathlib import Path

import pytest

from ..support.answers import choices
from ..support.commands import PROGRAMS, run
from ..support.machine import broker_server
from ..support.projects import Bake, install, put_inside


@pytest.mark.minutes(8)
@pytest.mark.parametrize("worker", ["procrastinate", "celery"])
def test_jobs_through_faults(bake: Bake, worker: str) -> None:
    environ = {"BROKER_SERVER": broker_server()} if worker == "celery" else {}
    run_inside(prepare(bake, worker=worker), "jobs", **environ)


@pytest.mark.minutes(3)
@pytest.mark.parametrize("pool", choices()["pool"])
def test_connections_through_faults(bake: Bake, pool: str) -> None:
    project = prepare(bake, pool=pool)
    run_inside(project, "connections")
    run_inside(project, "faults", SECONDS="10")


@pytest.mark.minutes(5)
@pytest.mark.parametrize(
    "module",
    ["dev", "dev_any_app", "dev_files", "postgres", "production", "welcome"],
)
def test_default_project(shared: Path, module: str) -> None:
    run_inside(shared, module)


def prepare(bake: Bake, **answers: str) -> Path:
    """Install a project with the tests of tests/in_project, and return it."""
    project = bake(project_slug="app", **answers)
    put_inside(project)
    install(project)
    run(PROGRAMS / "uv", "pip", "install", "--quiet", "gunicorn>=23", cwd=project)
    return project


def run_inside(project: Path, module: str, **environ: str) -> None:
    pytest = project / ".venv" / PROGRAMS.name / "pytest"
    print(run(pytest, f"tests/test_{module}.py", cwd=project, **environ))
