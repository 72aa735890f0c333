"""Compare `flask dev` with other reloaders of Flask on one application.

All run in interleaved rounds. Prints a table in Markdown: seconds from a save to the
first response, saves that were never served, and what remains after the server was
killed. Set ROUNDS for more saves.
"""

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
from reload import BARE, PROGRAMS, ROUNDS, TEMPLATE, Reloader, measure

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
WATCH = f"PROGRAMS/python {' '.join(RUN)}"
RELOADERS = {
    "`flask run --debug` (stat)": (BARE, [*RUN, "--debug"]),
    "`flask run --debug` (watchdog 6)": (BARE, [*RUN, "--debug"]),
    "`flask run --debug`, flask-hot-reload": (BARE + HOT_RELOAD, [*RUN, "--debug"]),
    "`hupper -m flask run`": (BARE, ["PROGRAMS/hupper", *RUN]),
    "`watchfiles 'flask run'`": (BARE, ["-m", "watchfiles", WATCH, "."]),
    "`flask dev`": (BARE, [*FLASK, "dev", "--port", "PORT"]),
}


def environment(folder: Path, *packages: str | Path) -> Path:
    """Make an environment with packages; return its Python."""
    uv, python = PROGRAMS / "uv", folder / "bin" / "python"
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([uv, "venv", "--quiet", folder], **quiet)
    install = [uv, "pip", "install", "--quiet", "--python", python]
    subprocess.run([*install, *packages], **quiet)
    return python


def start_all(folder: Path) -> dict[str, Reloader]:
    """Start every reloader in a folder of its own."""
    # Where `flask dev` is installed, `flask run` has its guard.
    plain = environment(folder / "plain", "flask")
    # With watchdog 7, Flask's own reloader never notices a change.
    others = ["flask", "hupper", "watchfiles", "flask-hot-reload", "watchdog<7"]
    watched = environment(folder / "watched", *others)
    devserver = folder / "devserver"
    shutil.copytree(TEMPLATE / "{{cookiecutter.project_slug}}" / "devserver", devserver)
    ours = environment(folder / "ours", devserver)
    served = {}
    for number, (name, (module, command)) in enumerate(RELOADERS.items()):
        place = folder / str(number)
        place.mkdir()
        python = {"`flask dev`": ours, "`flask run --debug` (stat)": plain}.get(
            name, watched
        )
        words = [word.replace("PROGRAMS", str(python.parent)) for word in command]
        served[name] = Reloader(place, module, python, *words)
    return served


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
    # A shell's background job ignores SIGINT, with which watchfiles ends a version.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        served = start_all(folder)
        for each in served.values():
            stack.callback(each.end)
            each.await_version()
        seconds = measure(served)
        first = statistics.median(next(iter(seconds.values())))
        print("| | median | ratio to the first row ", end="")
        print("| slowest | saves lost | left after a kill |")
        print("|---|---|---|---|---|---|")
        for name, times in seconds.items():
            median = statistics.median(times)
            figures = f"{median:.2f} s | {median / first:.2f} | {max(times):.2f} s"
            lost = f"{lost_saves(served[name])} of {ROUNDS}"
            left = left_behind(served[name])
            print(f"| {name} | {figures} | {lost} | {left} |", flush=True)


if __name__ == "__main__":
    main()
