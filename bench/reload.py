"""From a save to the first answer of the new version: every reloader, interleaved.

Makes a project and its environment in a temporary folder; prints a table in Markdown.
"""

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from random import shuffle
from urllib.request import urlopen

ROUNDS = int(os.environ.get("ROUNDS", "50"))
TEMPLATE = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent

BARE = """
from flask import Flask
app = Flask(__name__)
VERSION = 0


@app.get("/version")
def version():
    return {"version": VERSION}
"""
FULL = """
import app as package
from app.db import get_db
app = package.create_app()
VERSION = 0


@app.get("/version")
def version():
    with get_db().cursor() as cursor:
        cursor.execute("SELECT 1")
    return {"version": VERSION}
"""


class Reloader:
    """A server of one module, in a folder of its own, that reloads by itself."""

    def __init__(self, folder: Path, module: str, *command: str) -> None:
        folder.mkdir()
        self.file = folder / "served.py"
        self.file.write_text(module)
        self.version = 0
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        ours = ("PYTHON", "FLASK", "DATABASE_URL", "SECRET_KEY")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.process = subprocess.Popen(
            [part.replace("PORT", str(self.port)) for part in command],
            cwd=folder,
            env=kept,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def answer(self) -> int:
        with suppress(OSError, HTTPException, ValueError):
            with urlopen(f"http://127.0.0.1:{self.port}/version", timeout=20) as found:
                return int(json.load(found)["version"])
        return -1

    def await_version(self) -> None:
        """Wait for the answer; save again what a reloader has missed."""
        saved = time.monotonic()
        while self.answer() != self.version:
            time.sleep(0.002)
            if time.monotonic() - saved > 5:
                saved = time.monotonic()
                self.file.touch()

    def reload(self) -> float:
        """Save a new version; return the seconds until it answers."""
        self.version += 1
        text = self.file.read_text() + "#\n"  # longer, or old bytecode may be served
        text = re.sub(r"VERSION = .*", f"VERSION = {self.version}", text)
        start = time.perf_counter()
        self.file.write_text(text)
        self.await_version()
        return time.perf_counter() - start

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


def environment(folder: Path, *packages: str) -> Path:
    """Bake the fullest project, install it with `packages`, return its programs."""
    bake = [PROGRAMS / "cookiecutter", TEMPLATE, "--no-input", "project_slug=app"]
    bake += ["pool=sqlalchemy", "worker=thread", "--output-dir", folder]
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(bake, **quiet)
    uv, project = PROGRAMS / "uv", folder / "app"
    subprocess.run([uv, "sync", "--quiet"], cwd=project, **quiet)
    if packages:
        python = project / ".venv" / "bin" / "python"
        install = [uv, "pip", "install", "--quiet", "--python", python, *packages]
        subprocess.run(install, **quiet)
    return project / ".venv" / PROGRAMS.name


def reloaders(folder: Path) -> dict[str, Reloader]:
    """Start them all."""
    (folder / "plain").mkdir()
    (folder / "watchdog").mkdir()
    plain = environment(folder / "plain", "uvicorn", "a2wsgi")
    watched = environment(folder / "watchdog", "watchdog<7")
    run = ["--app", "served", "run", "--debug", "--port", "PORT"]
    dev = ["--app", "served", "dev", "--port", "PORT"]
    flask, uvicorn = str(plain / "flask"), str(plain / "uvicorn")
    gunicorn = str(plain / "gunicorn")
    asgi = BARE + "from a2wsgi import WSGIMiddleware\nasgi = WSGIMiddleware(app)\n"
    served = {
        "bare, flask run --debug (stat)": (BARE, flask, *run),
        "bare, with watchdog 6": (BARE, str(watched / "flask"), *run),
        "bare, gunicorn --reload": (
            *(BARE, gunicorn, "--reload", "--bind", "127.0.0.1:PORT", "served:app"),
        ),
        "bare, uvicorn --reload": (
            *(asgi, uvicorn, "--reload", "--port", "PORT", "served:asgi"),
        ),
        "bare, flask dev --no-fork": (BARE, flask, *dev, "--no-fork"),
        "bare, flask dev": (BARE, flask, *dev),
        "fullest project, flask run --debug": (FULL, flask, *run),
        "fullest project, flask dev --no-fork": (FULL, flask, *dev, "--no-fork"),
        "fullest project, flask dev": (FULL, flask, *dev),
    }
    return {
        name: Reloader(folder / str(number), module, *command)
        for number, (name, (module, *command)) in enumerate(served.items())
    }


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = reloaders(folder)
        for reloader in running.values():
            stack.callback(reloader.end)
        for reloader in running.values():
            reloader.await_version()
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(ROUNDS):
            order = list(running)
            shuffle(order)
            for name in order:
                seconds[name].append(running[name].reload())
                time.sleep(0.6)  # a save that follows closely is another matter
    first = statistics.median(next(iter(seconds.values())))
    print("| | median | p99 | of the first |\n|---|---|---|---|")
    for name, found in seconds.items():
        median = statistics.median(found)
        p99 = statistics.quantiles(found, n=100, method="inclusive")[98]
        print(f"| {name} | {median:.2f} s | {p99:.2f} s | {median / first:.2f} |")


if __name__ == "__main__":
    main()
