"""Baked projects: their environments, files and servers."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from .commands import PROGRAMS, TEMPLATE, clean_environment, run, wait_for

Bake = Callable[..., Path]

DEVSERVER = TEMPLATE / "{{cookiecutter.project_slug}}" / "devserver"

SERVE = """
import sys
from pathlib import Path
from flask_devserver import postgres
print(postgres.ensure_database(Path(sys.argv[1]), "mine"), flush=True)
sys.stdin.read()
"""


def install(project: Path, *options: str, **environ: str) -> Path:
    """Install the project with the Python of the tests; return its `bin` folder."""
    sync = [PROGRAMS / "uv", "sync", "--quiet", *options]
    # Set only here: with UV_PYTHON set, `uv pip` would change the tests' environment.
    run(*sync, cwd=project, **{"UV_PYTHON": sys.executable} | environ)
    if not options and "BYTECODE" in os.environ:  # `make mutations` has no fixtures.
        share_bytecode(project / ".venv")
    return project / ".venv" / PROGRAMS.name


def share_bytecode(environment: Path) -> None:
    """Let Python use the bytecode of packages that it wrote for other projects."""
    for folder in {path.parent for path in environment.rglob("*.py")}:
        shared = Path(os.environ["BYTECODE"], folder.relative_to(environment))
        shared.mkdir(parents=True, exist_ok=True)
        if not (folder / "__pycache__").exists():
            (folder / "__pycache__").symlink_to(shared, target_is_directory=True)


def install_devserver(folder: Path, *packages: str | Path) -> Path:
    """Install `flask dev` and packages into a new environment; return its programs."""
    uv, environment = PROGRAMS / "uv", folder / "environment"
    run(uv, "venv", "--quiet", environment, cwd=folder)
    devserver = folder / "devserver"
    run("cp", "-r", DEVSERVER, devserver, cwd=folder)
    programs = environment / "bin"
    python = ["--python", programs / "python"]
    run(uv, "pip", "install", "--quiet", *python, devserver, *packages, cwd=folder)
    return programs


def put_inside(project: Path) -> None:
    """Copy tests/in_project into the tests of the project."""
    inside = TEMPLATE / "tests" / "in_project"
    shutil.copytree(inside, project / "tests", dirs_exist_ok=True)


def files(project: Path) -> list[Path]:
    return [path for path in project.rglob("*") if path.is_file()]


def contents(folder: Path) -> dict[str, str]:
    """Return the text of every file, except for those of git and cruft."""
    paths = {path.relative_to(folder).as_posix(): path for path in files(folder)}
    ours = {name for name in paths if not re.match(r"\.git/|\.cruft\.json", name)}
    return {name: paths[name].read_text() for name in ours}


def check_style(project: Path) -> None:
    """Check the style. Unlike in the project's own check, no line may be too long."""
    run(PROGRAMS / "ruff", "check", "--no-cache", "--extend-select=E501", cwd=project)
    run(PROGRAMS / "ruff", "format", "--check", "--no-cache", cwd=project)


@contextmanager
def embedded_server(project: Path, name: str = "server") -> Iterator[str]:
    """Run an embedded PostgreSQL in a folder beside the project, and yield its URL."""
    folder = project.parent / name / "postgres"
    with subprocess.Popen(
        [project / ".venv" / PROGRAMS.name / "python", "-c", SERVE, folder],
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


def remove_database(folder: Path) -> None:
    """Remove an embedded PostgreSQL. For root, `folder` is a link to its data."""
    home = folder.resolve()
    wait_for(
        lambda: not (home / "data" / "postmaster.pid").exists(), "end of the server"
    )
    shutil.rmtree(home, ignore_errors=True)


def reachable_python(user: dict[str, str]) -> str:
    """Return a Python that the user can run, so not one in the home of root."""
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        with suppress(PermissionError, subprocess.CalledProcessError):
            subprocess.run([python, "-c", "import ensurepip"], check=True, **user)
            return python
    pytest.fail("An ordinary user can run no Python here: install python3-venv.")
