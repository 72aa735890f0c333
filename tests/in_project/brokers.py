"""Brokers for Celery that keep their jobs over a restart."""

import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from .core.reload_server import _free_port, poll


class Broker:
    """A server on `port` that stores its data in `folder`."""

    environ: dict[str, str] = {}

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.port = port or _free_port()
        self.start()

    @property
    def url(self) -> str:
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command(), env=os.environ | self.environ, stdout=subprocess.DEVNULL
        )
        assert poll(self.responds)

    def responds(self) -> bool:
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True
        return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Redis(Broker):
    """A Redis or Valkey that writes each change to disk before it confirms it."""

    program = os.environ.get("BROKER_SERVER", "redis-server")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        keep = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        address = ["--bind", "127.0.0.1", "--port", str(self.port)]
        return [self.program, *address, *keep, "--dir", str(self.folder)]


class Sentinel(Redis):
    """A Sentinel that names the Redis of another `port` as its primary."""

    def __init__(self, folder: Path, primary: int) -> None:
        watch = f"sentinel monitor mymaster 127.0.0.1 {primary} 1\n"
        (folder / "sentinel.conf").write_text(watch)
        super().__init__(folder)

    @property
    def url(self) -> str:
        return f"sentinel://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        address = ["--bind", "127.0.0.1", "--port", str(self.port)]
        return [
            self.program,
            str(self.folder / "sentinel.conf"),
            "--sentinel",
            *address,
        ]


class RabbitMQ(Broker):
    """A RabbitMQ that runs as the user of the tests."""

    def __init__(self, folder: Path) -> None:
        port = _free_port()
        paths = {"MNESIA_BASE": "data", "LOG_BASE": "logs", "PID_FILE": "pid"}
        settings = {name: str(folder / path) for name, path in paths.items()}
        settings |= {"NODENAME": f"test{port}@localhost", "NODE_PORT": str(port)}
        settings |= {"DIST_PORT": str(_free_port())}
        self.environ = {f"RABBITMQ_{name}": value for name, value in settings.items()}
        self.environ["HOME"] = str(folder)  # RabbitMQ writes a cookie there.
        super().__init__(folder, port)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def command(self) -> list[str]:
        # The script of this name on the PATH switches to another user.
        return ["/usr/lib/rabbitmq/bin/rabbitmq-server"]
