"""The bounds of a project's dependencies admit working versions only."""

import re
import tomllib
from pathlib import Path

import pytest

from ..support.answers import choices
from ..support.commands import PROGRAMS, TEMPLATE, run
from ..support.documents import blocks
from ..support.projects import Bake, install
from ..support.repository import replace

pytestmark = pytest.mark.slow


@pytest.mark.minutes(4)
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
    assert int(locked(project)["watchdog"].partition(".")[0]) < 7


@pytest.mark.parametrize("pool", ["psycopg2", "sqlalchemy"])
@pytest.mark.parametrize("worker", choices()["worker"])
def test_uv_sorts_the_dependencies(bake: Bake, pool: str, worker: str) -> None:
    project = bake(project_slug="app", pool=pool, worker=worker)
    run(PROGRAMS / "uv", "add", "--frozen", "humanize", cwd=project)
    text = (project / "pyproject.toml").read_text()
    added = tomllib.loads(text)["project"]["dependencies"]
    assert added[added.index("humanize") - 1].startswith("granian")


def test_urgent_fix_stays_in_the_lock(bake: Bake) -> None:
    project = bake(project_slug="app")
    settings, uv = project / "pyproject.toml", PROGRAMS / "uv"
    replace(settings, '"7 days"', '"2026-10-01"')
    run(uv, "lock", cwd=project)
    before = locked(project)
    text = (TEMPLATE / "docs" / "deploying.md").read_text().replace("NAME", "granian")
    [line] = re.findall(r"`(exclude-newer-package = .*?)`", text)
    [words] = re.findall(r"`uv (lock --upgrade-package granian)`", text)
    replace(settings, r"exclude-newer = .*?\n", rf"\g<0>{line}\n")
    run(uv, *words.split(), cwd=project)
    run(uv, "lock", "--check", cwd=project)
    after = locked(project)
    assert {name for name in after if after[name] != before[name]} == {"granian"}


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


@pytest.mark.parametrize("worker", choices()["worker"])
def test_only_procrastinate_installs_what_async_views_need(
    bake: Bake, worker: str
) -> None:
    # docs/updating.md says what to do when the worker changes.
    project = bake(project_slug="app", worker=worker)
    run(PROGRAMS / "uv", "lock", cwd=project)
    assert ("asgiref" in locked(project)) == (worker == "procrastinate")


def locked(project: Path) -> dict[str, str]:
    """Return the version of each package in `uv.lock`."""
    packages = tomllib.loads((project / "uv.lock").read_text())["package"]
    return {package["name"]: package["version"] for package in packages}
