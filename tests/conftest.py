"""What the questions offer, and projects baked with the answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_cookies.plugin import Cookies

from .support.projects import Bake, remove_database
from .support.repository import copy_template

collect_ignore = ["in_project"]  # what is run within a baked project


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the template to bake from."""
    return copy_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def bake(cookies: Cookies, template: Path) -> Iterator[Bake]:
    """Bake a project with the answers given as keywords, and return its folder."""
    projects = []

    def bake(**answers: Any) -> Path:
        result = cookies.bake(extra_context=answers, template=str(template))
        if result.exception:
            raise result.exception
        projects.append(result.project_path)
        return projects[-1]

    yield bake
    for project in projects:
        remove_database(project / "instance" / "postgres")
