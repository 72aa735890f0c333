"""The tests of a project pass for every pool with every worker."""

import json
import os
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest

from ..support.answers import QUESTIONS, Answers, choices, combinations, label
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

# Print the names of the modules and the distributions in an environment.
NAMES = """
import importlib.metadata as metadata, json
names = {distribution.name for distribution in metadata.distributions()}
# Folders of stubs, which Python 3.13 lists, have a hyphen: no module can be named so.
names |= {name for name in metadata.packages_distributions() if name.isidentifier()}
print(json.dumps([name.lower().replace("-", "_") for name in names]))
"""


@pytest.mark.minutes(6)
@pytest.mark.parametrize("answers", PROJECTS, ids=label)
def test_project(
    bake: Bake, server_url: str, superuser_url: str, answers: Answers
) -> None:
    project = bake(project_slug="app", **answers)
    programs = install(project)
    check_types(programs, project, answers)
    # The matrix of CI sets EVERY_RELOAD.
    has_reload_tests = is_in_turn(answers) or "EVERY_RELOAD" in os.environ
    tests = ["-m", ""] if has_reload_tests else []
    # The tests may run behind a proxy, which cannot reach their servers.
    environ = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "RELOADS": "20"}
    if answers != DEFAULT:
        # CI has a superuser. A role of a developer usually is none.
        is_like_ci = answers["pool"] == DEFAULT["pool"]
        url = superuser_url if is_like_ci else server_url
        environ |= {"DATABASE_URL": url, "RELOADS": "5"}
    run(programs / "pytest", *tests, cwd=project, **environ)
    check_style(project)
    assert slugs_hidden_by_packages(programs, project) == set()


def check_types(programs: Path, project: Path, answers: Answers) -> None:
    """Check the types; for other systems, once per worker, with each pool in turn."""
    run(programs / "mypy", cwd=project)
    if is_in_turn(answers):
        for system in ("darwin", "win32"):
            # mypy writes its cache again for each system.
            cache = os.environ["MYPY_CACHE_DIR"] + system
            run(
                programs / "mypy",
                "--platform",
                system,
                "--cache-dir",
                cache,
                cwd=project,
            )


def is_in_turn(answers: Answers) -> bool:
    """Return whether these are the answers for a check once per worker."""
    pools = choices()["pool"]
    number = choices()["worker"].index(answers["worker"])
    return bool(answers["pool"] == pools[number % len(pools)])


def slugs_hidden_by_packages(programs: Path, project: Path) -> set[str]:
    """Return the allowed slugs that are the name of an installed package.

    The lock file lists the packages for every Python and every system.
    """
    names = set(json.loads(run(programs / "python", "-c", NAMES, cwd=project)))
    locked = tomllib.loads((project / "uv.lock").read_text())["package"]
    names |= {package["name"].replace("-", "_") for package in locked}
    reserved = set(QUESTIONS["_reserved_names"].split())
    allowed = names - {"app"} - reserved
    return {name for name in allowed if name[0].isalpha()}


@pytest.mark.minutes(5)
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot switch users")
def test_project_of_an_ordinary_user(template: Path) -> None:
    """The project also works for an ordinary user when root runs the tests."""
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
