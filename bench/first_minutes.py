"""From nothing to the first page, as a template's own documentation has one type it.

    python bench/first_minutes.py COOKIECUTTER_FLASK COOKIECUTTER_DJANGO

takes clones of the two, and runs each template twice: with empty package caches, and
with what that has filled. Prints a table in Markdown. Cookiecutter, uv, Node and the
clones are there before.

The page is one that asks the database: the notes of this template, and the login of
cookiecutter-django, which looks up the site. cookiecutter-flask has no such page for a
visitor: its home page is awaited, with the tables made before.

A PostgreSQL runs before for cookiecutter-django, which asks for one; each run has a new
database there. It asks for one version of Python, too; where uv finds none, a copy of
it is told to take the newest that uv finds, on PATH say, which the table names.
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
# Those that cookiecutter-django's Django runs on; the first is what it asks for.
PYTHONS = ("3.14", "3.13", "3.12")
SERVER = """
import sys
from pathlib import Path
from flask_devserver import postgres
for name in sys.stdin:
    print(postgres.ensure_database(Path("instance/postgres"), name.strip()), flush=True)
"""


class Way(NamedTuple):
    """The commands that are typed, of which the last one serves, and the first page.

    `database` returns the DATABASE_URL of a run in a folder, where one has to be set.
    """

    commands: list[str]
    page: str
    database: Callable[[Path], str] | None = None


def ways(
    template: Path, flask: str, django: str, server: subprocess.Popen[str]
) -> dict[str, Way]:
    """Return what each template has one type; a change of folder is no command.

    What stands after `true` is done by this bench. $FREE_PORT is not the usual port.
    """
    ours = [
        f"cookiecutter {template} --no-input",
        "cd my_flask_app; uv run flask dev --port $FREE_PORT",
    ]
    # A virtual environment is recommended there without the command.
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
    # DATABASE_URL stands for the three variables; Redis is for Celery, which is off.
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
    """Return the URL of a new database of the server that `SERVER` started."""
    assert server.stdin and server.stdout
    server.stdin.write(f"{name}\n")
    server.stdin.flush()
    return server.stdout.readline().strip()


def seconds(way: Way, caches: Path) -> float:
    """Return how long it takes in a new folder until the page is answered."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(remove_databases, folder)
        log = stack.enter_context((folder / "log").open("w+"))
        environ = environment(way, folder, caches)
        options = {"cwd": folder, "env": environ, "stdout": log, "stderr": log}
        began = time.perf_counter()
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
        return time.perf_counter() - began


def environment(way: Way, folder: Path, caches: Path) -> dict[str, str]:
    """Return the environment of a run, with nothing of Python, Flask or Django set."""
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
    """Wait until the page is answered. Raises `RuntimeError` when it is not."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and server.poll() is None:
        with suppress(URLError, ConnectionError), urlopen(url, timeout=60):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{url} was not answered")


def end(server: subprocess.Popen[bytes]) -> None:
    """End it with all that it has started, which may outlive it for a moment."""
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
    """Return a copy of cookiecutter-django for a Python that is here, and which."""
    version = newest_python()
    copy = folder / "cookiecutter-django"
    shutil.copytree(django, copy, ignore=shutil.ignore_patterns(".git"))
    [project] = copy.glob("{{*}}")
    for name in ("pyproject.toml", "uv.lock", ".python-version"):
        file = project / name
        file.write_text(file.read_text().replace(PYTHONS[0], version))
    return str(copy), version


def newest_python() -> str:
    """Return the version, of those in question, of the newest Python that uv finds."""
    for version in PYTHONS:
        found = [PROGRAMS / "uv", "python", "find", "--no-python-downloads", version]
        if not subprocess.run(found, capture_output=True).returncode:
            return version
    sys.exit(f"None of Python {', '.join(PYTHONS)} is here: put one on PATH.")


def clone(folder: Path) -> Path:
    """Return a clone of this template, without what is not under version control."""
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
    """Measure every template, and remove what that has made."""
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
