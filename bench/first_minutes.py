"""From nothing to the first page, as a template's own README has one type it.

    python bench/first_minutes.py COOKIECUTTER_FLASK COOKIECUTTER_DJANGO

takes clones of the two, and runs each template twice: with empty package caches, and
with what that has filled. Prints a table in Markdown. A PostgreSQL runs before for
cookiecutter-django, which asks for one. It asks for one version of Python, too; where
that is missing, a copy of it is told to take another, which the table names.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
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
SERVER = """
import sys
from pathlib import Path
from devserver import postgres
print(postgres.url(Path("instance/postgres"), "my_awesome_project"), flush=True)
sys.stdin.read()
"""


class Way(NamedTuple):
    """The commands that are typed, of which the last one serves, and the first page.

    `database` is the DATABASE_URL that the template expects; `{}` in it is the folder.
    """

    commands: list[str]
    page: str
    database: str = ""


def ways(flask: str, django: str, database: str) -> dict[str, Way]:
    """Return what each template has one type; a change of folder is no command."""
    ours = [
        f"cookiecutter {TEMPLATE} --no-input",
        "cd my_flask_app; uv run flask dev --port 5731",
    ]
    theirs = [
        f"cookiecutter {flask} --no-input {FLASK_ANSWERS}",
        "cd app; python3 -m venv .venv",
        "cd app; . .venv/bin/activate; pip install -r requirements/dev.txt",
        "cd app; npm install",
        "cd app; . .venv/bin/activate; npm run-script build",
        "cd app; . .venv/bin/activate; flask db init",
        "cd app; . .venv/bin/activate; flask db migrate",
        "cd app; . .venv/bin/activate; flask db upgrade",
        "cd app; . .venv/bin/activate; flask run --port 5731",
    ]
    # `createdb` is done, and $DATABASE_URL set, by this bench.
    djangos = [
        f"cookiecutter {django} --no-input",
        "cd my_awesome_project; uv sync",
        "true createdb",
        "true export DATABASE_URL",
        "cd my_awesome_project; uv run python manage.py migrate",
        "cd my_awesome_project; uv run python manage.py runserver --noreload 5731",
    ]
    return {
        "this template": Way(ours, "notes"),
        "cookiecutter-flask": Way(theirs, "", "sqlite:///{}/dev.db"),
        "cookiecutter-django": Way(djangos, "accounts/login/", database),
    }


def seconds(way: Way, caches: Path) -> float:
    """Return how long it takes in a new folder until the page is answered."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environ |= {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "UV_CACHE_DIR": f"{caches}/uv",
        "PIP_CACHE_DIR": f"{caches}/pip",
        "npm_config_cache": f"{caches}/npm",
    }
    environ.pop("VIRTUAL_ENV", None)
    with tempfile.TemporaryDirectory() as folder:
        if way.database:
            environ["DATABASE_URL"] = way.database.format(folder)
        log = (Path(folder) / "log").open("w+")
        options = {"cwd": folder, "env": environ, "stdout": log, "stderr": log}
        began = time.perf_counter()
        try:
            for command in way.commands[:-1]:
                subprocess.run(["bash", "-ec", command], check=True, **options)
            serve = ["bash", "-ec", way.commands[-1]]
            server = subprocess.Popen(serve, start_new_session=True, **options)
            await_page(f"http://127.0.0.1:5731/{way.page}", server)
            took = time.perf_counter() - began
            os.killpg(server.pid, signal.SIGINT)
            server.wait(30)
        except BaseException:
            log.seek(0)
            print(log.read()[-3000:], file=sys.stderr)
            raise
        remove_databases(Path(folder))
    return took


def await_page(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the page is answered. Raises `RuntimeError` when it is not."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and server.poll() is None:
        with suppress(URLError, ConnectionError), urlopen(url, timeout=60):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{url} was not answered")


def with_python(django: str, folder: Path) -> tuple[str, str]:
    """Return a copy of cookiecutter-django for a Python that is here, and which."""
    for version in ("3.14", "3.13"):
        found = [PROGRAMS / "uv", "python", "find", "--no-python-downloads", version]
        if not subprocess.run(found, capture_output=True).returncode:
            break
    copy = folder / "cookiecutter-django"
    shutil.copytree(django, copy, ignore=shutil.ignore_patterns(".git"))
    [project] = copy.glob("{{*}}")
    for file in (project / "pyproject.toml", project / ".python-version"):
        if file.exists():
            file.write_text(file.read_text().replace("3.14", version))
    (project / "uv.lock").unlink(missing_ok=True)
    return str(copy), version


def main() -> None:
    flask, django = (str(Path(path).resolve()) for path in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cookiecutter = [PROGRAMS / "cookiecutter", TEMPLATE, "--no-input"]
        subprocess.run(cookiecutter, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        project = folder / "my_flask_app"
        subprocess.run([PROGRAMS / "uv", "sync", "-q"], cwd=project, check=True)
        django, version = with_python(django, folder)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        python = project / ".venv" / "bin" / "python"
        with subprocess.Popen([python, "-c", SERVER], cwd=project, **pipes) as server:
            url = server.stdout.readline().strip()
            print("| | commands | empty caches | warm |\n|---|---|---|---|")
            for way, typed in ways(flask, django, url).items():
                caches = folder / "caches" / way
                found = [seconds(typed, caches) for _ in range(2)]
                note = f" (Python {version})" if "django" in way else ""
                times = " | ".join(f"{each:.1f} s" for each in found)
                print(f"| {way}{note} | {len(typed.commands)} | {times} |", flush=True)
            server.communicate()
        remove_databases(folder)


if __name__ == "__main__":
    main()
