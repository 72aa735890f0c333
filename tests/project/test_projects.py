"""Every pool with every worker, in an environment made from the project's own files."""

import json
import os
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest

from ..support.answers import QUESTIONS, Answers, combinations, label
from ..support.commands import PROGRAMS, clean_environment, run
from ..support.projects import (
    Bake,
    check_style,
    install,
    put_inside,
    reachable_python,
)

PROJECTS = combinations("pool", "worker")
DEFAULT = PROJECTS[0]

# What an environment holds, by the names that it is imported and installed by.
NAMES = """
import importlib.metadata as metadata, json
names = set(metadata.packages_distributions())
names |= {distribution.name for distribution in metadata.distributions()}
print(json.dumps([name.lower().replace("-", "_") for name in names]))
"""


@pytest.fixture(scope="session")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder in which mypy finds what it knows of other projects' packages."""
    return str(tmp_path_factory.mktemp("mypy"))


@pytest.mark.parametrize("answers", PROJECTS, ids=label)
def test_project(bake: Bake, mypy_cache: str, answers: Answers) -> None:
    project = bake(project_slug="app", **answers)
    programs = install(project)
    run(programs / "mypy", cwd=project, MYPY_CACHE_DIR=mypy_cache)
    reloads = "20" if answers == DEFAULT else "5"
    tests = ["-m", ""] if has_reload_tests(answers) else []
    run(programs / "pytest", *tests, cwd=project, RELOADS=reloads)
    check_style(project)
    assert slugs_that_would_hide(programs, project) == set()


def has_reload_tests(answers: Answers) -> bool:
    """Return whether the reload tests run, too: once per pool and once per worker.

    With EVERY_RELOAD in the environment, as in the matrix of CI, they always run.
    """
    once = DEFAULT["pool"] == answers["pool"] or answers["worker"] == "none"
    return once or "EVERY_RELOAD" in os.environ


def slugs_that_would_hide(programs: Path, project: Path) -> set[str]:
    """Return the allowed slugs that an installed package has as its name.

    The lock file lists the packages for every Python and every system.
    """
    names = set(json.loads(run(programs / "python", "-c", NAMES, cwd=project)))
    locked = tomllib.loads((project / "uv.lock").read_text())["package"]
    names |= {package["name"].replace("-", "_") for package in locked}
    reserved = set(QUESTIONS["_reserved_names"].split())
    allowed = names - {"app"} - reserved
    return {name for name in allowed if name[0].isalpha()}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such users")
def test_project_of_an_ordinary_user(template: Path) -> None:
    """Where the tests above run as root, here somebody else has the project."""
    import pwd

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        cookiecutter = PROGRAMS / "cookiecutter"
        run(cookiecutter, template, "--no-input", "project_slug=app", cwd=Path(folder))
        project = Path(folder) / "app"
        put_inside(project)
        user = {"user": "nobody"} if os.geteuid() == 0 else {}
        python = reachable_python(user)
        programs = install(project, "--python", python, UV_LINK_MODE="copy")
        for path in (Path(folder), *Path(folder).rglob("*")) if user else ():
            os.chown(path, pwd.getpwnam("nobody").pw_uid, -1, follow_symlinks=False)
        done = subprocess.run(
            [programs / "python", "-m", "pytest", "tests/test_postgres.py"],
            cwd=project,
            env=clean_environment() | {"HOME": folder, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **user,
        )
        assert done.returncode == 0, done.stdout
