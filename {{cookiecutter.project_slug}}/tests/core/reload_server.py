"""A development server in a process of its own, on a copy of the project."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from importlib.util import find_spec
from pathlib import Path
from random import randrange
from threading import Event, Thread
from typing import Any, Self, cast
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil
from psycopg2.extensions import connection

ROOT = Path(__file__).parents[2]
PACKAGE = "{{ cookiecutter.project_slug }}"
# Seconds for anything to happen. A wait ends as soon as it has happened.
DEADLINE = float(os.environ.get("DEADLINE", "60"))
RELOADS = int(os.environ.get("RELOADS", "20"))  # in a row; more for a longer soak
# A network's proxy cannot reach servers on this machine.
OPENER = build_opener(ProxyHandler({}))

# The output of a server without errors.
EXPECTED = re.compile(
    r" \* (Serving|Debug mode|Running on|Restarting|Debugger|Detected|Reloaded).*"
    r"|(\S+ INFO )?WARNING: This is a development server\..*"
    r"|(\S+ INFO )?Press CTRL\+C to quit"
    r"|\S+ (INFO|WARNING)  \* (Restarting|Debugger|Detected).*"
    r"|\S+ INFO (Creating a PostgreSQL in|Applied the migrations) .*"
    r"|\S+ INFO Enqueued job \S+: \S+ \[\w+\]"
    r"|\S+ INFO (Job|Task) .+ succeeded in \S+ ms \[[\w-]+\]"
    r"| \* GET /(query|transaction) was aborted by the reload"
    r"|\S+ WARNING A query took \d+ ms: SELECT pg_sleep\(.*"
    r"|\S+ INFO (GET|POST) \S+ [23]\d\d \S+ ms \[\w+\]"
    r"|"
)


RUN = ("run", "--debug")
DEV = ("dev",)
DEV_WITHOUT_FORK = ("dev", "--no-fork")
COMMANDS: list[tuple[str, ...]] = [RUN]
if sys.platform != "win32" and find_spec("flask_devserver"):
    COMMANDS += [DEV, DEV_WITHOUT_FORK]


class Server:
    """Run `flask run --debug`, or another command, on a copy of the project.

    The copy is in `folder`. `app` is the module to serve. Errors raised here end with
    the server's output.
    """

    def __init__(
        self,
        folder: Path,
        app: str = "tests.core.reload_app",
        command: Sequence[str] = RUN,
        **environ: str,
    ) -> None:
        self.command = command
        self.folder = folder
        self.app = app
        self.environ = environ
        self.port = _free_port()
        self.version = 0
        self.answered = 0  # the last version that has responded
        self.module = folder / PACKAGE / "__init__.py"

    def __enter__(self) -> Self:
        for name in (PACKAGE, "tests"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=_caches)
        self.start()
        try:
            self.wait_for(self.answer, "an answer")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server, without waiting for it."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("FLASK_")}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Most users do not set it.
        with (self.folder / "log").open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-u", "-m", "flask", "--app", self.app]
                + [*self.command, "--port", str(self.port)],
                cwd=self.folder,
                env=environ | self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )

    def interrupt(self) -> None:
        """Stop the server as Ctrl-C does, and wait until it has exited."""
        if sys.platform == "win32":
            self.process.send_signal(signal.CTRL_BREAK_EVENT)
        else:
            os.killpg(self.process.pid, signal.SIGINT)
        self.wait_for(lambda: self.process.poll() is not None, "the end")

    def kill(self) -> None:
        """Kill the server and its children."""
        if sys.platform == "win32":
            tree = ["taskkill", "/F", "/T", "/PID", str(self.process.pid)]
            subprocess.run(tree, capture_output=True)
        else:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def reload(self) -> dict[str, Any]:
        """Save a new version and return its response."""
        self.save_version()
        answer: dict[str, Any] = self.wait_for(
            self.new_answer, f"answer of version {self.version}"
        )
        self.answered = self.version
        return answer

    def save_version(self) -> None:
        """Save a new version."""
        self.version += 1
        self.save(f"{self.module.read_text()}\nVERSION = {self.version}\n")

    def save(self, text: str) -> None:
        """Replace the package's first module by `text` in one step, as editors do."""
        draft = self.module.with_suffix(".draft")
        draft.write_text(text)
        draft.replace(self.module)

    def new_answer(self) -> dict[str, Any] | None:
        """Return the response of the last version, or None after 3 seconds."""
        found = poll(lambda: self.answer().get("version") == self.version, seconds=3)
        if not found and self.command == RUN:
            # Werkzeug's reloader misses a save while the new process starts. The others
            # must not, so they get no second save.
            self.module.touch()
        return self.answer() if found else None

    def answer(self) -> Any:
        """Return the response of /version, or an empty one without a server."""
        with suppress(OSError, HTTPException):
            return self.request("/version")
        return {}

    def request(self, path: str, method: str = "GET") -> Any:
        """Return the JSON of a response. Raises `OSError` if there is none."""
        with self.open(path, method) as response:
            return json.load(response)

    def open(self, path: str, method: str = "GET", **headers: str) -> HTTPResponse:
        """Make a request and return the response, which the caller closes."""
        url = f"http://127.0.0.1:{self.port}{path}"
        request = Request(url, method=method, headers=headers)
        return cast(HTTPResponse, OPENER.open(request, timeout=DEADLINE))

    def request_in_background(self, path: str) -> None:
        """Make a request that a reload may interrupt."""

        def request() -> None:
            with suppress(OSError, HTTPException):
                self.request(path)

        Thread(target=request, daemon=True).start()

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until `condition` is true and return it; fail with the log if not."""
        if found := poll(condition):
            return found
        raise AssertionError(f"no {what} in {DEADLINE:g} s; it wrote:\n{self.log}")

    @property
    def log(self) -> str:
        """The output of the server, without colors."""
        return re.sub(r"\x1b\[\d+m", "", (self.folder / "log").read_text())

    def unexpected(self) -> list[str]:
        """Return the lines of the log that a server without errors does not write."""
        return [line for line in self.log.splitlines() if not EXPECTED.fullmatch(line)]

    def port_is_free(self) -> bool:
        """Return whether another server could listen on the port."""
        with suppress(OSError), socket.create_server(("127.0.0.1", self.port)):
            return True
        return False


@contextmanager
def constant_requests(server: Server) -> Iterator[None]:
    """Send requests until the end of the block.

    The block fails if a request fails, or gets the response of a replaced version.
    Flask's own server refuses connections while it reloads.
    """
    done = Event()

    def ask() -> int:
        answers = 0
        while not done.wait(0.01):
            answered = server.answered
            try:
                assert server.request("/version")["version"] >= answered
                answers += 1
            except (OSError, HTTPException) as error:
                if server.command != RUN or isinstance(error, HTTPError):
                    raise
        return answers

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask)
        try:
            yield
        finally:
            done.set()
    assert asking.result() >= RELOADS


def processes_connected(db: connection) -> set[int]:
    """Return the ids of the processes that have a connection to the test's database."""
    with db.cursor() as cursor:
        cursor.execute(
            "SELECT split_part(application_name, ' ', 2)::int FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'process %'"
        )
        return {process for (process,) in cursor.fetchall()}


def connects_only(db: connection, process: int) -> bool:
    """Return whether no other process is connected to the test's database."""
    return processes_connected(db) <= {process}


def sleeping(db: connection) -> bool:
    """Return whether `pg_sleep` runs in the test's database."""
    return has_backend(db, "wait_event = 'PgSleep'")


def has_backend(db: connection, condition: str) -> bool:
    """Return whether the condition holds for a backend of the test's database."""
    with db.cursor() as cursor:
        cursor.execute(
            "SELECT FROM pg_stat_activity"
            f" WHERE datname = current_database() AND {condition}"
        )
        return cursor.rowcount > 0


def poll(condition: Callable[[], Any], seconds: float = DEADLINE) -> Any:
    """Call `condition` until its result is true, and return its last result."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _free_port() -> int:
    # Connections get higher ports, and might take a port that was free here.
    while True:
        port = randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _caches(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in ("__pycache__", ".pytest_cache")]
