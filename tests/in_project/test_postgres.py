"""The embedded PostgreSQL, each in a folder of the test's own."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg2
import pytest
from click import ClickException
from flask_devserver import postgres
from flask_devserver.embedded import is_running

from .conftest import connect
from .core.reload_server import DEV, PACKAGE, ROOT, RUN, Server, poll

REAPER = "flask_devserver.postgres"

CLIENT = """
import sys
from pathlib import Path
from flask_devserver import postgres
print(postgres.ensure_database(Path(sys.argv[1]), "app"), flush=True)
sys.stdin.read()
"""
AS_NOBODY = """
import os, sys
from pathlib import Path
from flask_devserver import postgres
os.setuid(65534)
postgres.ensure_database(Path(sys.argv[1]), "app")
"""


as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="it is not root"
)


class Client:
    """A process that asks for the server in `folder`, and keeps running."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", CLIENT, folder],
            cwd=ROOT,
            **options,
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


StartClient = Callable[..., Client]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "it's a $folder" / "postgres"
    yield folder
    assert has_ended(folder), programs(folder)
    shutil.rmtree(folder.resolve())  # For root, it is a link.


@pytest.fixture
def start(folder: Path) -> Iterator[StartClient]:
    clients = []

    def start(**options: Any) -> Client:
        clients.append(Client(folder, **options))
        return clients[-1]

    yield start
    for client in reversed(clients):  # The first may wait for the reaper.
        client.kill()


def test_clients_share_one_server_that_stops_with_the_last(
    folder: Path, start: StartClient
) -> None:
    clients = [start() for _ in range(8)]
    [url] = {client.url() for client in clients}
    for client in clients[1:]:
        client.kill()
    assert query(url, "SELECT current_database()") == "app"
    clients[0].kill()
    assert has_ended(folder)


def test_first_client_ends_its_pipes_while_the_server_runs(
    folder: Path, start: StartClient
) -> None:
    first = start(stderr=subprocess.PIPE)
    assert first.url() == start().url()
    first.process.communicate(timeout=60)  # It reads both to their end.
    assert not has_ended(folder)


def test_data_and_port_outlive_the_server(folder: Path, start: StartClient) -> None:
    first = start()
    url = first.url()
    query(url, "CREATE TABLE a (b text); SELECT 1")
    first.kill()
    assert has_ended(folder)
    assert start().url() == url
    assert query(url, "SELECT count(*) FROM a") == 0


@pytest.mark.parametrize("program", ["bin/postgres", REAPER])
def test_next_client_replaces_a_killed_program(
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


def test_reaper_restarts_a_killed_server(folder: Path, start: StartClient) -> None:
    url = start().url()
    query(url, "CREATE TABLE a (b text); SELECT 1")
    [server] = [found for found in programs(folder) if "bin/postgres" in title(found)]
    server.kill()
    server.wait()
    assert poll(lambda: responds(url))
    assert query(url, "SELECT count(*) FROM a") == 0


def test_client_is_known_although_the_clock_has_changed(tmp_path: Path) -> None:
    server = postgres.PostgreSQL(tmp_path / "postgres")
    process = psutil.Process()
    client = tmp_path / "postgres" / "clients" / str(process.pid)
    client.parent.mkdir(parents=True)
    for known in (str(hash(process)), ""):  # Older versions leave it empty.
        client.write_text(known)
        os.utime(client, (0, 0))
        assert server._has_client()
    client.write_text("0")
    assert not server._has_client()  # Another process had this id.
    assert not list(client.parent.iterdir())


def test_new_reaper_knows_the_clients_of_the_previous_one(
    folder: Path, start: StartClient
) -> None:
    first = start()
    url = first.url()
    [reaper] = [found for found in programs(folder) if REAPER in title(found)]
    reaper.kill()
    second = start()
    second.url()
    second.kill()
    files = folder / "clients"
    assert poll(lambda: len(list(files.iterdir())) == 1)
    assert query(url, "SELECT 1") == 1


def test_server_stops_when_its_folder_is_removed(
    folder: Path, start: StartClient
) -> None:
    start().url()
    home, running = folder.resolve(), programs(folder)
    shutil.rmtree(home / "clients")
    if folder.is_symlink():
        folder.unlink()
    # They may wait for their parent to notice that they have ended.
    assert poll(lambda: not any(map(title, running)))
    if not folder.exists():
        folder.symlink_to(home)


def test_server_without_free_connections_keeps_running(
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


def test_other_process_with_the_servers_id_is_not_mistaken_for_it(
    folder: Path, start: StartClient
) -> None:
    first = start()
    first.url()
    first.kill()
    assert has_ended(folder)
    (folder / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n")
    assert start().url()


@pytest.mark.parametrize("command", [RUN, DEV], ids=" ".join)
def test_reloads_keep_the_server_and_the_stop_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Sequence[str]
) -> None:
    folder = tmp_path / "instance" / "postgres"
    with Server(tmp_path, command=command, DATABASE_URL="") as server:
        monkeypatch.setenv("PGSERVICEFILE", str(folder / "pg_service.conf"))
        url = f"service=dev dbname={PACKAGE}"
        started = query(url, "SELECT pg_postmaster_start_time()")
        for _ in range(3):
            server.reload()
            assert server.request("/readyz")["status"] == "ok"
            # The parent listens for the process that serves, and no more.
            sockets = server.process.net_connections()
            assert {socket.status for socket in sockets} == {psutil.CONN_LISTEN}
        assert query(url, "SELECT pg_postmaster_start_time()") == started
        server.interrupt()
        assert has_ended(folder)
        assert server.unexpected() == []
    shutil.rmtree(folder.resolve())


def test_database_is_there_before_flask_dev_serves(tmp_path: Path) -> None:
    with Server(tmp_path, command=DEV, DATABASE_URL="") as server:
        before, _, _ = server.log.partition(" * Serving")
        assert "INFO Creating a PostgreSQL in" in before
        assert re.search("INFO Applied the migrations up to .*sql\n", before)
        server.interrupt()
    folder = tmp_path / "instance" / "postgres"
    assert has_ended(folder)
    shutil.rmtree(folder.resolve())


def test_removed_folder_is_replaced_at_the_next_connection(tmp_path: Path) -> None:
    folder = tmp_path / "instance" / "postgres"
    with Server(tmp_path, command=DEV, DATABASE_URL="") as server:
        former = programs(folder)
        shutil.rmtree(folder.resolve(), ignore_errors=True)  # The server writes there.
        shutil.rmtree(folder.parent, ignore_errors=True)
        assert poll(lambda: server.request("/readyz")["status"] == "ok")
        current = programs(folder)
        # The former reaper must not take part any more.
        assert poll(lambda: not any(map(is_running, former)))
        assert server.request("/readyz")["status"] == "ok"
        assert any(map(is_running, current))
        server.interrupt()
    assert has_ended(folder)
    shutil.rmtree(folder.resolve())


def test_simultaneous_first_requests_create_one_database(tmp_path: Path) -> None:
    folder = tmp_path / "instance" / "postgres"
    with Server(tmp_path, DATABASE_URL="") as server:
        server.interrupt()
        assert has_ended(folder)
        shutil.rmtree(folder.resolve())
        shutil.rmtree(folder.parent)
        before = len(server.log)
        server.start()
        server.wait_for(lambda: not server.port_is_free(), "server")
        with ThreadPoolExecutor(4) as threads:
            versions = list(threads.map(server.request, ["/version"] * 4))
        assert len(versions) == 4
        log = server.log[before:]
        assert log.count("Creating a PostgreSQL") == log.count("Applied") == 1
        server.interrupt()
    assert has_ended(folder)
    shutil.rmtree(folder.resolve())


def test_role_is_not_a_superuser_and_owns_its_database(start: StartClient) -> None:
    url = start().url()
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        query(url, "CREATE TABLE a (b text); COPY a FROM PROGRAM 'id'; SELECT 1")
    owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'app'"
    assert query(url, owner) == query(url, "SELECT current_user")


def test_service_file_replaces_a_password_on_the_command_line(
    folder: Path, start: StartClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start().url()
    services = folder / "pg_service.conf"
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    assert services.stat().st_mode & 0o777 == 0o600
    assert query("service=dev", "SELECT current_database()") == "app"
    assert query("service=admin", "SHOW is_superuser") == "on"


def test_other_users_can_neither_open_the_locks_nor_their_folder(
    folder: Path, start: StartClient
) -> None:
    start(umask=0).url()
    locks = list(folder.parent.glob("*.lock"))
    assert len(locks) == 2
    assert {lock.stat().st_mode & 0o777 for lock in locks} == {0o600}
    assert folder.parent.stat().st_mode & 0o777 == 0o700


def test_folder_of_an_older_version_is_named(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    with pytest.raises(ClickException, match="is from an older version: move it"):
        postgres.ensure_database(folder, "app")


@as_root
def test_root_uses_no_folder_of_another_user(folder: Path) -> None:
    folder.mkdir(parents=True)
    shutil.chown(folder, "nobody")
    with pytest.raises(ClickException, match="belongs to the user 65534: run"):
        postgres.ensure_database(folder, "app")


@as_root
def test_ordinary_user_uses_no_folder_of_root() -> None:
    with TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        (Path(place) / "instance").mkdir(mode=0o700)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, f"{place}/instance/postgres"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert "instance is not writable: run this as its owner" in done.stderr


@as_root
def test_root_owns_all_but_the_data(folder: Path, start: StartClient) -> None:
    start().url()
    home = folder.resolve()
    owners = {path.name: path.owner() for path in (home, *home.iterdir())}
    assert owners.pop("data") == "nobody"
    assert set(owners.values()) == {"root"}
    assert home.stat().st_mode & 0o777 == 0o711
    assert {path.stat().st_mode & 0o022 for path in home.iterdir()} == {0}


@as_root
@pytest.mark.parametrize("name", ["log", "postmaster.pid"])
def test_root_follows_no_link_in_the_data(
    folder: Path, start: StartClient, tmp_path: Path, name: str
) -> None:
    first = start()
    first.url()
    first.kill()
    assert has_ended(folder)
    secret = tmp_path / "secret"
    secret.write_text("1\n")
    secret.chmod(0o600)
    planted = folder / "data" / name
    planted.unlink(missing_ok=True)
    planted.symlink_to(secret)
    start().url()
    assert (secret.read_text(), secret.owner()) == ("1\n", "root")


@as_root
def test_root_waits_for_no_pipe_in_the_data(folder: Path, start: StartClient) -> None:
    first = start()
    first.url()
    first.kill()
    assert has_ended(folder)
    os.mkfifo(folder / "data" / "postmaster.pid")
    assert start().url()


@as_root
def test_server_inherits_nothing_of_roots_environment(
    folder: Path, start: StartClient
) -> None:
    start(env=os.environ | {"SECRET_KEY": "a secret"}).url()
    data = folder.resolve() / "data"
    servers = [found for found in programs(folder) if cwd(found) == str(data)]
    assert servers
    assert not [found for found in servers if "SECRET_KEY" in found.environ()]


def test_copied_programs_are_readable_for_every_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "_reachable", lambda: tmp_path / "programs")
    monkeypatch.setattr(postgres, "_site_packages", lambda: [tmp_path / "venv"])
    (tmp_path / "venv" / postgres.WHEEL).mkdir(parents=True)
    (tmp_path / "venv" / postgres.WHEEL / "initdb").touch(mode=0o700)
    for _ in range(2):  # Another server may do it at the same time.
        with strict_umask():
            postgres._copy_programs()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["programs", "venv"]
    copied = [tmp_path / "programs", *(tmp_path / "programs").rglob("*")]
    assert [path.stat().st_mode & 0o777 for path in copied] == [0o755] * 3


@as_root
def test_server_starts_under_a_strict_umask(start: StartClient) -> None:
    assert query(start(umask=0o077).url(), "SELECT 1") == 1


@as_root
def test_removed_folder_leaves_no_data_behind(folder: Path, start: StartClient) -> None:
    first = start()
    query(first.url(), "CREATE TABLE a (b text); SELECT 1")
    first.kill()
    assert has_ended(folder)
    home = folder.resolve()
    shutil.rmtree(folder.parent)
    url = start().url()
    assert folder.resolve() == home
    assert query(url, "SELECT to_regclass('a')") is None


def test_copied_project_has_a_server_of_its_own(tmp_path: Path) -> None:
    clients: list[Client] = []

    def url(project: str) -> str:
        clients.append(Client(tmp_path / project / "instance" / "postgres"))
        return clients[-1].url()

    (tmp_path / "first").mkdir()
    query(url("first"), "CREATE TABLE a (b text); SELECT 1")
    clients[0].kill()
    assert has_ended(tmp_path / "first" / "instance" / "postgres")
    shutil.copytree(tmp_path / "first", tmp_path / "copy", symlinks=True)
    assert len({url("first"), url("copy")}) == 2
    for client in clients:
        client.kill()
    for project in ("first", "copy"):
        assert has_ended(tmp_path / project / "instance" / "postgres")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert query(url("moved"), "SELECT count(*) FROM a") == 0
    clients[-1].kill()
    for project in ("moved", "copy"):
        folder = tmp_path / project / "instance" / "postgres"
        assert has_ended(folder)
        shutil.rmtree(folder.resolve())


@as_root
def test_clients_of_a_copy_that_start_together_share_its_server(tmp_path: Path) -> None:
    original = tmp_path / "first" / "instance" / "postgres"
    original.parent.mkdir(parents=True)
    postgres.PostgreSQL(original).make_home()
    shutil.copytree(tmp_path / "first", tmp_path / "copy", symlinks=True)
    copy = tmp_path / "copy" / "instance" / "postgres"
    one, two = postgres.PostgreSQL(copy), postgres.PostgreSQL(copy)
    one.make_home()
    (one.home / "data").mkdir()
    (one.home / "pg_service.conf").touch()
    two.make_home()
    assert two.home == one.home != original.resolve()
    assert (copy / "data").exists()
    for folder in (original, copy):
        shutil.rmtree(folder.resolve())


@as_root
def test_server_starts_after_a_kill_while_it_wrote_its_link(
    folder: Path, start: StartClient
) -> None:
    client = start()
    url = client.url()
    (folder.resolve() / "link").write_text("")
    assert start().url() == url
    assert (folder.resolve() / "link").read_text() == str(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PGSSLMODE", "require"),
        ("PGREQUIRESSL", "1"),
        ("PGSSLROOTCERT", "system"),
        ("PGGSSENCMODE", "require"),
        ("PGCHANNELBINDING", "require"),
        ("PGHOSTADDR", "127.0.0.9"),
        ("PGTARGETSESSIONATTRS", "standby"),
    ],
)
def test_settings_for_another_server_do_not_matter(
    start: StartClient, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert query(start().url(), "SELECT 1") == 1


def test_service_for_another_server_does_not_matter(
    start: StartClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    services = tmp_path / "services.conf"
    services.write_text("[prod]\nhost=db.example.com\nsslmode=require\n")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    monkeypatch.setenv("PGSERVICE", "prod")
    assert query(start().url(), "SELECT 1") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Others need a parameter.")
def test_url_has_no_parameters_that_only_libpq_knows(
    start: StartClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in postgres.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert urlsplit(start().url()).query == ""


def test_time_zone_is_utc(start: StartClient) -> None:
    client = start(env={**os.environ, "TZ": "America/New_York"})
    assert query(client.url(), "SHOW timezone") == "UTC"


def test_error_gives_the_reason_in_the_log(folder: Path, start: StartClient) -> None:
    client = start()
    assert client.url()
    client.kill()
    assert has_ended(folder)
    (folder / "data" / "PG_VERSION").write_text("1\n")
    with pytest.raises(ClickException, match="initialized by PostgreSQL version 1,"):
        postgres.ensure_database(folder, "app")


def test_error_names_the_character_in_the_path_of_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = postgres._bin_dir()
    odd = Path(tempfile.mkdtemp(prefix="a$b")) / "bin"
    odd.parent.chmod(0o755)
    shutil.copytree(programs, odd)
    monkeypatch.setattr(postgres, "_bin_dir", lambda: odd)
    server = postgres.PostgreSQL(tmp_path / "postgres")
    server.make_home()
    with pytest.raises(ClickException, match=r"avoid \$"):
        server._start()
    shutil.rmtree(server.home)
    shutil.rmtree(odd.parent)


@contextmanager
def strict_umask() -> Iterator[None]:
    """Create files that only their owner can read."""
    former = os.umask(0o077)
    yield
    os.umask(former)


def has_ended(folder: Path) -> bool:
    """Wait until nothing of the server in `folder` runs."""
    return bool(poll(lambda: not programs(folder)))


def programs(folder: Path) -> list[psutil.Process]:
    """Return the processes that run for the server in `folder`."""
    data = str(folder.resolve() / "data")
    return [
        process
        for process in psutil.process_iter()
        if f"{REAPER} {folder}" in title(process) or cwd(process) == data
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


def responds(url: str) -> bool:
    """Return whether the database answers a query."""
    with suppress(psycopg2.OperationalError):
        return query(url, "SELECT 1") == 1
    return False


def query(url: str, sql: str) -> object:
    """Return the one value that the query gives."""
    with closing(connect(url)) as conn, conn.cursor() as cursor:
        cursor.execute(sql)
        [[value]] = cursor.fetchall()
        return value
