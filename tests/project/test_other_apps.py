"""`flask dev` serves every save in published applications that it was not written for.

Each application runs unmodified from its source distribution, in an environment of its
own. A save appends a line to a module. The save counts as served when the line has run
and the page responds.
"""

import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest

from ..support.commands import run, wait_for
from ..support.projects import install_devserver
from ..support.serving import free_port, running

SAVES = 20


@dataclass
class Other:
    """An application: its distribution and folder, and a module and a page of it.

    `setup` are the commands that its documentation names before the first start.
    """

    distribution: str
    folder: str
    app: str
    module: str
    page: str
    packages: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


FLASKR = Other(
    "flask==3.1.3",
    "examples/tutorial",
    "flaskr",
    "flaskr/blog.py",
    "/auth/login",
)
CELERY = Other(
    "flask==3.1.3",
    "examples/celery",
    "task_app",
    "src/task_app/views.py",
    "/",
)
IHATEMONEY = Other(
    "ihatemoney==7.2.1",
    ".",
    "ihatemoney.run:create_app",
    "ihatemoney/web.py",
    "/",
)
MOIN = Other(
    "moin==2.0.0b4",
    ".",
    "moin.app",
    "src/moin/apps/frontend/views.py",
    "/+login",
    packages=("setuptools<81",),  # It imports pkg_resources.
    setup=("moin create-instance --path .", "moin index-create"),
)
PRIVACYIDEA = Other(
    "privacyidea==3.14",
    ".",
    "privacyidea.app",
    "privacyidea/api/healthcheck.py",
    "/healthz/",
)
EACH = [
    pytest.param(FLASKR, id="flaskr"),
    pytest.param(CELERY, id="celery"),
    pytest.param(IHATEMONEY, id="ihatemoney", marks=pytest.mark.weekly),
    pytest.param(MOIN, id="moin", marks=pytest.mark.weekly),
    pytest.param(PRIVACYIDEA, id="privacyidea", marks=pytest.mark.weekly),
]


@pytest.mark.parametrize("other", EACH)
@pytest.mark.parametrize("option", ["--fork", "--no-fork"])
def test_every_save_is_served(tmp_path: Path, other: Other, option: str) -> None:
    project, programs = install(tmp_path, other)
    port = free_port()
    url = f"http://127.0.0.1:{port}{other.page}"
    command = [programs / "flask", "--app", other.app, "dev", "--port", str(port)]
    log, module = tmp_path / "log", project / other.module
    for line in other.setup:
        name, *arguments = line.split()
        run(programs / name, *arguments, cwd=project)
    with running([*command, option], project, log, seconds=30) as server:
        wait_for(lambda: responds(url), "first page", seconds=60)
        for number in range(SAVES):
            with module.open("a") as file:
                file.write(f"\nprint('saved {number}.', flush=True)\n")
            wait_for(lambda: f"saved {number}." in log.read_text(), f"save {number}")  # noqa: B023
            assert responds(url), log.read_text()
        family = psutil.Process(server.pid).children(recursive=True)
    wait_for(lambda: not any(map(is_running, family)), "end of all processes")
    socket.create_server(("127.0.0.1", port)).close()
    assert "Traceback" not in log.read_text()


def install(folder: Path, other: Other) -> tuple[Path, Path]:
    """Install the application and `flask dev`; return its folder and its programs."""
    name = other.distribution.partition("==")[0]
    download = ["pip", "download", "--quiet", "--no-deps", "--no-binary", name]
    run(sys.executable, "-m", *download, other.distribution, cwd=folder)
    [archive] = folder.glob("*.tar.gz")
    run("tar", "-xzf", archive, cwd=folder)
    project = folder / archive.name.removesuffix(".tar.gz") / other.folder
    return project, install_devserver(folder, "--editable", project, *other.packages)


def responds(url: str) -> bool:
    """Return whether the page responds before the deadline of a reload."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with suppress(HTTPError), suppress(OSError), urlopen(url, timeout=10) as page:
            return bool(page.status == 200)
        time.sleep(0.1)
    return False


def is_running(process: psutil.Process) -> bool:
    """Return whether a process runs and is not a zombie."""
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
