"""From the start of gunicorn to its first answer: a baked project beside bare Flask.

Both have the gunicorn.conf.py of the project, and answer without a database; the third
has asked its own. In each round each has its turn, in random order. Makes the projects,
their environment and a PostgreSQL in a temporary folder; prints a table in Markdown.
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
from requests import START, database, environment, install

ROUNDS = int(os.environ.get("ROUNDS", "30"))
BARE = """
app.config["POOL_SIZE"] = 8  # which gunicorn.conf.py asks for


@app.get("/healthz")
def healthz():
    return {"status": "ok"}
"""
TURNS = {  # what gunicorn is to serve, and the path that is asked for
    "bare Flask": ("bare:app", "/healthz"),
    "a project": ("app_sqlalchemy:create_app()", "/healthz"),
    "a project, with its database": ("app_sqlalchemy:create_app()", "/readyz"),
}


def seconds_to_answer(project: Path, app: str, path: str, dsn: str) -> float:
    """Start gunicorn, and return after how many seconds it answers 200."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    gunicorn = project / ".venv" / "bin" / "gunicorn"
    environ = environment() | {"DATABASE_URL": dsn, "SECRET_KEY": "0" * 32}
    began = time.monotonic()
    process = subprocess.Popen(
        [gunicorn, "--bind", f"127.0.0.1:{port}", app],
        cwd=project,
        env=environ,
        stderr=subprocess.DEVNULL,
    )
    try:
        while time.monotonic() < began + 60:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                if answer.status == 200:
                    return time.monotonic() - began
            time.sleep(0.002)
        sys.exit(f"{app} does not answer.")
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure, and remove what that has made."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended by SIGTERM."))
    found: dict[str, list[float]] = {name: [] for name in TURNS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(remove_databases, folder)
        project = install(folder)
        (project / "bare.py").write_text(START + BARE)
        dsn = stack.enter_context(database(project))
        flask = [project / ".venv" / "bin" / "flask", "--app", "app_sqlalchemy"]
        ours = environment() | {"DATABASE_URL": dsn, "SECRET_KEY": "0" * 32}
        subprocess.run([*flask, "migrate"], cwd=project, env=ours, check=True)
        for number in range(ROUNDS + 1):
            for name in sample(list(TURNS), len(TURNS)):
                seconds = seconds_to_answer(project, *TURNS[name], dsn)
                if number:  # the first writes bytecode
                    found[name].append(seconds)
    print("| | median | of bare Flask |")
    print("|---|---|---|")
    bare = statistics.median(found["bare Flask"])
    for name, all_seconds in found.items():
        median = statistics.median(all_seconds)
        print(f"| {name} | {median:.2f} s | {median / bare:.2f} |")


if __name__ == "__main__":
    main()
