"""Measure the time to the first page with each template's documented commands.

    python bench/first_minutes.py COOKIECUTTER_FLASK COOKIECUTTER_DJANGO

takes clones of the two, and runs each template twice: first with empty package caches,
then with filled ones. It prints a table in Markdown. Cookiecutter, uv and Node must be
installed.

The page queries the database: the notes of this template, and the login page of
cookiecutter-django. cookiecutter-flask has no such page for a visitor, so the bench
waits for its home page, after the commands that create its tables.

cookiecutter-django needs a PostgreSQL, which runs before the measurement; each run gets
a new database. It also needs a certain version of Python. If uv does not find it, a
copy of the template uses the newest Python that uv finds, which the table names.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

from reload import PROGRAMS, TEMPLATE, remove_databases

DEADLINE = 600
FLASK_ANSWERS = (
    "full_name=Ann email=ann@example.com github_username=ann project_name=App"
    " app_name=app use_pipenv=False python_version=3 node_version=20 use_heroku=False"
)
# Versions of Python for cookiecutter-django. It requires the first one.
PYTHONS = ("3.14", "3.13", "3.12")
SERVER = """
import sys
from pathlib import Path
from flask_devserver import postgres
for name in sys.stdin:
    print(postgres.ensure_database(Path("instance/postgres"), name.strip()), flush=True)
"""


class Way(NamedTuple):
    """The documented commands, of which the last one is the server, and the first page.

    `database` returns the DATABASE_URL of a run in a folder if it must be set.
    """

    commands: list[str]
    page: str
    database: Callable[[Path], str] | None = None


def ways(
    template: Path, flask: str, django: str, server: subprocess.Popen[str]
) -> dict[str, Way]:
    """Return the documented commands of each template. `cd` does not count as one.

    Commands after `true` are steps of this bench. $FREE_PORT replaces the usual port.
    """
    ours = [
        f"cookiecutter {template} --no-input",
        "cd my_flask_app; uv run flask dev --port $FREE_PORT",
    ]
    # The documentation recommends a virtual environment without a command.
    theirs = [
        f"cookiecutter {flask} --no-input {FLASK_ANSWERS}",
        "cd app; python3 -m venv .venv",
        "cd app; . .venv/bin/activate; pip install -r requirements/dev.txt",
        "cd app; npm install",
        "cd app; . .venv/bin/activate; npm run-script build",
        "cd app; . .venv/bin/activate; flask db init",
        "cd app; . .venv/bin/activate; flask db migrate",
        "cd app; . .venv/bin/activate; flask db upgrade",
        "cd app; . .venv/bin/activate; FLASK_RUN_PORT=$FREE_PORT npm start",
    ]
    # DATABASE_URL replaces three variables. Without Celery, Redis is not needed.
    djangos = [
        f"cookiecutter {django} --no-input",
        "cd my_awesome_project; uv sync",
        "cd my_awesome_project; git init",
        "cd my_awesome_project; uv run pre-commit install",
        "true createdb",
        "true export POSTGRES_USER",
        "true export POSTGRES_PASSWORD",
        "true export POSTGRES_DB",
        "cd my_awesome_project; uv run python manage.py migrate",
        "cd my_awesome_project; uv run python manage.py runserver 0.0.0.0:$FREE_PORT",
    ]
    return {
        "this template": Way(ours, "notes"),
        "cookiecutter-flask": Way(theirs, "", lambda run: f"sqlite:///{run}/dev.db"),
        "cookiecutter-django": Way(
            djangos, "accounts/login/", lambda run: new_database(server, run.name)
        ),
    }


def new_database(server: subprocess.Popen[str], name: str) -> str:
    """Return the URL of a new database on the server of `SERVER`."""
    assert server.stdin and server.stdout
    server.stdin.write(f"{name}\n")
    server.stdin.flush()
    return server.stdout.readline().strip()


def seconds(way: Way, caches: Path) -> float:
    """Return the seconds from the first command to the first page, in a new folder."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(remove_databases, folder)
        log = stack.enter_context((folder / "log").open("w+"))
        environ = environment(way, folder, caches)
        options = {"cwd": folder, "env": environ, "stdout": log, "stderr": log}
        start = time.perf_counter()
        try:
            for command in way.commands[:-1]:
                subprocess.run(["bash", "-ec", command], check=True, **options)
            serve = ["bash", "-ec", way.commands[-1]]
            server = subprocess.Popen(serve, start_new_session=True, **options)
            stack.callback(end, server)
            await_page(f"http://127.0.0.1:{environ['FREE_PORT']}/{way.page}", server)
        except BaseException:
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
            raise
        return time.perf_counter() - start


def environment(way: Way, folder: Path, caches: Path) -> dict[str, str]:
    """Return the environment of a run, without settings of Python, Flask or Django."""
    ours = ("PYTHON", "FLASK", "DJANGO", "DATABASE_URL", "SECRET_KEY", "VIRTUAL_ENV")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environ |= {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "UV_CACHE_DIR": f"{caches}/uv",
        "PIP_CACHE_DIR": f"{caches}/pip",
        "npm_config_cache": f"{caches}/npm",
    }
    if way.database:
        environ["DATABASE_URL"] = way.database(folder)
    with socket.create_server(("127.0.0.1", 0)) as server:
        environ["FREE_PORT"] = str(server.getsockname()[1])
    return environ


def await_page(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the page responds. Raise `RuntimeError` if it does not."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and server.poll() is None:
        with suppress(URLError, ConnectionError), urlopen(url, timeout=60):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{url} was not answered")


def end(server: subprocess.Popen[bytes]) -> None:
    """Stop the process and all its children, which may outlive it for a moment."""
    deadline = time.monotonic() + 30
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            server.poll()
            os.killpg(server.pid, 0)
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def with_python(django: str, folder: Path) -> tuple[str, str]:
    """Return a copy of cookiecutter-django for an installed Python, and its version."""
    version = newest_python()
    copy = folder / "cookiecutter-django"
    shutil.copytree(django, copy, ignore=shutil.ignore_patterns(".git"))
    [project] = copy.glob("{{*}}")
    for name in ("pyproject.toml", "uv.lock", ".python-version"):
        file = project / name
        file.write_text(file.read_text().replace(PYTHONS[0], version))
    return str(copy), version


def newest_python() -> str:
    """Return the newest of the suitable versions of Python that uv finds."""
    for version in PYTHONS:
        found = [PROGRAMS / "uv", "python", "find", "--no-python-downloads", version]
        if not subprocess.run(found, capture_output=True).returncode:
            return version
    sys.exit(f"None of Python {', '.join(PYTHONS)} is installed: put one on the PATH.")


def clone(folder: Path) -> Path:
    """Return a clone of this template, without files that git ignores."""
    template = folder / "template"
    subprocess.run(["git", "clone", "--quiet", TEMPLATE, template], check=True)
    return template


def bake(folder: Path, template: Path) -> Path:
    """Return a project of this template, with its environment."""
    cookiecutter = [PROGRAMS / "cookiecutter", template, "--no-input"]
    subprocess.run(cookiecutter, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    project = folder / "my_flask_app"
    subprocess.run([PROGRAMS / "uv", "sync", "-q"], cwd=project, check=True)
    return project


def show(typed: dict[str, Way], caches: Path, version: str) -> None:
    """Run each way twice, and print a table."""
    print("| | commands | empty caches | warm |\n|---|---|---|---|")
    for name, way in typed.items():
        found = [seconds(way, caches / name) for _ in range(2)]
        note = f" (Python {version})" if "django" in name else ""
        times = " | ".join(f"{each:.1f} s" for each in found)
        print(f"| {name}{note} | {len(way.commands)} | {times} |", flush=True)


def main() -> None:
    """Measure every template, and remove the generated files."""
    if len(sys.argv) != 3:
        sys.exit("Two folders are needed: clones of cookiecutter-flask and -django.")
    flask, django = (str(Path(path).resolve()) for path in sys.argv[1:])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(remove_databases, folder)
        django, version = with_python(django, folder)
        template = clone(folder)
        project = bake(folder, template)
        command = [project / ".venv" / PROGRAMS.name / "python", "-c", SERVER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = subprocess.Popen(command, cwd=project, **pipes)
        stack.enter_context(server)
        show(ways(template, flask, django, server), folder / "caches", version)


if __name__ == "__main__":
    main()
