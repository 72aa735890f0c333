"""The embedded PostgreSQL, each in a folder of the test's own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import psutil
import psycopg2
import pytest

from .conftest import connect
from .core.reload_server import PACKAGE, ROOT, Server, poll

KEEPER = "flask_devserver.postgres"

CLIENT = """
import sys
from pathlib import Path
from flask_devserver import postgres
print(postgres.url(Path(sys.argv[1]), "app"), flush=True)
sys.stdin.read()
"""


class Client:
    """A process that asks for the server in `folder`, and keeps running."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, folder],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def url(self) -> str:
        """Wait for the server's URL."""
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        """End the process without a word."""
        self.process.kill()
        self.process.communicate()


StartClient = Callable[[], Client]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "it's a $folder" / "postgres"
    yield folder
    assert has_ended(folder), programs(folder)
    shutil.rmtree(folder.resolve())  # which as root is elsewhere


@pytest.fixture
def start(folder: Path) -> Iterator[StartClient]:
    clients = []

    def start() -> Client:
        clients.append(Client(folder))
        return clients[-1]

    yield start
    for client in clients:
        client.kill()


def test_all_share_one_server_that_ends_with_the_last(
    folder: Path, start: StartClient
) -> None:
    clients = [start() for _ in range(8)]
    [url] = {client.url() for client in clients}
    for client in clients[1:]:
        client.kill()
    assert query(url, "SELECT current_database()") == "app"
    clients[0].kill()
    assert has_ended(folder)


def test_data_and_port_outlive_the_server(folder: Path, start: StartClient) -> None:
    first = start()
    url = first.url()
    query(url, "CREATE TABLE a (b text); SELECT 1")
    first.kill()
    assert has_ended(folder)
    assert start().url() == url
    assert query(url, "SELECT count(*) FROM a") == 0


@pytest.mark.parametrize("program", ["bin/postgres", KEEPER])
def test_next_who_asks_replaces_what_was_killed(
    folder: Path, start: StartClient, program: str
) -> None:
    first = start()
    query(first.url(), "CREATE TABLE a (b text); SELECT 1")
    [killed] = [found for found in programs(folder) if program in title(found)]
    killed.kill()
    second = start()
    assert query(second.url(), "SELECT count(*) FROM a") == 0
    first.kill()
    second.kill()
    assert has_ended(folder)


def test_new_keeper_knows_the_owners_of_the_one_before(
    folder: Path, start: StartClient
) -> None:
    first = start()
    url = first.url()
    [keeper] = [found for found in programs(folder) if KEEPER in title(found)]
    keeper.kill()
    second = start()
    second.url()
    second.kill()
    owners = folder / "owners"
    assert poll(lambda: len(list(owners.iterdir())) == 1)
    assert query(url, "SELECT 1") == 1


def test_server_ends_when_its_folder_is_taken_away(
    folder: Path, start: StartClient
) -> None:
    start().url()
    home, running = folder.resolve(), programs(folder)
    shutil.rmtree(home / "owners")
    if folder.is_symlink():
        folder.unlink()
    # They may wait for their parent to notice that they have ended.
    assert poll(lambda: not any(map(title, running)))
    if not folder.exists():
        folder.symlink_to(home)


def test_server_whose_connections_are_used_up_is_left_as_it_is(
    folder: Path, start: StartClient
) -> None:
    url = start().url()
    with ExitStack() as stack:
        with suppress(psycopg2.OperationalError):
            while True:
                stack.enter_context(closing(connect(url)))
        second = start()
        stack.close()
        assert second.url() == url


def test_other_process_with_the_servers_id_is_not_taken_for_it(
    folder: Path, start: StartClient
) -> None:
    first = start()
    first.url()
    first.kill()
    assert has_ended(folder)
    (folder / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n")
    assert start().url()


def test_reloads_keep_the_server_and_the_stop_ends_it(tmp_path: Path) -> None:
    folder = tmp_path / "instance" / "postgres"
    with Server(tmp_path, DATABASE_URL="") as server:
        url = (folder / "url").read_text() + PACKAGE
        started = query(url, "SELECT pg_postmaster_start_time()")
        for _ in range(3):
            server.reload()
            assert server.request("/readyz")["status"] == "ok"
            # The reloader's parent listens for the process that serves, and no more.
            sockets = server.process.net_connections()
            assert {socket.status for socket in sockets} == {psutil.CONN_LISTEN}
        assert query(url, "SELECT pg_postmaster_start_time()") == started
        server.interrupt()
        assert has_ended(folder)
        assert server.unexpected() == []
    shutil.rmtree(folder.resolve())


def has_ended(folder: Path) -> bool:
    """Wait until nothing of the server in `folder` runs."""
    return bool(poll(lambda: not programs(folder)))


def programs(folder: Path) -> list[psutil.Process]:
    """Return the processes that run for the server in `folder`."""
    data = str(folder.resolve() / "data")
    return [
        process
        for process in psutil.process_iter()
        if f"{KEEPER} {folder}" in title(process) or cwd(process) == data
    ]


def title(process: psutil.Process) -> str:
    """Return the command line of the process, or nothing when it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def cwd(process: psutil.Process) -> str:
    """Return where the process is, or nothing when it has ended or is not ours."""
    with suppress(psutil.Error):
        return process.cwd()
    return ""


def query(url: str, sql: str) -> object:
    """Return the one value that the query gives."""
    with closing(connect(url)) as conn, conn.cursor() as cursor:
        cursor.execute(sql)
        [[value]] = cursor.fetchall()
        return value
