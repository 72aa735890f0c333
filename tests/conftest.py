"""Fixtures that bake projects."""

import os
import shutil
from collections.abc import Iterator
from configparser import ConfigParser
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from pytest_cookies.plugin import Cookies

from .support.projects import (
    Bake,
    embedded_server,
    install,
    put_inside,
    remove_database,
)
from .support.repository import copy_template

collect_ignore = ["in_project"]  # These run inside a baked project.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, each before a short one.

    Each worker holds the next test while it runs one, so that must not be a long one.
    """

    def minutes(item: pytest.Item) -> int:
        marker = item.get_closest_marker("minutes")
        return marker.args[0] if marker else 0

    long = sorted(filter(minutes, items), key=minutes, reverse=True)
    short = [item for item in items if not minutes(item)]
    pairs = zip_longest(long, short)
    items[:] = [item for pair in pairs for item in pair if item]


@pytest.fixture(scope="session", autouse=True)
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Share mypy's cache between the projects, which saves each of them 7 s of CPU."""
    os.environ["MYPY_CACHE_DIR"] = str(tmp_path_factory.mktemp("mypy"))


@pytest.fixture(scope="session", autouse=True)
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Share the bytecode of packages, which saves most projects 1 s of CPU."""
    # Python replaces a file in one step, so that all workers can write there.
    os.environ["BYTECODE"] = str(tmp_path_factory.getbasetemp().parent / "bytecode")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the template to bake from."""
    return copy_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def render(cookies_session: Cookies, tmp_path_factory: pytest.TempPathFactory) -> Bake:
    """A function that bakes a project once per set of answers, without the hooks."""
    template = copy_template(tmp_path_factory.mktemp("template"))
    shutil.rmtree(template / "hooks")  # They would take half of the CPU time.
    projects: dict[str, Path] = {}

    def render(**answers: Any) -> Path:
        key = repr(sorted(answers.items()))
        if key not in projects:
            result = cookies_session.bake(answers, template=str(template))
            if result.exception:
                raise result.exception
            projects[key] = result.project_path
        return projects[key]

    return render


@pytest.fixture
def bake(render: Bake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bake]:
    """A function that bakes a project with the given answers and returns its folder."""
    projects = []

    def bake(**answers: Any) -> Path:
        original = render(**answers)
        project = tmp_path_factory.mktemp("project") / original.name
        projects.append(shutil.copytree(original, project))
        return project

    yield bake
    for project in projects:
        remove_database(project / "instance" / "postgres")


@pytest.fixture(scope="session")
def shared(render: Bake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The default project, installed, with the tests of tests/in_project.

    Tests that use it must not change its files.
    """
    project = tmp_path_factory.mktemp("shared") / "app"
    shutil.copytree(render(project_slug="app"), project)
    put_inside(project)
    install(project)
    yield project
    remove_database(project / "instance" / "postgres")


@pytest.fixture(scope="session")
def server_url(shared: Path) -> Iterator[str]:
    """The URL of a PostgreSQL, for projects that need none of their own."""
    with embedded_server(shared, "session") as url:
        yield url


@pytest.fixture(scope="session")
def superuser_url(shared: Path, server_url: str) -> str:
    """The URL of the same server for a superuser, as CI has it."""
    services = ConfigParser()
    services.read(shared.parent / "session" / "postgres" / "pg_service.conf")
    url = "postgresql://{user}:{password}@{host}:{port}/{dbname}"
    return url.format(**services["admin"])
