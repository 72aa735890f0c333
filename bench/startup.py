"""Measure the time from the start of the server to its first response.

    python bench/startup.py FOLDER

A project is served by `flask serve`, and bare Flask by granian with the same settings.
In each round, they start in random order. FOLDER keeps the environments for the next
run. Prints a table in Markdown.
"""

import os
import signal
import statistics
import subprocess
import time
from pathlib import Path
from random import sample

from serving import APPS, await_response, database, environment, free_port, prepare, run
from throughput import bare_flask

ROUNDS = int(os.environ.get("ROUNDS", "30"))
BARE_FLASK = "bare Flask"
TURNS = {  # the package, and the path that is requested
    BARE_FLASK: ("", "/items/42"),
    "pool none": ("app_none", "/healthz"),
    "pool psycopg2": ("app_psycopg2", "/healthz"),
    "pool psycopg2, with its database": ("app_psycopg2", "/readyz"),
    "pool sqlalchemy": ("app_sqlalchemy", "/healthz"),
    "pool sqlalchemy, with its database": ("app_sqlalchemy", "/readyz"),
}


def seconds_to_response(
    command: list[str | Path], cwd: Path, environ: dict[str, str], path: str
) -> float:
    """Start the server; return the seconds until its first response."""
    port = str(free_port())
    command = [str(part).replace("PORT", port) for part in command]
    options = {"cwd": cwd, "env": environ, "start_new_session": True}
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began = time.monotonic()
    with subprocess.Popen(command, **options) as process:
        try:
            await_response(process, f"http://127.0.0.1:{port}{path}", pause=0.002)
            return time.monotonic() - began
        finally:
            # A worker of granian that is still starting loses SIGTERM.
            os.killpg(process.pid, signal.SIGKILL)


def measure(folder: Path, programs: Path, dsn: str) -> dict[str, list[float]]:
    """Return the seconds of each in rounds, after one in which bytecode is written."""
    found: dict[str, list[float]] = {name: [] for name in TURNS}
    for number in range(ROUNDS + 1):
        for name in sample(list(TURNS), len(TURNS)):
            package, path = TURNS[name]
            command = ["flask", "--app", package, "serve", "--port", "PORT"]
            if name == BARE_FLASK:
                command = bare_flask(programs).command
            program, *options = command
            cwd = folder / package if package else APPS
            command = [programs / program, *options]
            seconds = seconds_to_response(command, cwd, environment(dsn), path)
            found[name] += [seconds] if number else []
    return found


def main() -> None:
    """Measure, and print a table of the medians."""
    project = prepare()
    programs = project / ".venv" / "bin"
    with database(project) as dsn:
        migrate = [programs / "flask", "--app", project.name, "migrate"]
        run(*migrate, cwd=project, **environment(dsn))
        found = measure(project.parent, programs, dsn)
    print("| | seconds, median | ratio to bare Flask |")
    print("|---|---|---|")
    bare = statistics.median(found[BARE_FLASK])
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.2f} | {median / bare:.2f} |")


if __name__ == "__main__":
    main()
