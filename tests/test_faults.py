"""Every pool under load and through faults: tests/faults, run in a baked project."""

import shutil

import pytest

from .conftest import TEMPLATE, Bake, choices, run
from .test_projects import install

FILES = {
    "proxy.py": "proxy.py",
    "served.py": "served.py",
    "faults.py": "test_faults.py",
}


@pytest.mark.parametrize("pool", choices()["pool"])
def test_faults(bake: Bake, pool: str) -> None:
    project = bake(project_slug="app", pool=pool)
    for name, copy in FILES.items():
        shutil.copy(TEMPLATE / "tests" / "faults" / name, project / "tests" / copy)
    programs = install(project)
    print(run(programs / "pytest", "tests/test_faults.py", cwd=project))
