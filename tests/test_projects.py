"""Every pool with every worker, in an environment made from the project's own files."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from .conftest import (
    PROGRAMS,
    TEMPLATE,
    Answers,
    Bake,
    clean_environment,
    combinations,
    label,
    put_inside,
    remove_database,
    run,
)

# What an environment holds, by the names that it is imported and installed by.
NAMES = """
import importlib.metadata as metadata, json
names = set(metadata.packages_distributions())
names |= {distribution.name for distribution in metadata.distributions()}
print(json.dumps([name.lower().replace("-", "_") for name in names]))
"""


SERVE = """
import sys
from pathlib import Path
from flask_devserver import postgres
print(postgres.url(Path(sys.argv[1]), "mine"), flush=True)
sys.stdin.read()
"""

DATABASES = """
import psycopg2, sys
cursor = psycopg2.connect(sys.argv[1]).cursor()
cursor.execute("SELECT datname FROM pg_database ORDER BY datname")
print(cursor.fetchall())
"""


def install(project: Path, *options: str, **environ: str) -> Path:
    """Make the environment of the project from its own files; return its programs."""
    run(PROGRAMS / "uv", "sync", "--quiet", *options, cwd=project, **environ)
    return project / ".venv" / PROGRAMS.name


@pytest.mark.parametrize("answers", combinations("pool", "worker"), ids=label)
def test_project(bake: Bake, answers: Answers) -> None:
    project = bake(project_slug="app", **answers)
    programs = install(project)
    for command in (
        ["mypy"],
        ["pytest"],
        ["ruff", "check"],
        ["ruff", "format", "--check"],
    ):
        run(programs / command[0], *command[1:], cwd=project)
    assert slugs_that_would_hide(programs, project) == set()


def slugs_that_would_hide(programs: Path, project: Path) -> set[str]:
    """Return the slugs that are allowed, though something installed is called so."""
    names = set(json.loads(run(programs / "python", "-c", NAMES, cwd=project)))
    hook = (TEMPLATE / "hooks" / "pre_gen_project.py").read_text()
    taken = set(hook.split('set("""')[1].split('"""')[0].split())
    allowed = names - {"app"} - taken - sys.stdlib_module_names
    return {name for name in allowed if name[0].isalpha()}


def test_tests_leave_the_server_of_database_url_as_it_was(bake: Bake) -> None:
    project = bake(project_slug="app")
    programs = install(project)
    with embedded_server(project, programs) as url:
        before = databases(project, programs, url)
        tests = ["tests/test_db.py", "tests/test_notes.py", "tests/test_reload.py"]
        run(programs / "pytest", *tests, cwd=project, DATABASE_URL=url, RELOADS="2")
        assert databases(project, programs, url) == before
    assert not (project / "instance" / "postgres").exists()


@contextmanager
def embedded_server(project: Path, programs: Path) -> Iterator[str]:
    """Run a PostgreSQL for others to use, in a folder beside the project."""
    folder = project.parent / "server" / "postgres"
    with subprocess.Popen(
        [programs / "python", "-c", SERVE, folder],
        cwd=project,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
        process.communicate()
    remove_database(folder)


def databases(project: Path, programs: Path, url: str) -> str:
    """Return the names of the databases on the server."""
    return run(programs / "python", "-c", DATABASES, url, cwd=project)


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


def reachable_python(user: dict[str, str]) -> str:
    """Return a Python that the user can run: not one in the home of root."""
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        with suppress(PermissionError, subprocess.CalledProcessError):
            subprocess.run([python, "-c", "import ensurepip"], check=True, **user)
            return python
    pytest.fail("no Python that an ordinary user can run: install python3-venv")
