"""`flask dev` stops all its processes, and serves changed packages."""

import os
import pty
import re
import signal
from functools import partial
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from ..support.commands import PROGRAMS, run, wait_for
from ..support.projects import Bake
from ..support.serving import Site

VERSION = """

import dotenv.version


@bp.get("/version")
def version():
    return dotenv.version.__version__
"""


@pytest.fixture
def site(bake: Bake) -> Site:
    """A default project, not yet served."""
    return Site(bake(project_slug="app"))


def test_any_exit_stops_all_processes_and_keeps_the_data(site: Site) -> None:
    ends = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
    for number, end in enumerate(ends):
        with site.serve() as server:
            assert site.page("notes").count("<li>note ") == number
            site.page("notes", body=f"note {number}")
            server.send_signal(end)
            wait_for(site.is_gone, f"end after {end.name}")


def test_closed_terminal_leaves_nothing_running(site: Site) -> None:
    terminal, inside = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
    with site.serve(**streams, preexec_fn=lambda: take_terminal(inside)):
        os.close(inside)
        os.close(terminal)
        wait_for(site.is_gone, "end with the terminal")


def test_embedded_broker_ends_with_the_server(bake: Bake) -> None:
    site = Site(bake(project_slug="app", worker="celery"))
    with site.serve():  # Its worker, in which SIGINT is blocked, starts the broker.
        site.page("notes", body="a note")
        wait_for(lambda: "has 2 words" in site.log.read_text(), "job")
    wait_for(site.is_gone, "end of the broker", 20)


def take_terminal(terminal: int) -> None:
    """Make it the controlling terminal, which sends SIGHUP when it is closed."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_edited_migration_is_named_until_it_is_mended(bake: Bake) -> None:
    site = Site(bake(project_slug="app", worker="procrastinate"))
    with site.serve():
        [migration] = (site.folder / "app" / "migrations").glob("0001_*.sql")
        with migration.open("a") as file:
            file.write("-- edited\n")
        wait_for(lambda: "was edited after" in error_page(site), "page that names it")
        # The worker goes on without a save, too.
        waits = "Retrying every 3 s: 0001_notes.sql was edited after"
        wait_for(lambda: waits in site.log.read_text(), "worker that waits")
        flask = site.folder / ".venv" / PROGRAMS.name / "flask"
        run(flask, "migrate", "--reset", cwd=site.folder)
        wait_for(lambda: site.page("notes"), "page")
        site.page("notes", body="a note")
        wait_for(lambda: "has 2 words" in site.log.read_text(), "job")
    assert "Traceback" not in site.log.read_text()


def test_worker_waits_while_the_application_cannot_be_imported(bake: Bake) -> None:
    site = Site(bake(project_slug="app", worker="procrastinate"))
    module = site.folder / "app" / "notes.py"
    text = module.read_text()
    with site.serve():
        module.write_text("broken(")
        waits = "flask worker exited (exit code 2): save a file"
        wait_for(lambda: waits in site.log.read_text(), "worker that waits")
        module.write_text(text)
        wait_for(lambda: not error_page(site), "page")
        site.page("notes", body="a note")
        wait_for(lambda: "has 2 words" in site.log.read_text(), "job")
    reason = "'(' was never closed (notes.py, line "
    assert f"cannot import the application: {reason}" in site.log.read_text()
    assert "No such command" not in site.log.read_text()


def error_page(site: Site) -> str:
    """Return the page of an error, as a browser shows it."""
    try:
        urlopen(site.url + "notes").close()
    except HTTPError as error:
        return error.read().decode()
    return ""


def test_changed_package_is_served(site: Site) -> None:
    module = site.folder / "app" / "notes.py"
    module.write_text(module.read_text() + VERSION)
    with site.serve():
        for version in ("1.0.1", "1.1.1", "1.0.1"):
            package = f"python-dotenv=={version}"
            run(PROGRAMS / "uv", "pip", "install", package, cwd=site.folder)
            module.touch()
            wait_for(partial(serves, site, version), f"version {version}")
            reload(site)  # The fork inherits the package from its parent.
            assert serves(site, version)


def serves(site: Site, version: str) -> bool:
    return site.page("notes/version") == version


def reload(site: Site) -> None:
    """Save a file and wait until it is served."""
    before = times_served(site)
    (site.folder / "app" / "notes.py").touch()
    wait_for(lambda: times_served(site) > before, "reload")


def times_served(site: Site) -> int:
    """Count the reloads and the starts, as after a change of packages."""
    return len(re.findall("Reloaded in|Serving http", site.log.read_text()))
