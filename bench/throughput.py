"""Measure requests per second and latency of the template's pools and of other ways.

Every application responds with a row of a small table, found by its key. granian serves
it with 2 workers of 8 threads, as `flask serve` does. In each round, the applications
run one after the other in random order: together they would need more connections than
the server has. The bench makes the projects, their environment and a PostgreSQL in a
temporary folder. It prints a table in Markdown and draws docs/images/requests.svg.
"""

import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import sample
from typing import NamedTuple
from urllib.request import urlopen

import chart
from reload import PROGRAMS, TEMPLATE, remove_databases

ROUNDS = int(os.environ.get("ROUNDS", "10"))
SECONDS = int(os.environ.get("SECONDS", "3"))  # of each application at each of CLIENTS
CLIENTS = (16, 64)
ITEM = {"id": 42, "name": "item 42"}
POOLS = ("none", "psycopg2", "sqlalchemy")
OTHERS = [
    "psycopg[binary]",
    "psycopg_pool",
    "flask-sqlalchemy",
    "flask-sqlalchemy-lite",
]

DATABASE = """
import sys
from contextlib import closing
from pathlib import Path
import psycopg2
from flask_devserver import postgres
url = postgres.ensure_database(Path(sys.argv[1]), "bench")
with closing(psycopg2.connect(url)) as conn, conn, conn.cursor() as cursor:
    cursor.execute('''
        CREATE TABLE items (id integer PRIMARY KEY, name text NOT NULL);
        INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 100) AS n;
        ANALYZE items
    ''')
print(url, flush=True)
sys.stdin.read()
"""

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
# The pool of a project in a bare application.
BAKED = """
from PACKAGE.core import config, db, pool
config.init_app(app, {}, db.SETTINGS, pool.SETTINGS)
db.init_app(app)
pool.init_app(app)


@app.get("/items/<int:number>")
def item(number):
    return select(db.get_db(), number)
"""
# A whole project, with its log lines and its headers.
PROJECT = """
from PACKAGE import create_app
from PACKAGE.core.db import get_db
app = create_app()


@app.get("/items/<int:number>")
def item(number):
    return select(get_db(), number)
"""
PSYCOPG3 = """
from psycopg_pool import ConnectionPool
autocommit = {"autocommit": True}
pool = ConnectionPool(URL, min_size=8, max_size=8, open=True, kwargs=autocommit)


@app.get("/items/<int:number>")
def item(number):
    with pool.connection() as conn:
        return select(conn, number)
"""
ORM = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
URL = URL.replace("postgresql:", "postgresql+psycopg2:")
pool = {"pool_size": 8, "max_overflow": 0}
app.config["SQLALCHEMY_DATABASE_URI"] = URL
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = pool
app.config["SQLALCHEMY_ENGINES"] = {"default": {"url": URL, **pool}}


class Base(DeclarativeBase):
    pass


SETUP


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@app.get("/items/<int:number>")
def item(number):
    found = db.session.get(Item, number)
    return {"id": found.id, "name": found.name}
"""
FULL = """from flask_sqlalchemy import SQLAlchemy
db = SQLAlchemy(app, model_class=Base)
Base = db.Model"""
LITE = """from flask_sqlalchemy_lite import SQLAlchemy
db = SQLAlchemy(app)"""

BARE_FLASK = "bare Flask, without a database"
APPLICATIONS = {
    BARE_FLASK: BARE,
    "one connection per request": CONNECT,
    "psycopg2's pool, used plainly": THREADED,
    "this template, pool none": BAKED.replace("PACKAGE", "app_none"),
    "this template, pool psycopg2": BAKED.replace("PACKAGE", "app_psycopg2"),
    "this template, pool sqlalchemy": BAKED.replace("PACKAGE", "app_sqlalchemy"),
    "this template, psycopg2, with its log": PROJECT.replace("PACKAGE", "app_psycopg2"),
    "psycopg 3 and its pool": PSYCOPG3,
    "Flask-SQLAlchemy, ORM": ORM.replace("SETUP", FULL),
    "Flask-SQLAlchemy-Lite, ORM": ORM.replace("SETUP", LITE),
}


class Found(NamedTuple):
    """A result: requests per second, and the 99th percentile in milliseconds."""

    rate: float
    p99: float


Results = dict[tuple[str, int], list[Found]]  # by name and number of clients


def environment() -> dict[str, str]:
    """Return the environment without settings that would change the applications."""
    ours = ("PYTHON", "FLASK", "DATABASE_URL", "SECRET_KEY", "POOL", "PG", "GRANIAN")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def install(folder: Path) -> Path:
    """Bake and install a project per pool; return the one with all packages."""
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    quiet["env"] = environment() | {"TMPDIR": str(folder)}  # The hooks write to it.
    bake = [PROGRAMS / "cookiecutter", TEMPLATE, "--no-input", "--output-dir", folder]
    for pool in POOLS:
        answers = [f"project_slug=app_{pool}", f"pool={pool}", "worker=none"]
        subprocess.run([*bake, *answers], **quiet)
    uv, project = PROGRAMS / "uv", folder / "app_sqlalchemy"
    subprocess.run([uv, "sync", "--quiet"], cwd=project, **quiet)
    python = project / ".venv" / "bin" / "python"
    add = [uv, "pip", "install", "--quiet", "--python", python, *OTHERS]
    subprocess.run(add, **quiet)
    return project


def write_modules(folder: Path) -> dict[str, str]:
    """Write the modules of all applications, and return their names."""
    (folder / "served").mkdir()
    for pool in POOLS:
        package = f"app_{pool}"
        shutil.copytree(folder / package / package, folder / "served" / package)
    modules = {}
    for number, (name, text) in enumerate(APPLICATIONS.items()):
        modules[name] = f"served_{number}"
        (folder / "served" / f"served_{number}.py").write_text(START + text)
    return modules


@contextmanager
def database(project: Path) -> Iterator[str]:
    """Run the PostgreSQL of the project with the table, and yield its URL."""
    python = project / ".venv" / "bin" / "python"
    with subprocess.Popen(
        [python, "-c", DATABASE, project / "instance" / "postgres"],
        cwd=project,
        env=environment(),
        stdin=subprocess.PIPE,  # The server runs until this is closed.
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as process:
        assert process.stdout
        if not (url := process.stdout.readline().strip()):
            sys.exit("The embedded PostgreSQL did not start.")
        yield url


@contextmanager
def served(granian: Path, folder: Path, module: str, dsn: str) -> Iterator[str]:
    """Serve the module of the folder, and yield the URL of an item.

    Print the log if the measurement fails.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [granian, "--interface", "wsgi", "--http", "1", "--workers", "2"]
    command += ["--blocking-threads", "8", "--backpressure", "65536", "--no-ws"]
    command += ["--port", str(port), f"{module}:app"]
    environ = environment() | {
        "DATABASE_URL": dsn,
        "SECRET_KEY": "0123456789abcdef" * 2,
        "TRUSTED_HOSTS": "127.0.0.1",
    }
    environ["POOL_SIZE"] = "8"
    log = folder / f"{module}.log"
    with log.open("w") as output:
        streams = {"stdout": output, "stderr": output}
        process = subprocess.Popen(
            command, cwd=folder, env=environ, start_new_session=True, **streams
        )
    try:
        await_port(port)
        url = f"http://127.0.0.1:{port}/items/{ITEM['id']}"
        with urlopen(url, timeout=30) as answer:
            assert json.load(answer) == ITEM
        yield url
    except BaseException:
        sys.stderr.write(log.read_text())
        raise
    finally:
        process.terminate()
        process.wait()


def await_port(port: int) -> None:
    """Wait at most 30 s until a server listens on the port."""
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


def load(url: str, clients: int, seconds: int) -> Found:
    """Send requests for this many seconds, each on a new connection.

    Connections that are kept alive sometimes all go to one of the two workers, which
    halves the result. ab reports percentiles of measured values only, unlike wrk. A
    failed request stops the bench.
    """
    with tempfile.NamedTemporaryFile("r") as file:
        command = ["ab", "-q", "-c", str(clients), "-t", str(seconds)]
        command += ["-n", str(100_000 * seconds), "-e", file.name, url]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        percentiles = dict(re.findall(r"^(\d+),([\d.]+)$", file.read(), re.M))
    said = dict(re.findall(r"^([\w -]+): +([\d.]+)", done.stdout, re.M))
    failed = [said.get(name, "0") for name in ("Failed requests", "Non-2xx responses")]
    if done.returncode or failed != ["0", "0"]:
        sys.exit(f"Requests failed at {clients} clients of {url}:\n{done.stdout}")
    return Found(float(said["Requests per second"]), float(percentiles["99"]))


def measure(folder: Path, project: Path, dsn: str) -> Results:
    """Return the results of each application in every round."""
    modules = write_modules(folder)
    granian = project / ".venv" / "bin" / "granian"
    results: Results = {(name, count): [] for name in modules for count in CLIENTS}
    for _ in range(ROUNDS):
        for name in sample(list(modules), len(modules)):
            with served(granian, folder / "served", modules[name], dsn) as url:
                load(url, max(CLIENTS), 1)  # This warms up.
                for count in sample(CLIENTS, len(CLIENTS)):
                    results[name, count].append(load(url, count, SECONDS))
    return results


def show(results: Results) -> None:
    """Print a table of the medians, and draw a picture of the shares."""
    rate = {
        key: statistics.median(each.rate for each in found)
        for key, found in results.items()
    }
    share = {(name, n): rate[name, n] / rate[BARE_FLASK, n] for name, n in rate}
    few, many = CLIENTS
    print(f"| | requests/s, {few} clients | of bare Flask | ", end="")
    print(f"requests/s, {many} clients | of bare Flask | p99, {many} clients |")
    print("|---|---|---|---|---|---|")
    for name in APPLICATIONS:
        cells = [name]
        for n in CLIENTS:
            cells += [f"{rate[name, n]:,.0f}", f"{share[name, n]:.0%}"]
        p99 = statistics.median(each.p99 for each in results[name, many])
        print("|", " | ".join([*cells, f"{p99:,.1f} ms"]), "|")
    bars = {name: share[name, few] for name in APPLICATIONS}
    title = f"Requests per second with {few} clients, of bare Flask's"
    chart.draw(TEMPLATE / "docs" / "images" / "requests.svg", title, bars, "template")


def main() -> None:
    """Measure every application, and remove the generated files."""
    if not shutil.which("ab"):
        sys.exit("ab is missing: install it, such as with `apt install apache2-utils`.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended by SIGTERM."))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(remove_databases, folder)
        project = install(folder)
        url = stack.enter_context(database(project))
        show(measure(folder, project, url))


if __name__ == "__main__":
    main()
