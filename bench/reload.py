"""Measure the time from a save to the first response of the new version.

All reloaders run in interleaved rounds, in a temporary folder. The bench prints a table
in Markdown and draws docs/images/reload.svg. The floor is the least time that any
reloader needs: a fork of a process that has imported the packages, the import of the
application, and a request.
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
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from random import shuffle
from urllib.request import urlopen

import chart
import psutil

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
ASGI = BARE + "from a2wsgi import WSGIMiddleware\nasgi = WSGIMiddleware(app)\n"
FULL = """
import app as package
from app.core.db import get_db
app = package.create_app()
VERSION = 0


@app.get("/version")
def version():
    with get_db().cursor() as cursor:
        cursor.execute("SELECT 1")
    return {"version": VERSION}
"""
FLOOR = """
import importlib, json, os, sys, time

os.environ |= {"FLASK_DEBUG": "1", "FLASK_RUN_FROM_CLI": "true"}
os.environ |= {"WERKZEUG_RUN_MAIN": "true", "_FLASK_DEV": "1"}


def in_fork(function):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps(function()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = json.load(answer)
    os.wait()
    return found


def answer():
    import served
    return served.app.test_client().get("/version").get_json()["version"]


def modules():
    answer()
    return [
        name
        for name, module in sys.modules.items()
        if "site-packages" in str(module) or name in sys.stdlib_module_names
    ]


for module in in_fork(modules):
    importlib.import_module(module)
for line in sys.stdin:
    start = time.perf_counter()
    assert in_fork(answer) == int(line)
    print(time.perf_counter() - start, flush=True)
"""


class Served:
    """A module in a folder of its own, and a server that serves it."""

    def __init__(self, folder: Path, module: str, *command: str | Path) -> None:
        self.file = folder / "served.py"
        self.file.write_text(module)
        self.version = 0
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        ours = ("PYTHON", "FLASK", "DATABASE_URL", "SECRET_KEY")
        self.process = subprocess.Popen(
            [str(part).replace("PORT", str(self.port)) for part in command],
            cwd=folder,
            env={k: v for k, v in os.environ.items() if not k.startswith(ours)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if "-c" in command else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def save(self) -> float:
        """Save a new version, and return the time."""
        self.version += 1
        text = self.file.read_text() + "#\n"  # A longer file has no old bytecode.
        text = re.sub(r"VERSION = .*", f"VERSION = {self.version}", text)
        start = time.perf_counter()
        self.file.write_text(text)
        return start

    def end(self) -> None:
        """Stop the server and all its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


class Reloader(Served):
    """A server with a reloader."""

    def reload(self) -> float:
        """Save a new version, and return the seconds until it responds."""
        start = self.save()
        self.await_version()
        return time.perf_counter() - start

    def await_version(self) -> None:
        """Wait for the new version. Save again if the reloader missed the change."""
        saved = time.monotonic()
        while self.answer() != self.version:
            time.sleep(0.002)
            if self.process.poll() is not None:
                raise SystemExit(f"{self.process.args} has ended.")
            if time.monotonic() - saved > 5:
                saved = time.monotonic()
                self.file.touch()

    def answer(self) -> int:
        """Return the version that responds, if any."""
        with suppress(OSError, HTTPException, ValueError):
            with urlopen(f"http://127.0.0.1:{self.port}/version", timeout=20) as found:
                return int(json.load(found)["version"])
        return -1


class Floor(Served):
    """The least time that any reloader needs."""

    def reload(self) -> float:
        """Save a new version, and return the seconds from the fork to its response."""
        self.save()
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{self.version}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def environment(folder: Path, *packages: str) -> Path:
    """Bake a project with all features, install it, and return its programs."""
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


def start_all(folder: Path) -> dict[str, Served]:
    """Start every reloader in a folder with a copy of the project's package."""
    plain = environment(folder / "plain", "uvicorn", "a2wsgi", "gunicorn")
    watched = environment(folder / "watchdog", "watchdog<7")
    run = ["--app", "served", "run", "--debug", "--port", "PORT"]
    dev = ["--app", "served", "dev", "--port", "PORT"]
    gunicorn = ["--reload", "--bind", "127.0.0.1:PORT", "served:app"]
    uvicorn = ["--reload", "--port", "PORT", "served:asgi"]
    commands = {
        "bare: flask run --debug (stat)": (BARE, plain / "flask", *run),
        "bare: flask run --debug (watchdog 6)": (BARE, watched / "flask", *run),
        "bare: gunicorn --reload": (BARE, plain / "gunicorn", *gunicorn),
        "bare: uvicorn --reload": (ASGI, plain / "uvicorn", *uvicorn),
        "bare: flask dev --no-fork": (BARE, plain / "flask", *dev, "--no-fork"),
        "bare: flask dev": (BARE, plain / "flask", *dev),
        "bare: floor": (BARE, plain / "python", "-c", FLOOR),
        "full: flask run --debug (stat)": (FULL, plain / "flask", *run),
        "full: flask dev --no-fork": (FULL, plain / "flask", *dev, "--no-fork"),
        "full: flask dev": (FULL, plain / "flask", *dev),
        "full: floor": (FULL, plain / "python", "-c", FLOOR),
    }
    served = {}
    for number, (name, (module, *command)) in enumerate(commands.items()):
        copy = folder / str(number)
        shutil.copytree(folder / "plain" / "app" / "app", copy / "app")
        kind = Floor if name.endswith("floor") else Reloader
        served[name] = kind(copy, module, *command)
    return served


def measure(served: dict[str, Served]) -> dict[str, list[float]]:
    """Return the seconds of each reloader in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in served}
    for number in range(ROUNDS + 1):
        order = list(served)
        shuffle(order)
        for name in order:
            found = served[name].reload()
            if number:  # The first round warms up.
                seconds[name].append(found)
            time.sleep(0.6)  # Saves in quick succession would be merged.
    return seconds


def show(seconds: dict[str, list[float]]) -> None:
    """Print a table, and draw a picture of the medians."""
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    first, *_ = medians.values()
    print("| | median | p99 | ratio to the first row |\n|---|---|---|---|")
    for name, found in seconds.items():
        p99 = statistics.quantiles(found, n=100, method="inclusive")[98]
        median = medians[name]
        print(f"| {name} | {median:.3f} s | {p99:.3f} s | {median / first:.2f} |")
    bars = {name: median for name, median in medians.items() if "floor" not in name}
    title = "Seconds from a save to the new response"
    chart.draw(TEMPLATE / "docs" / "images" / "reload.svg", title, bars, "flask dev")


def main() -> None:
    """Measure every reloader, and remove the generated files."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(remove_databases, folder)
        for name in ("plain", "watchdog"):
            (folder / name).mkdir()
        served = start_all(folder)
        for each in served.values():
            stack.callback(each.end)
        for each in served.values():
            if isinstance(each, Reloader):
                each.await_version()
        show(measure(served))


def remove_databases(folder: Path) -> None:
    """Remove the embedded databases, which for root are outside the folder."""
    for link in folder.glob("*/instance/postgres"):
        reaper = f"-m flask_devserver.postgres {link}"
        while any(reaper in " ".join(each) for each in command_lines()):
            time.sleep(0.1)
        shutil.rmtree(link.resolve())
        link.unlink(missing_ok=True)


def command_lines() -> list[list[str]]:
    """Return the command lines of all processes on this machine."""
    processes = psutil.process_iter(["cmdline"])
    return [process.info["cmdline"] or [] for process in processes]


if __name__ == "__main__":
    main()
