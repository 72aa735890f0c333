"""The commands of a document, and a terminal to type them into."""

import os
import re
import signal
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from markdown_it import MarkdownIt

from .commands import DEADLINE, clean_environment, run, wait_for
from .serving import free_port, page

LASTS = re.compile(
    r"(^make demo.*| flask( --app \w+)? (dev|run --debug|worker)| serve)$"
)


class Command(NamedTuple):
    """A command and the heading above it."""

    section: str
    text: str


def commands(markdown: str) -> list[Command]:
    """Return the commands of a document, in order.

    An indented block holds one command per line, perhaps with a comment. Fence
    everything else, with the name of its language.
    """
    found: list[Command] = []
    section = before = ""
    for token in MarkdownIt().parse(markdown):
        if before == "heading_open":
            section = token.content
        elif token.type == "code_block":
            whole = re.sub(r"\\\n\s*", "", token.content)  # Join continued lines.
            whole = re.sub(r"\s+# .*", "", whole)
            lines = filter(None, whole.splitlines())
            found += [Command(section, line) for line in lines]
        elif token.type == "fence":
            message = f"Indent commands, or name the language:\n{token.content}"
            assert token.info not in ("", "sh", "bash", "shell", "console"), message
        before = token.type
    return found


def blocks(markdown: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks in that language."""
    tokens = MarkdownIt().parse(markdown)
    return [token.content for token in tokens if token.info == language]


DEBUGGER_PORT = "5678"  # in the documents


class Terminal:
    """A terminal that runs commands one after the other and starts in `folder`.

    A server or a worker must respond. It runs until the next server or worker, or
    until the end of the `with` block.
    """

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder = folder
        self.port = str(free_port())
        self.log = folder / "terminal.log"
        self.environ = environ | {
            "FLASK_DEV_PORT": self.port,
            "FLASK_RUN_PORT": self.port,
            "PORT": self.port,
            "MAKEFLAGS": f"PORT={self.port}",
        }
        self.running: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        place: TracebackType | None,
    ) -> None:
        self.end()

    def type(self, command: str) -> None:
        """Run a command. Answer its questions with the defaults."""
        if command.startswith("cd "):
            self.folder /= command.removeprefix("cd ")
        elif LASTS.search(command):
            self.end()
            self.start(command.replace(DEBUGGER_PORT, str(free_port())))
        else:
            print(self.run(f"yes '' | head -n 20 | {{ {command}; }}"))

    def run(self, command: str) -> str:
        """Run a command until it exits, and return its output."""
        return run("bash", "-c", command, cwd=self.folder, **self.environ)

    def start(self, command: str) -> None:
        """Start a server or a worker, and wait until it responds."""
        with self.log.open("w") as output:
            self.running = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.folder,
                env=clean_environment() | self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # A shell makes its background jobs, such as tests, ignore SIGINT.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        is_at_work = self.works if command.endswith("worker") else self.serves
        wait_for(lambda: self.has_ended() or is_at_work(), command)
        assert not self.has_ended(), self.log.read_text()

    def has_ended(self) -> bool:
        return self.running is None or self.running.poll() is not None

    def serves(self) -> bool:
        """Return whether the server shows the notes from the database."""
        return "<h1>Notes</h1>" in page(f"http://127.0.0.1:{self.port}/notes")

    def works(self) -> bool:
        """Return whether a worker has run all jobs."""
        said = self.run("uv run flask worker --status")
        return {"waiting: 0", "running: 0", "workers: 1"} <= set(said.splitlines())

    def end(self) -> None:
        """Stop the running server or worker as Ctrl-C does."""
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGINT)
            self.running.wait(DEADLINE)
            self.running = None
