"""What the questions offer, and projects baked with the answers."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_cookies.plugin import Cookies

collect_ignore = ["in_project"]  # what is run within a baked project

TEMPLATE = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
QUESTIONS: dict[str, Any] = json.loads((TEMPLATE / "cookiecutter.json").read_text())

Answers = dict[str, Any]
Bake = Callable[..., Path]


def choices() -> dict[str, list[Any]]:
    """Return the questions with a fixed set of answers, and these answers."""
    fixed = {}
    for name, default in QUESTIONS.items():
        if isinstance(default, list) and not name.startswith("_"):
            fixed[name] = default
        elif isinstance(default, bool):
            fixed[name] = [True, False]
    return fixed


def combinations(*names: str) -> list[Answers]:
    """Return every combination of the answers to `names`, or to all the choices."""
    wanted = {name: choices()[name] for name in names} or choices()
    return [
        dict(zip(wanted, values, strict=True))
        for values in itertools.product(*wanted.values())
    ]


def label(value: object) -> str:
    """Name a test after its answers."""
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def clean_environment() -> dict[str, str]:
    """Return the environment without what this machine or the tests set for Python."""
    ours = ("PYTHON", "FLASK", "VIRTUAL_ENV", "DATABASE_URL", "SECRET_KEY", "PYTEST")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Run a command as a user would and return its output; fail with it if it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment() | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the template to bake from, without what it checks before it asks.

    For that hook Cookiecutter copies all of the template each time, and .venv with it.
    """
    folder = copy_template(tmp_path_factory.mktemp("template"))
    (folder / "hooks" / "pre_prompt.py").unlink()
    return folder


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


def copy_template(folder: Path) -> Path:
    """Copy what git does not ignore here, and nothing else, into the folder."""
    ignored = (TEMPLATE / ".gitignore").read_text().replace("/", "").split()
    ignore = shutil.ignore_patterns(".git", *ignored)
    return shutil.copytree(TEMPLATE, folder, ignore=ignore, dirs_exist_ok=True)


def put_inside(project: Path) -> None:
    """Put the tests of tests/in_project into the project."""
    inside = TEMPLATE / "tests" / "in_project"
    shutil.copytree(inside, project / "tests", dirs_exist_ok=True)


def remove_database(folder: Path) -> None:
    """Remove an embedded PostgreSQL, which as root is not where the folder is."""
    home = folder.resolve()
    wait_for(
        lambda: not (home / "data" / "postmaster.pid").exists(), "end of the server"
    )
    shutil.rmtree(home, ignore_errors=True)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Wait until `condition` is true and return it; fail when it does not come true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"no {what} in {seconds:g} s")
        time.sleep(0.05)
    return found
