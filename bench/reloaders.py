"""Compare `flask dev` with other reloaders of Flask on one application.

Prints a table in Markdown: seconds from a save to the first response, saves that were
never served, and what remains after the server was killed. Set ROUNDS for more saves.
"""

import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
from reload import BARE, PROGRAMS, TEMPLATE, Reloader

ROUNDS = int(os.environ.get("ROUNDS", "20"))
LOST = 4.0  # seconds after which a save that is not served counts as lost

HOT_RELOAD = """
from flask_hot_reload import HotReload
HotReload(app, includes=["."])
"""
SLOW_IMPORT = """
import pathlib, time
pathlib.Path("starts").touch()
time.sleep(0.5)
"""

FLASK = ["-m", "flask", "--app", "served"]
RUN = [*FLASK, "run", "--port", "PORT"]
RELOADERS = {
    "`flask run --debug` (watchdog 6)": (BARE, [*RUN, "--debug"]),
    "`flask run --debug`, flask-hot-reload": (BARE + HOT_RELOAD, [*RUN, "--debug"]),
    "`hupper -m flask run`": (BARE, ["-m", "hupper", *RUN]),
    "`watchfiles 'flask run'`": (
        BARE,
        ["-m", "watchfiles", "python -m flask --app served run --port PORT", "."],
    ),
    "`flask dev`": (BARE, [*FLASK, "dev", "--port", "PORT"]),
}


def environment(folder: Path) -> Path:
    """Make an environment with every reloader; return its Python."""
    uv, python = PROGRAMS / "uv", folder / "environment" / "bin" / "python"
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([uv, "venv", "--quiet", folder / "environment"], **quiet)
    devserver = folder / "devserver"
    shutil.copytree(TEMPLATE / "{{cookiecutter.project_slug}}" / "devserver", devserver)
    # With watchdog 7, Flask's own reloader never notices a change.
    packages = [devserver, "hupper", "watchfiles", "flask-hot-reload", "watchdog<7"]
    install = [uv, "pip", "install", "--quiet", "--python", python, *packages]
    subprocess.run(install, **quiet)
    return python


def seconds(served: Reloader) -> list[float]:
    """Return how long each save takes."""
    found = []
    for _ in range(ROUNDS):
        found.append(served.reload())
        time.sleep(0.6)  # A save that follows closely is another matter.
    return found


def lost_saves(served: Reloader) -> int:
    """Return how many saves are not served that were made while a version starts."""
    served.file.write_text(served.file.read_text() + SLOW_IMPORT)
    served.reload()
    starts, lost = served.file.with_name("starts"), 0
    for _ in range(ROUNDS):
        starts.unlink(missing_ok=True)
        served.save()
        end = time.monotonic() + LOST
        while not starts.exists() and time.monotonic() < end:
            time.sleep(0.01)
        served.save()
        while served.answer() != served.version:
            time.sleep(0.05)
            if time.monotonic() > end + LOST:
                lost += 1
                served.reload()
                break
        time.sleep(0.6)
    return lost


def left_behind(served: Reloader) -> str:
    """Kill the server as the system does without memory; return what remains."""
    server = psutil.Process(served.process.pid)
    family = server.children(recursive=True)
    server.send_signal(signal.SIGKILL)
    served.process.wait()
    time.sleep(2)
    found = []
    if left := [each for each in family if each.is_running()]:
        found.append(f"{len(left)} processes" if len(left) > 1 else "a process")
    try:
        socket.create_server(("127.0.0.1", served.port)).close()
    except OSError:
        found.append("the port in use")
    for each in left:
        with suppress(psutil.Error):
            each.kill()
    return ", ".join(found) or "nothing"


def main() -> None:
    """Measure each reloader, and remove what that has made."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = environment(folder)
        os.environ["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        print("| | median | slowest | saves lost | left after a kill |")
        print("|---|---|---|---|---|")
        for number, (name, (module, command)) in enumerate(RELOADERS.items()):
            place = folder / str(number)
            place.mkdir()
            served = Reloader(place, module, python, *command)
            stack.callback(served.end)
            served.await_version()
            times = seconds(served)
            lost = f"{lost_saves(served)} of {ROUNDS}"
            figures = f"{statistics.median(times):.2f} s | {max(times):.2f} s | {lost}"
            print(f"| {name} | {figures} | {left_behind(served)} |", flush=True)


if __name__ == "__main__":
    main()
