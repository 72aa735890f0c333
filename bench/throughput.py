"""Compare projects as deployed with others as their documentation deploys them.

    python bench/throughput.py FOLDER [COOKIECUTTER_FLASK]

Each application responds with a row of a table as JSON (`/items/42`) and with a page of
twenty rows as HTML (`/items`); bench/apps has them. In each round, they take turns in
random order, each alone. FOLDER keeps the environments for the next run. The second
argument is a clone of cookiecutter-flask. With FORMER, a commit of this template whose
projects ran on gunicorn, that is measured, too. Prints a table in Markdown and draws
docs/images/requests.svg.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from random import sample
from typing import NamedTuple
from urllib.request import urlopen

import chart
from first_minutes import FLASK_ANSWERS
from reload import PROGRAMS, TEMPLATE
from serving import (
    APPS,
    Load,
    bake,
    database,
    environment,
    install,
    load,
    prepare,
    run,
    served,
)

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS", "2"))  # of each application at each of LOADS
FORMER = os.environ.get("FORMER", "")
LOADS = [("/items/42", 16), ("/items/42", 64), ("/items", 64)]
PAGE = LOADS[-1]
BARE_FLASK = "bare Flask, no database, granian"
# On two cores, Flask's documentation says 4 workers, and gunicorn's 5. Django's gives
# no number.
SYNC = ["gunicorn", "--bind", "127.0.0.1:PORT", "--workers"]
PACKAGES = [
    "flask gunicorn psycopg[binary,pool] psycopg2-binary flask-sqlalchemy".split(),
    "django asyncpg fastapi[standard]".split(),
]


class Contender(NamedTuple):
    """The command that serves an application, and where it runs."""

    command: list[str]
    programs: Path
    cwd: Path
    environ: dict[str, str] = {}


def ours(programs: Path, folder: Path, pool: str) -> Contender:
    """Return a project of this template."""
    names = {"PACKAGE": f"app_{pool}", "DB_MODULE": f"app_{pool}.core.db"}
    command = ["flask", "--app", "project", "serve", "--port", "PORT"]
    return Contender(command, programs, folder / f"app_{pool}", names)


def bare_flask(programs: Path) -> Contender:
    """Return a Flask without a database on the same server as a project."""
    command = "granian --interface wsgi --http 1 --workers 2 --blocking-threads 8"
    command += " --backpressure 65536 --no-ws --port PORT bare_flask:app"
    return Contender(command.split(), programs, APPS)


def former(folder: Path) -> Contender:
    """Return the project of an earlier commit, installed."""
    project = folder / "app_former"
    if not project.exists():
        template = folder / "template"
        template.mkdir()
        archive = ["git", "-C", TEMPLATE, "archive", FORMER]
        files = subprocess.run(archive, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "--extract"], cwd=template, input=files, check=True)
        bake(folder, template, "project_slug=app_former")
        run(PROGRAMS / "uv", "sync", "--no-dev", cwd=project)
    names = {"PACKAGE": "app_former", "DB_MODULE": "app_former.db"}
    command = ["gunicorn", "--bind", "127.0.0.1:PORT", "project:app"]
    return Contender(command, project / ".venv" / "bin", project, names)


def cookiecutter_flask(clone: str, folder: Path) -> Contender:
    """Return a project of cookiecutter-flask, installed, without its front end."""
    project = folder / "app"
    programs = project / ".venv" / "bin"
    if not project.exists():
        bake(folder, clone, *FLASK_ANSWERS.split())
        (project / ".env").unlink()  # It is for development.
        # gunicorn's worker for gevent imports the second one.
        install(programs, "-r", "requirements/prod.txt", "packaging", cwd=project)
    command = ["gunicorn", "cookiecutter_flask:create_app()", "-b", "127.0.0.1:PORT"]
    command += ["-w", "4", "-k", "gevent", "--max-requests=5000"]
    command += ["--max-requests-jitter=500", "--log-level=info"]
    options = {"FLASK_ENV": "production", "SEND_FILE_MAX_AGE_DEFAULT": "31556926"}
    return Contender(command, programs, project, options)


def contenders(programs: Path, folder: Path, clone: str) -> dict[str, Contender]:
    """Return all applications, installed."""
    others = folder / "others" / "bin"
    if not others.exists():
        install(others, *sum(PACKAGES, []), cwd=folder)
        run(others / "django-admin", "startproject", "site_of_items", cwd=folder)
    settings = {"DJANGO_SETTINGS_MODULE": "django_settings"}
    uvicorn = "uvicorn fastapi_asyncpg:app --host 127.0.0.1 --port PORT --workers 4"
    found = {
        "this template, pool psycopg2": ours(programs, folder, "psycopg2"),
        "this template, pool sqlalchemy": ours(programs, folder, "sqlalchemy"),
        "this template, pool none": ours(programs, folder, "none"),
        BARE_FLASK: bare_flask(programs),
        "Flask, psycopg_pool, gunicorn": Contender(
            [*SYNC, "4", "flask_psycopg_pool:app"], others, APPS
        ),
        "Flask-SQLAlchemy (ORM), gunicorn": Contender(
            [*SYNC, "4", "flask_sqlalchemy_orm:app"], others, APPS
        ),
        "Django, its pool, gunicorn": Contender(
            [*SYNC, "5", "site_of_items.wsgi"],
            others,
            folder / "site_of_items",
            settings,
        ),
        "FastAPI, asyncpg, uvicorn": Contender(uvicorn.split(), others, APPS),
    }
    if FORMER:
        found["this template, version 0.1, gunicorn"] = former(folder)
    if clone:
        found["cookiecutter-flask, gunicorn"] = cookiecutter_flask(clone, folder)
    return found


def check(url: str) -> None:
    """Exit unless the application responds with the right rows."""
    with urlopen(f"{url}/items/42") as response:
        assert json.load(response) == {"id": 42, "name": "item 42"}
    with urlopen(f"{url}/items") as response:
        page = response.read().decode()
    assert page.count("<td>") == 40 and "<td>item 20</td>" in page


def measure(
    found: dict[str, Contender], dsn: str
) -> dict[tuple[str, tuple[str, int]], list[Load]]:
    """Return what clients got in rounds in which each application has a turn."""
    results = {(name, each): list[Load]() for name in found for each in LOADS}
    for _ in range(ROUNDS):
        for name in sample(list(found), len(found)):
            command, programs, cwd, environ = found[name]
            environ = environment(dsn) | {"PYTHONPATH": str(APPS)} | environ
            command = [str(programs / command[0]), *command[1:]]
            with served(command, cwd, environ, "/items/42") as url:
                check(url)
                load(url + PAGE[0], PAGE[1], 1)  # to get warm
                for path, clients in sample(LOADS, len(LOADS)):
                    result = load(url + path, clients, SECONDS)
                    results[name, (path, clients)].append(result)
    return results


def show(results: dict[tuple[str, tuple[str, int]], list[Load]]) -> None:
    """Print a table of the medians, and draw a picture of the page's."""
    rate = {
        key: statistics.median(each.rate for each in found)
        for key, found in results.items()
    }
    names = sorted({name for name, _ in results}, key=lambda name: -rate[name, PAGE])
    heads = [f"{path}, {clients} clients" for path, clients in LOADS]
    print("|", *(f"| {head} | of bare Flask | p99 " for head in heads), "| failed |")
    print("|---" * (3 * len(LOADS) + 2) + "|")
    for name in names:
        cells = [name]
        for each in LOADS:
            p99 = statistics.median(load.p99 for load in results[name, each])
            share = rate[name, each] / rate[BARE_FLASK, each]
            cells += [f"{rate[name, each]:,.0f}", f"{share:.0%}", f"{p99:,.0f} ms"]
        failed = sum(load.failed for each in LOADS for load in results[name, each])
        print("|", " | ".join([*cells, str(failed)]), "|")
    bars = {name: rate[name, PAGE] for name in names}
    title = "Pages of twenty rows per second, 64 clients"
    file = TEMPLATE / "docs" / "images" / "requests.svg"
    chart.draw(file, title, bars, "template,", "{:,.0f}")


def main() -> None:
    """Measure every application."""
    if not shutil.which("ab"):
        sys.exit("ab is missing: install it, with `apt install apache2-utils` say.")
    project = prepare()
    clone = str(Path(sys.argv[2]).resolve()) if len(sys.argv) > 2 else ""
    found = contenders(project / ".venv" / "bin", project.parent, clone)
    if not ROUNDS:
        return  # The environments are ready for a run.
    with database(project) as dsn:
        show(measure(found, dsn))


if __name__ == "__main__":
    main()
