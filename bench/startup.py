"""Measure the time from the start of the server to its first response.

granian serves every application with the settings of a project. In each round, the
applications start in random order. The bench makes the projects, their environment and
a PostgreSQL in a temporary folder, and prints a table in Markdown.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from random import sample
from urllib.request import urlopen

from reload import remove_databases
from throughput import START, database, environment, install

ROUNDS = int(os.environ.get("ROUNDS", "30"))
BARE = """

@app.get("/healthz")
def healthz():
    return {"status": "ok"}


def create_app():
    return app
"""
TURNS = {  # module, project and path of each application
    "bare Flask": ("app_none", "bare:create_app", "/healthz"),
    "pool none": ("app_none", "app_none:create_app", "/healthz"),
    "pool psycopg2": ("app_psycopg2", "app_psycopg2:create_app", "/healthz"),
    "the same, with its database": (
        "app_psycopg2",
        "app_psycopg2:create_app",
        "/readyz",
    ),
    "pool sqlalchemy": ("app_sqlalchemy", "app_sqlalchemy:create_app", "/healthz"),
}


def seconds_to_answer(granian: Path, project: Path, app: str, path: str) -> float:
    """Start the server in the project, and return the seconds until it responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [granian, "--interface", "wsgi", "--http", "1", "--workers", "2"]
    command += ["--blocking-threads", "8", "--factory", "--port", str(port), app]
    start = time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=project, **quiet)
    try:
        while time.monotonic() < start + 60:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}{path}"):
                return time.monotonic() - start
            time.sleep(0.002)
        sys.exit(f"{app} does not respond.")
    finally:
        process.terminate()
        process.wait()


def measure(folder: Path, programs: Path) -> dict[str, list[float]]:
    """Return the seconds of each application in every round after the first.

    The first round writes the bytecode.
    """
    found: dict[str, list[float]] = {name: [] for name in TURNS}
    for number in range(ROUNDS + 1):
        for name in sample(list(TURNS), len(TURNS)):
            project, app, path = TURNS[name]
            granian = programs / "granian"
            seconds = seconds_to_answer(granian, folder / project, app, path)
            found[name] += [seconds] if number else []
    return found


def main() -> None:
    """Measure, and remove the generated files."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended by SIGTERM."))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(remove_databases, folder)
        project = install(folder)
        (folder / "app_none" / "bare.py").write_text(START + BARE)
        dsn = stack.enter_context(database(project))
        for name in set(os.environ) - set(environment()):
            del os.environ[name]
        os.environ |= {
            "DATABASE_URL": dsn,
            "SECRET_KEY": "0123456789abcdef" * 2,
            "TRUSTED_HOSTS": "127.0.0.1",
        }
        programs = project / ".venv" / "bin"
        migrate = [programs / "flask", "--app", project.name, "migrate"]
        subprocess.run(migrate, cwd=project, check=True)
        found = measure(folder, programs)
    print("| | seconds, median | of bare Flask |")
    print("|---|---|---|")
    bare = statistics.median(found["bare Flask"])
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.2f} | {median / bare:.2f} |")


if __name__ == "__main__":
    main()
