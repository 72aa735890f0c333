"""Copy the template, and use git."""

import re
import shutil
from pathlib import Path

from .commands import TEMPLATE, run

# The author of the commits.
PERSON = {
    "GIT_AUTHOR_NAME": "Nobody",
    "GIT_AUTHOR_EMAIL": "nobody@example.com",
    "GIT_COMMITTER_NAME": "Nobody",
    "GIT_COMMITTER_EMAIL": "nobody@example.com",
}


def copy_template(folder: Path) -> Path:
    """Copy the template into the folder, without the files that git ignores."""
    ignored = (TEMPLATE / ".gitignore").read_text().replace("/", "").split()
    ignore = shutil.ignore_patterns(".git", *ignored)
    return shutil.copytree(TEMPLATE, folder, ignore=ignore, dirs_exist_ok=True)


def start_repository(folder: Path) -> None:
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder)


def commit(folder: Path) -> None:
    """Commit everything, even if nothing has changed."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message=As it stands")


def git(folder: Path, *command: str) -> str:
    return run("git", *command, cwd=folder, **PERSON)


def replace(path: Path, pattern: str, text: str) -> None:
    """Replace the only match of the pattern in the file."""
    new, count = re.subn(pattern, text, path.read_text(), flags=re.M | re.S)
    assert count == 1, f"{pattern} is {count} times in {path}"
    path.write_text(new)
