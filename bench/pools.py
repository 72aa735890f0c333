"""Compare ways to get a connection, each in a bare Flask on the server of a project.

    python bench/pools.py FOLDER

Every application responds with the same row of a table. In each round, they take turns
in random order, each alone. FOLDER keeps the environments for the next run, and
bench/throughput.py uses them, too. With SERVER=gunicorn in the environment, gunicorn
serves them with as many processes and threads. Prints a table in Markdown.
"""

import os
import statistics
from pathlib import Path
from random import sample

from serving import Load, database, environment, install, load, prepare, served

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS", "2"))  # of each application at each of CLIENTS
CLIENTS = (16, 64)
PATH = "/items/42"
PACKAGES = ["psycopg[binary,pool]", "flask-sqlalchemy", "gunicorn"]
SERVERS = {  # PORT stands for a free port.
    "granian": "granian --interface wsgi --http 1 --no-ws --port PORT "
    "--workers 2 --blocking-threads 8 --backpressure 65536",
    "gunicorn": "gunicorn --bind 127.0.0.1:PORT --workers 2 --threads 8",
}
SERVER = SERVERS[os.environ.get("SERVER", "granian")].split()

START = """
import os
from flask import Flask
URL = os.environ["DATABASE_URL"]
app = Flask(__name__)


def select(conn, number):
    with conn.cursor() as cursor:
        cursor.execute("SELECT id, name FROM items WHERE id = %s", [number])
        number, name = cursor.fetchone()
    return {"id": number, "name": name}
"""
BARE = """
@app.get("/items/<int:number>")
def item(number):
    return {"id": number, "name": f"item {number}"}
"""
CONNECT = """
from contextlib import closing
import psycopg2


@app.get("/items/<int:number>")
def item(number):
    with closing(psycopg2.connect(URL)) as conn:
        conn.autocommit = True
        return select(conn, number)
"""
THREADED = """
from psycopg2.pool import ThreadedConnectionPool
pool = ThreadedConnectionPool(8, 8, URL)


@app.get("/items/<int:number>")
def item(number):
    conn = pool.getconn()
    conn.autocommit = True
    try:
        return select(conn, number)
    finally:
        pool.putconn(conn)
"""
# The pool of a project in a bare application, as the others have theirs.
BAKED = """
from PACKAGE.core import config, db, pool
config.init_app(app, {}, db.SETTINGS, pool.SETTINGS)
app.secret_key = None  # Otherwise Flask derives a key for each request.
db.init_app(app)
pool.init_app(app)


@app.get("/items/<int:number>")
def item(number):
    return select(db.get_db(), number)
"""
# A whole project, with its log and its headers.
PROJECT = """
from PACKAGE import create_app
from PACKAGE.core.db import get_db
app = create_app()


@app.get("/items/<int:number>")
def item(number):
    return select(get_db(), number)
"""
# Its connections prepare what they run for the sixth time, unless PREPARE is None.
PSYCOPG3 = """
from psycopg_pool import ConnectionPool
options = {"autocommit": True, "prepare_threshold": PREPARE}
pool = ConnectionPool(URL, min_size=8, max_size=8, open=True, kwargs=options)


@app.get("/items/<int:number>")
def item(number):
    with pool.connection() as conn:
        return select(conn, number)
"""
ORM = """
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
app.config["SQLALCHEMY_DATABASE_URI"] = URL
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 8, "max_overflow": 0}


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(app, model_class=Base)


class Item(db.Model):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@app.get("/items/<int:number>")
def item(number):
    found = db.session.get(Item, number)
    return {"id": found.id, "name": found.name}
"""

BARE_FLASK = "bare Flask, without a database"
APPLICATIONS = {
    BARE_FLASK: BARE,
    "one connection per request": CONNECT,
    "psycopg2's pool, used plainly": THREADED,
    "this template, pool none": BAKED.replace("PACKAGE", "app_none"),
    "this template, pool psycopg2": BAKED.replace("PACKAGE", "app_psycopg2"),
    "this template, pool sqlalchemy": BAKED.replace("PACKAGE", "app_sqlalchemy"),
    "a whole project, pool psycopg2": PROJECT.replace("PACKAGE", "app_psycopg2"),
    "psycopg 3 and its pool": PSYCOPG3.replace("PREPARE", "5"),
    "psycopg 3 and its pool, unprepared": PSYCOPG3.replace("PREPARE", "None"),
    "Flask-SQLAlchemy, ORM": ORM,
}
Results = dict[tuple[str, int], list[Load]]  # by name and number of clients


def write_modules(folder: Path) -> dict[str, str]:
    """Write the applications into the folder; return their modules by name."""
    folder.mkdir(exist_ok=True)
    modules = {}
    for number, (name, text) in enumerate(APPLICATIONS.items()):
        modules[name] = f"served_{number}"
        (folder / f"served_{number}.py").write_text(START + text)
    return modules


def with_projects(project: Path, dsn: str) -> dict[str, str]:
    """Return an environment in which the packages of all projects are found."""
    packages = [project.parent / f"app_{each}" for each in ("none", "psycopg2")]
    return environment(dsn) | {"PYTHONPATH": ":".join(map(str, packages))}


def measure(project: Path, dsn: str) -> Results:
    """Return what clients got in rounds in which each application has a turn."""
    folder = project.parent / "served"
    modules = write_modules(folder)
    environ = with_projects(project, dsn)
    command = [project / ".venv" / "bin" / SERVER[0], *SERVER[1:]]
    results: Results = {(name, count): [] for name in modules for count in CLIENTS}
    for _ in range(ROUNDS):
        for name in sample(list(modules), len(modules)):
            app = f"{modules[name]}:app"
            with served([*command, app], folder, environ, PATH) as url:
                load(url + PATH, max(CLIENTS), 1)  # to get warm
                for count in sample(CLIENTS, len(CLIENTS)):
                    results[name, count].append(load(url + PATH, count, SECONDS))
    return results


def show(results: Results) -> None:
    """Print a table of the medians."""
    rate = {
        key: statistics.median(each.rate for each in found)
        for key, found in results.items()
    }
    few, many = CLIENTS
    print(f"| | requests/s, {few} clients | of bare Flask | ", end="")
    print(f"requests/s, {many} clients | of bare Flask | p99, {many} clients |")
    print("|---|---|---|---|---|---|")
    for name in APPLICATIONS:
        cells = [name]
        for n in CLIENTS:
            share = rate[name, n] / rate[BARE_FLASK, n]
            cells += [f"{rate[name, n]:,.0f}", f"{share:.0%}"]
        p99 = statistics.median(each.p99 for each in results[name, many])
        print("|", " | ".join([*cells, f"{p99:,.1f} ms"]), "|")


def main() -> None:
    """Measure every application."""
    project = prepare()
    install(project / ".venv" / "bin", *PACKAGES, cwd=project)
    with database(project) as dsn:
        show(measure(project, dsn))


if __name__ == "__main__":
    main()
