"""Draw docs/images/questions.svg and docs/images/blocked.svg.

The script types commands into a real terminal and draws its screen. It needs tmux.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.text import Text

TEMPLATE = Path(__file__).parents[3]
sys.path[:0] = [str(TEMPLATE), str(TEMPLATE / "bench")]

from reload import PROGRAMS, remove_databases  # noqa: E402

from tests.support.commands import clean_environment, wait_for  # noqa: E402
from tests.support.repository import copy_template  # noqa: E402
from tests.support.serving import free_port  # noqa: E402

WIDTH = 92
ANSWERS = ["Shopping Lists", "", "Who brings what.", "Ada Lovelace"]
ANSWERS += ["ada@example.com", "", "3", "", "", ""]
THREAD = """

import threading
import time


def watch() -> None:
    while True:
        time.sleep(1)


threading.Thread(target=watch, name="pool").start()
"""
FORMAT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect fill="#16161e" width="{width}" height="{height}" rx="10"/>
<g transform="translate(16, 16)" clip-path="none">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class Terminal:
    """A terminal in `folder` with the programs of this environment on its PATH."""

    def __init__(self, folder: Path, height: int, setup: str = "") -> None:
        self.folder = folder
        self.socket = ["tmux", "-f", "/dev/null", "-S", str(folder / "tmux")]
        rc = folder / "bashrc"
        path = shlex.quote(f"{PROGRAMS}:{os.environ['PATH']}")
        rc.write_text(f"PS1='$ '\nexport PATH={path}\n{setup}")
        size = ["-x", str(WIDTH), "-y", str(height)]
        shell = f"bash --rcfile {rc}"
        start = ["new-session", "-d", *size, "-c", str(folder), shell]
        environ = clean_environment() | {"TERM": "xterm-256color"}
        subprocess.run([*self.socket, *start], env=environ, check=True)
        self.wait(r"\$ ")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        place: TracebackType | None,
    ) -> None:
        if error:
            print(self.screen(), file=sys.stderr)
        self.tmux("kill-server")

    def tmux(self, *command: str) -> str:
        done = subprocess.run(
            [*self.socket, *command], stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    def type(self, text: str) -> None:
        """Type a line."""
        self.tmux("send-keys", "-l", text)
        self.tmux("send-keys", "Enter")

    def screen(self, *options: str) -> str:
        return self.tmux("capture-pane", "-J", "-p", *options).rstrip()

    def wait(self, pattern: str) -> None:
        """Wait until the end of the screen matches the pattern."""
        wait_for(lambda: re.search(rf"({pattern})\Z", self.screen() + " "), pattern)

    def draw(self, name: str) -> None:
        """Write the screen as a picture."""
        screen = self.screen("-e").replace(str(self.folder), "/home/ada")
        text = Text.from_ansi(screen)
        console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))
        console.print(text)
        svg = console.export_svg(code_format=FORMAT, unique_id="t")
        (TEMPLATE / "docs" / "images" / f"{name}.svg").write_text(svg)


def draw_questions(folder: Path) -> None:
    """Draw the questions and their answers, as for the published template."""
    here = copy_template(folder / "template")
    setup = f"uvx() {{ shift; command cookiecutter {here}; }}"
    with Terminal(folder, 50, setup) as terminal:
        terminal.type("uvx cookiecutter gh:org/flask-db-template")
        for number, text in enumerate(ANSWERS, 1):
            terminal.wait(rf"(?s:.*)\[{number}/10\](?s:.*): ")
            terminal.type(text)
        terminal.wait(r"has the details.\n(?s:.*)\$ ")
        terminal.draw("questions")


def draw_reload(folder: Path) -> None:
    """Draw two reloads and one that a thread blocks."""
    command = [
        PROGRAMS / "cookiecutter",
        TEMPLATE,
        "--no-input",
        "--accept-hooks",
        "no",
    ]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    project = folder / "my_flask_app"
    subprocess.run([PROGRAMS / "uv", "sync", "--quiet"], cwd=project, check=True)
    module = project / "my_flask_app" / "notes.py"
    good = module.read_text()
    with Terminal(folder, 40, f"export FLASK_DEV_PORT={free_port()}") as terminal:
        terminal.type("cd my_flask_app")
        terminal.type("uv run flask dev")
        terminal.wait(r"press Ctrl-C to quit\.\s*")
        for text in (good + "\n", good + THREAD, good):
            before = terminal.screen().count("Reloaded")
            module.write_text(text)
            wait_for(lambda n=before: terminal.screen().count("Reloaded") > n, "reload")
        terminal.draw("blocked")
        terminal.tmux("send-keys", "C-c")
        terminal.wait(r"\$ ")
    remove_databases(folder)


def main() -> None:
    for draw in (draw_questions, draw_reload):
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder))


if __name__ == "__main__":
    main()
