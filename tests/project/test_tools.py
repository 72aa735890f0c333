"""`flask dev` with packages that reach deep into Python: gevent, debugpy, TLS."""

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

import pytest

from ..support.commands import DEADLINE, wait_for
from ..support.projects import install_devserver
from ..support.serving import free_port, running

pytestmark = pytest.mark.slow

APP = """
from flask import Flask
app = Flask(__name__)
VERSION = 0


@app.get("/")
def index():
    return str(VERSION)
"""
LINE = APP.splitlines().index("    return str(VERSION)") + 1
GEVENT = "from gevent import monkey\nmonkey.patch_all()\n"
OPTIONS = pytest.mark.parametrize("option", ["--fork", "--no-fork"])


class App:
    """An application of one module, with `flask dev` and packages for it."""

    def __init__(self, folder: Path, text: str, *packages: str) -> None:
        self.folder = folder
        self.module = folder / "served.py"
        self.module.write_text(text)
        self.version = 0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.python = install_devserver(folder, *packages) / "python"

    @contextmanager
    def serve(self, *options: str, tool: Sequence[str] = ()) -> Iterator[None]:
        """Serve it until the end of the block."""
        command = ["-m", "flask", "--app", "served", "dev", "--port", str(self.port)]
        command = [self.python, *tool, *command, *options]
        with running(command, self.folder, self.folder / "log", seconds=30):
            wait_for(lambda: self.page() == "0", "first page")
            yield

    def page(self) -> str:
        """Return the page, whatever its certificate is, or nothing."""
        context = ssl._create_unverified_context()
        with suppress(OSError), urlopen(self.url, timeout=99, context=context) as page:
            return str(page.read().decode())
        return ""

    def save(self) -> None:
        """Save a version."""
        self.version = (self.version + 1) % 10  # of the same size
        text = re.sub(r"(?m)^VERSION = .*", f"VERSION = {self.version}", self.text)
        # In one step, as editors do: half a file would start a child of its own.
        draft = self.folder / ".draft"
        draft.write_text(text)
        draft.replace(self.module)

    def is_new(self) -> bool:
        """Return whether the page is of the version that was saved last."""
        return self.page() == str(self.version)

    def reload(self) -> None:
        """Save a version and wait for its page."""
        self.save()
        wait_for(self.is_new, "page of the next version")

    def restart(self) -> None:
        """Change the environment, and wait until the supervisor starts again."""
        log, said = self.folder / "log", "starting again"
        starts = log.read_text().count(said) + 1
        (self.folder / ".flaskenv").write_text("#" * starts)
        wait_for(lambda: log.read_text().count(said) == starts, "new supervisor")

    @property
    def text(self) -> str:
        return self.module.read_text()


@OPTIONS
def test_greenlets_instead_of_threads_work(tmp_path: Path, option: str) -> None:
    app = App(tmp_path, GEVENT + APP, "gevent")
    with app.serve(option):
        for _ in range(5):
            app.reload()
    assert "Traceback" not in (tmp_path / "log").read_text()


@OPTIONS
def test_package_that_replaces_functions_of_python_works(
    tmp_path: Path, option: str
) -> None:
    app = App(tmp_path, "import grequests\n" + APP, "grequests")
    with app.serve(option):
        for _ in range(3):
            app.reload()
            time.sleep(1)  # until the supervisor has imported the package
    assert "was killed" not in (tmp_path / "log").read_text()


@OPTIONS
def test_certificate_is_the_same_after_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    app = App(tmp_path, APP, "cryptography")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    app.url = app.url.replace("http:", "https:")
    with app.serve(option, "--cert", "adhoc"):
        before = ssl.get_server_certificate(("127.0.0.1", app.port))
        app.reload()
        assert ssl.get_server_certificate(("127.0.0.1", app.port)) == before
        app.restart()
        app.reload()
        assert ssl.get_server_certificate(("127.0.0.1", app.port)) == before
    assert not list(temporary.iterdir())


@OPTIONS
def test_save_is_served_while_the_server_starts_again(
    tmp_path: Path, option: str
) -> None:
    app = App(tmp_path, APP)
    with app.serve(option):
        for _ in range(5):
            app.reload()
            app.restart()
            app.reload()  # often within the second of the previous save
            app.save()
            app.restart()
            wait_for(app.is_new, "page of the next version")


class Editor:
    """A connection of an editor to the debugger, in the Debug Adapter Protocol."""

    def __init__(self, port: int, module: Path, **attach: Any) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.stream = self.connection.makefile("rwb")
        self.number = 0
        self.send("initialize", adapterID="python", pathFormat="path")
        self.send("attach", **{"justMyCode": False, "subProcess": True} | attach)
        self.read("event", "initialized")
        lines = {"breakpoints": [{"line": LINE}], "source": {"path": str(module)}}
        self.send("setBreakpoints", **lines)
        self.send("configurationDone")
        self.read("response", "configurationDone")  # The breakpoint is set now.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.stream.close()
        self.connection.close()

    def send(self, command: str, **arguments: Any) -> None:
        """Send a request."""
        self.number += 1
        request = {"seq": self.number, "type": "request", "command": command}
        text = json.dumps(request | {"arguments": arguments}).encode()
        self.stream.write(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))
        self.stream.flush()

    def read(self, kind: str, name: str) -> dict[str, Any]:
        """Return the body of the next message of this kind and name."""
        while True:
            length = int(self.stream.readline().split(b":")[1])
            self.stream.readline()
            message = json.loads(self.stream.read(length))
            found = message.get("event") or message.get("command")
            if (message["type"], found) == (kind, name):
                return dict(message.get("body", {}))


@OPTIONS
def test_debugger_stops_at_a_breakpoint_after_a_reload(
    tmp_path: Path, option: str
) -> None:
    app, port = App(tmp_path, APP, "debugpy"), free_port()
    listen = ["-m", "debugpy", "--listen", f"127.0.0.1:{port}"]
    with app.serve(option, tool=listen), Editor(port, app.module) as parent:
        for version in ("0", "1"):
            if version == "1":
                app.save()
            child = parent.read("event", "debugpyAttach")
            with Editor(port, app.module, **child) as editor:
                assert page_after_breakpoint(app, editor) == version


@OPTIONS
def test_changed_environment_keeps_the_debugger(tmp_path: Path, option: str) -> None:
    app = App(tmp_path, APP, "debugpy")
    listen = ["-m", "debugpy", "--listen", f"127.0.0.1:{free_port()}"]
    with app.serve(option, tool=listen):
        (tmp_path / ".flaskenv").touch()
        log = tmp_path / "log"
        wait_for(lambda: "restart the debugger" in log.read_text(), "advice")
        app.reload()


def page_after_breakpoint(app: App, editor: Editor) -> str:
    """Ask for the page; return it once the editor lets the stopped thread continue."""
    with ThreadPoolExecutor(1) as thread:
        page = thread.submit(app.page)
        stopped = editor.read("event", "stopped")
        assert stopped["reason"] == "breakpoint"
        assert not page.done()
        editor.send("continue", threadId=stopped["threadId"])
        return page.result()
