"""The bounds of a project's dependencies admit working versions only."""

import tomllib

import pytest

from ..support.commands import PROGRAMS, TEMPLATE, run
from ..support.documents import blocks
from ..support.projects import Bake, install

pytestmark = pytest.mark.slow


@pytest.mark.minutes
def test_lowest_versions_pass_the_tests(bake: Bake, server_url: str) -> None:
    project = bake(project_slug="app", pool="sqlalchemy", worker="thread")
    programs = install(project, "--resolution=lowest-direct")
    assert "3.1.0" in run(programs / "flask", "--version", cwd=project)
    for command in (["mypy"], ["ruff", "check"], ["ruff", "format", "--check"]):
        run(programs / command[0], *command[1:], cwd=project)
    tests = ["-m", "", "-k", "not reload or many_reloads"]
    environ = {"DATABASE_URL": server_url, "RELOADS": "2"}
    run(programs / "pytest", *tests, cwd=project, **environ)


def test_watchdog_7_is_not_installed(bake: Bake) -> None:
    project = bake(project_slug="app")
    run(PROGRAMS / "uv", "add", "--no-sync", "watchdog", cwd=project)
    packages = tomllib.loads((project / "uv.lock").read_text())["package"]
    versions = {package["name"]: package["version"] for package in packages}
    assert int(versions["watchdog"].partition(".")[0]) < 7


def test_lock_records_the_documented_index(bake: Bake) -> None:
    project = bake(project_slug="app")
    [index] = blocks((TEMPLATE / "docs" / "deploying.md").read_text(), "toml")
    # uv takes the URL with a slash for another index.
    mirror = index.replace(
        "https://pypi.example.com/simple", "https://pypi.org/simple/"
    )
    assert mirror != index
    with (project / "pyproject.toml").open("a") as file:
        file.write(f"\n{mirror}")
    run(PROGRAMS / "uv", "lock", cwd=project)
    packages = tomllib.loads((project / "uv.lock").read_text())["package"]
    registries = {package["source"].get("registry") for package in packages} - {None}
    assert registries == {"https://pypi.org/simple/"}
