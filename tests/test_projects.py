"""Every pool with every worker: installed from its own files, typed, tested, reloaded."""

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import PROGRAMS, TEMPLATE, Answers, Bake, combinations, label, run

# What the environment of a project holds, by the names it is imported and installed by.
NAMES = """
import importlib.metadata as metadata, json
names = set(metadata.packages_distributions())
names |= {distribution.name for distribution in metadata.distributions()}
print(json.dumps([name.lower().replace("-", "_") for name in names]))
"""


def install(project: Path, *options: str) -> Path:
    """Make the environment of the project from its own files; return its programs."""
    run(PROGRAMS / "uv", "sync", "--quiet", *options, cwd=project)
    return project / ".venv" / PROGRAMS.name


@pytest.mark.parametrize("answers", combinations("pool", "worker"), ids=label)
def test_project(bake: Bake, answers: Answers) -> None:
    project = bake(project_slug="app", **answers)
    programs = install(project)
    run(programs / "mypy", cwd=project)
    run(programs / "pytest", cwd=project)
    run(programs / "ruff", "check", cwd=project)
    run(programs / "ruff", "format", "--check", cwd=project)
    assert_names_are_taken(programs, project)


def assert_names_are_taken(programs: Path, project: Path) -> None:
    """Fail when a project could be called like something in its own environment."""
    names = set(json.loads(run(programs / "python", "-c", NAMES, cwd=project))) - {"app"}
    hook = (TEMPLATE / "hooks" / "pre_gen_project.py").read_text()
    taken = hook.split('"""')[3].split()
    assert names - set(taken) - sys.stdlib_module_names == set()
