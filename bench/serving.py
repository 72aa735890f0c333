"""Bake projects, run their PostgreSQL, serve applications and load them."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from reload import PROGRAMS, TEMPLATE, remove_databases

APPS = Path(__file__).with_name("apps")

DATABASE = """
import sys
from contextlib import closing
from pathlib import Path
import psycopg2
from flask_devserver import postgres
url = postgres.ensure_database(Path(sys.argv[1]), "bench")
with closing(psycopg2.connect(url)) as conn, conn, conn.cursor() as cursor:
    cursor.execute('''
        DROP TABLE IF EXISTS items;
        CREATE TABLE items (id integer PRIMARY KEY, name text NOT NULL);
        INSERT INTO items SELECT n, 'item ' || n FROM generate_series(1, 100) AS n;
        ANALYZE items
    ''')
print(url, flush=True)
sys.stdin.read()
"""

Command = Sequence[str | Path]


class Load(NamedTuple):
    """Requests per second, the 99th percentile in milliseconds, failed requests."""

    rate: float
    p99: float
    failed: int


def environment(dsn: str = "") -> dict[str, str]:
    """Return the environment without settings that would change an application.

    With `dsn` it has the settings that a project requires in production.
    """
    ours = ("PYTHON", "FLASK", "DATABASE_URL", "SECRET_KEY", "POOL", "PG", "GRANIAN")
    ours += ("WEB_CONCURRENCY", "PORT", "VIRTUAL_ENV")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    if dsn:
        environ |= {
            "DATABASE_URL": dsn,
            "FLASK_SKIP_DOTENV": "1",
            "SECRET_KEY": "0123456789abcdef" * 2,
            "TRUSTED_HOSTS": "127.0.0.1",
        }
    return environ


def run(*command: str | Path, cwd: Path, **environ: str) -> None:
    """Run a command, without its output unless it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment() | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout}")


def bake(folder: Path, template: Path | str, *answers: str) -> None:
    """Bake a template into the folder, without questions."""
    command = [PROGRAMS / "cookiecutter", template, "--no-input", *answers]
    with tempfile.TemporaryDirectory() as temporary:  # Cookiecutter leaves files there.
        run(*command, cwd=folder, TMPDIR=temporary)


def prepare() -> Path:
    """Bake a project per pool in the folder that the command names.

    Return the one with SQLAlchemy, in whose environment all of them run. The folder
    keeps the environment.
    """
    if len(sys.argv) < 2:
        sys.exit("Name a folder for the environments.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped by SIGTERM."))
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(exist_ok=True)
    project = folder / "app_sqlalchemy"
    for pool in ("psycopg2", "sqlalchemy", "none"):
        for path in (folder / f"app_{pool}").glob("*"):  # from a former template
            if path.name != ".venv":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        answers = f"project_slug=app_{pool}", f"pool={pool}"
        bake(folder, TEMPLATE, "--overwrite-if-exists", *answers)
    run(PROGRAMS / "uv", "sync", "--inexact", cwd=project)
    return project


def install(programs: Path, *packages: str, cwd: Path) -> None:
    """Install packages into the environment that has these programs."""
    uv, python = PROGRAMS / "uv", programs / "python"
    if not python.exists():
        run(uv, "venv", "--python", sys.executable, programs.parent, cwd=cwd)
    run(uv, "pip", "install", "--python", python, *packages, cwd=cwd)


@contextmanager
def database(project: Path) -> Iterator[str]:
    """Run an installed project's PostgreSQL, with the table of items; yield its URL."""
    python = project / ".venv" / "bin" / "python"
    command = [python, "-c", DATABASE, project / "instance" / "postgres"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options = {"cwd": project, "env": environment(), "start_new_session": True}
    try:
        with subprocess.Popen(command, **pipes, **options) as process:
            # It runs until its standard input is closed.
            if not (url := process.stdout.readline().strip()):
                sys.exit("The embedded PostgreSQL did not start.")
            yield url
    finally:
        remove_databases(project.parent)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def served(
    command: Command, cwd: Path, environ: Mapping[str, str], path: str
) -> Iterator[str]:
    """Run a server; yield its URL once it responds to `path`.

    PORT in `command` is a free port. If anything fails, print the server's output.
    """
    port = str(free_port())
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(part).replace("PORT", port) for part in command],
            cwd=cwd,
            env=environ,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            await_response(process, url + path)
            yield url
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-5000:])
            raise
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def await_response(
    process: subprocess.Popen[bytes], url: str, pause: float = 0.05
) -> bytes:
    """Request `url` until it responds with 200, for at most 30 s; return the body."""
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError, HTTPException), urlopen(url, timeout=30) as response:
            body: bytes = response.read()
            return body
        time.sleep(pause)
    raise RuntimeError(f"{url} does not respond.")


def await_port(port: int) -> None:
    """Wait until something listens on the port, for at most 30 s."""
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


def load(url: str, clients: int, seconds: int) -> Load:
    """Let `clients` request `url` for some seconds, each on a new connection.

    A proxy such as nginx does the same by default. Connections that are kept alive may
    all be accepted by one of the workers, which halves the throughput at random.
    """
    with tempfile.NamedTemporaryFile("r") as file:
        command = ["ab", "-q", "-r", "-c", str(clients), "-t", str(seconds)]
        command += ["-n", str(100_000 * seconds), "-e", file.name, url]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        percentiles = dict(re.findall(r"^(\d+),([\d.]+)$", file.read(), re.M))
    found = dict(re.findall(r"^([\w -]+): +([\d.]+)", done.stdout, re.M))
    if done.returncode:
        sys.exit(f"ab failed at {clients} clients of {url}:\n{done.stdout}")
    failed = [found.get(name, 0) for name in ("Failed requests", "Non-2xx responses")]
    rate, p99 = float(found["Requests per second"]), float(percentiles["99"])
    return Load(rate, p99, sum(map(int, failed)))
