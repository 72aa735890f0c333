"""Measure the CPU time of one request in the process, without a server.

    python bench/request.py FOLDER

The applications are those of bench/pools.py, and take turns in random order. FOLDER
keeps the environments, and bench/pools.py uses them, too. Prints a table in Markdown:
the least of 25 rounds, which other work on the machine changes least.
"""

import subprocess

from pools import PACKAGES, with_projects, write_modules
from serving import database, install, prepare

MEASURE = """
import sys, time
from importlib import import_module
from random import sample
from werkzeug.test import EnvironBuilder

ROUNDS, REQUESTS = 25, 300
ROW = b'{"id":42,"name":"item 42"}\\n'
builder = EnvironBuilder("/items/42", "http://127.0.0.1")
apps = [import_module(name).app for name in sys.argv[1:]]
least = dict.fromkeys(apps, float("inf"))
for _ in range(ROUNDS):
    for app in sample(apps, len(apps)):
        environs = [builder.get_environ() for _ in range(REQUESTS)]
        began = time.process_time()
        for environ in environs:
            body = app(environ, lambda *_: None)
            assert b"".join(body) == ROW
            body.close()
        least[app] = min(least[app], time.process_time() - began)
for seconds in least.values():
    print(f"{1e6 * seconds / REQUESTS:.0f}")
"""


def main() -> None:
    """Measure every application, and print a table."""
    project = prepare()
    programs = project / ".venv" / "bin"
    install(programs, *PACKAGES, cwd=project)
    folder = project.parent / "served"
    modules = write_modules(folder)
    with database(project) as dsn:
        found = subprocess.run(
            [programs / "python", "-c", MEASURE, *modules.values()],
            cwd=folder,
            env=with_projects(project, dsn),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the log of the project
            check=True,
            text=True,
        )
    print("| | µs of CPU |\n|---|---|")
    for name, microseconds in zip(modules, found.stdout.split(), strict=True):
        print(f"| {name} | {microseconds} |")


if __name__ == "__main__":
    main()
