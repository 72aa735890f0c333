"""Measure one to four processes of a project: requests per second, and connections.

    python bench/scale.py FOLDER

64 clients request a row, a page of twenty rows, and a query that takes 20 ms. If
PgBouncer is installed, two processes share 8 connections through it, with the pool
psycopg2 and without a pool. FOLDER keeps the environments, and bench/throughput.py uses
them, too. Prints a table in Markdown.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import sample
from typing import NamedTuple
from urllib.parse import urlsplit

from reload import command_lines
from serving import (
    APPS,
    await_port,
    database,
    environment,
    free_port,
    load,
    prepare,
    served,
)
from throughput import ours

ROUNDS = int(os.environ.get("ROUNDS", "5"))
SECONDS = int(os.environ.get("SECONDS", "2"))  # of each number of processes and path
PATHS = ("/items/42", "/items", "/slow")
CLIENTS = 64
POOLED = 8  # connections of PgBouncer to the server
PGBOUNCER = """
[databases]
bench = host={url.hostname} port={url.port} user={url.username} password={url.password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
auth_type = any
pool_mode = transaction
default_pool_size = {size}
server_idle_timeout = 1
"""


class Turn(NamedTuple):
    """The pool of a project, the number of its processes, the URL of its database."""

    pool: str
    workers: int
    dsn: str


@contextmanager
def pgbouncer(folder: Path, dsn: str) -> Iterator[str]:
    """Run PgBouncer in front of the server; yield the URL that leads to it."""
    port, url = free_port(), urlsplit(dsn)
    file = folder / "pgbouncer.ini"
    file.write_text(PGBOUNCER.format(url=url, port=port, size=POOLED))
    user = "nobody" if os.getuid() == 0 else None  # It refuses to run as root.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(["pgbouncer", file], user=user, cwd="/", **quiet) as process:
        await_port(port)
        yield dsn.replace(f":{url.port}/", f":{port}/")
        process.terminate()


def count_connections() -> int:
    """Return how many connections the server has to the database of the items."""
    titles = [" ".join(each) for each in command_lines()]
    return sum(title.startswith("postgres: dev bench ") for title in titles)


def measure(folder: Path, turns: dict[str, Turn]) -> dict[str, list[list[float]]]:
    """Return the rates of each turn's paths, and its connections, from all rounds."""
    found = {name: [[] for _ in (*PATHS, "connections")] for name in turns}
    programs = folder / "app_sqlalchemy" / ".venv" / "bin"
    for _ in range(ROUNDS):
        for name in sample(list(turns), len(turns)):
            pool, workers, dsn = turns[name]
            command, _, cwd, environ = ours(programs, folder, pool)
            command = [programs / command[0], *command[1:], "--workers", str(workers)]
            environ = environment(dsn) | {"PYTHONPATH": str(APPS)} | environ
            with served(command, cwd, environ, PATHS[0]) as url:
                load(url + PATHS[0], CLIENTS, 1)  # to get warm
                for column, path in sample(list(enumerate(PATHS)), len(PATHS)):
                    result = load(url + path, CLIENTS, SECONDS)
                    if result.failed:
                        sys.exit(f"{result.failed} requests failed.")
                    found[name][column].append(result.rate)
                found[name][-1].append(count_connections())
    return found


def main() -> None:
    """Measure, and print a table of the medians."""
    project = prepare()
    folder = project.parent
    with ExitStack() as stack:
        dsn = stack.enter_context(database(project))
        turns = {f"{count}": Turn("psycopg2", count, dsn) for count in range(1, 5)}
        if shutil.which("pgbouncer"):
            pooled = stack.enter_context(pgbouncer(folder, dsn))
            name = f"2, PgBouncer with {POOLED} connections"
            turns[name] = Turn("psycopg2", 2, pooled)
            turns[f"{name}, pool none"] = Turn("none", 2, pooled)
        found = measure(folder, turns)
    print("| processes |", " | ".join(PATHS), "| connections |\n|---|---|---|---|---|")
    for name, columns in found.items():
        medians = [f"{statistics.median(column):,.0f}" for column in columns]
        print("|", " | ".join([name, *medians]), "|")


if __name__ == "__main__":
    main()
