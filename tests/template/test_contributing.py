"""A new choice and a release work as CONTRIBUTING.md describes."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from ..support.answers import choices
from ..support.commands import PROGRAMS, TEMPLATE, clean_environment
from ..support.repository import copy_template, replace, start_repository

WORKERS = len(choices()["worker"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, value, tests, number",
    [
        ("license", "ISC", "test_license", 1),
        ("pool", "fourth", "test_combination and gitlab and True", WORKERS),
    ],
)
def test_new_choice_is_tested_without_further_changes(
    tmp_path: Path, name: str, value: str, tests: str, number: int
) -> None:
    copy = copy_template(tmp_path)
    replace(copy / "cookiecutter.json", rf'("{name}": \[[^]]*)\]', rf'\1, "{value}"]')
    start_repository(copy)
    command = ["tests/template/test_combinations.py", "-k", f"{tests} and {value}"]
    assert f"TemplateNotFound: '{name}/{value}." in run_tests(copy, *command)
    like = next((copy / "templates" / name).glob(f"{choices()[name][0]}.*"))
    shutil.copy(like, like.with_stem(value))
    assert f"= {number} passed" in run_tests(copy, *command)
    if name == "pool":
        assert "test_project[fourth-thread]" in run_tests(copy, "--collect-only")


def run_tests(copy: Path, *options: str) -> str:
    """Run tests of a copy of the template, and return the output of pytest."""
    return subprocess.run(
        [PROGRAMS / "pytest", "-n0", "--tb=line", *options],
        cwd=copy,
        env=clean_environment(),
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.parametrize("name", ["license", "pool"])
def test_every_variant_is_a_choice(name: str) -> None:
    variants = {path.stem for path in (TEMPLATE / "templates" / name).iterdir()}
    assert variants == set(choices()[name])


def test_changelog_starts_with_the_current_version() -> None:
    project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["project"]
    heading = re.search(r"^## \[(.+?)\]", (TEMPLATE / "CHANGELOG.md").read_text(), re.M)
    assert heading and heading[1] == project["version"]
