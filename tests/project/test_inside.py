"""What a project's owner need not keep: tests/in_project."""

from pathlib import Path

import pytest

from ..support.answers import choices
from ..support.commands import run
from ..support.machine import broker_server
from ..support.projects import Bake, install, put_inside


@pytest.mark.parametrize("pool", choices()["pool"])
def test_connections_through_faults(bake: Bake, pool: str) -> None:
    run_inside(bake(project_slug="app", pool=pool), "tests/test_faults.py")


@pytest.mark.parametrize("worker", ["procrastinate", "celery"])
def test_jobs_through_faults(bake: Bake, worker: str) -> None:
    environ = {"BROKER_SERVER": broker_server()} if worker == "celery" else {}
    project = bake(project_slug="app", worker=worker)
    run_inside(project, "tests/test_jobs.py", **environ)


def test_production(bake: Bake) -> None:
    run_inside(bake(project_slug="app"), "tests/test_production.py")


@pytest.mark.parametrize("module", ["dev", "postgres", "welcome"])
def test_devserver(bake: Bake, module: str) -> None:
    run_inside(bake(project_slug="app"), f"tests/test_{module}.py")


def run_inside(project: Path, *tests: str, **environ: str) -> None:
    """Copy tests/in_project into the project and run the named tests."""
    put_inside(project)
    print(run(install(project) / "pytest", *tests, cwd=project, **environ))
