"""`make demo` works at any path, and explains its failures."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.commands import PROGRAMS, clean_environment
from ..support.repository import copy_template

PLAIN = "/usr/bin:/bin"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the template with a .venv, at a path that a shell would expand."""
    folder = copy_template(tmp_path / 'a $HOME `id` "b"')
    script = f'#!/bin/sh\nexec {shlex.quote(str(PROGRAMS / "python"))} "$@"\n'
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(script)
    python.chmod(0o755)
    (folder / ".venv" / "ready").touch()
    return folder


def make(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run make on the clone, without uv on the PATH."""
    return subprocess.run(
        ["make", *words],
        cwd=folder,
        env=clean_environment() | {"PATH": PLAIN} | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_demo_takes_answers_from_arguments_or_environment(clone: Path) -> None:
    assert make(clone, "bake", "POOL=sqlalchemy", WORKER="thread").returncode == 0
    assert os.listdir(clone / ".demo") == ["demo_sqlalchemy_thread"]
    assert "--port '5001'" in make(clone, "--dry-run", "demo", PORT="5001").stdout


def test_demo_needs_no_home_that_can_be_written(clone: Path) -> None:
    assert make(clone, "bake", HOME="/proc").returncode == 0


def test_demo_shows_the_message_about_a_rejected_slug(clone: Path) -> None:
    done = make(clone, "bake", "SLUG=flask")
    assert done.returncode == 2
    assert done.stdout.startswith("project_slug is 'flask', a name that Python,")
    assert not (clone / ".demo" / "flask").exists()


def test_demo_explains_that_the_folder_exists(clone: Path) -> None:
    (clone / ".demo" / "mine").mkdir(parents=True)
    done = make(clone, "bake", "SLUG=mine")
    assert done.returncode == 2
    sentence = ".demo/mine exists: remove it, or choose another SLUG."
    assert done.stdout.splitlines()[0] == sentence


def test_demo_uses_uv_on_the_path(clone: Path, tmp_path: Path) -> None:
    (clone / ".venv" / "ready").unlink()
    (tmp_path / "uv").write_text("#!/bin/sh\necho uv was given $*\n")
    (tmp_path / "uv").chmod(0o755)
    done = make(clone, ".venv/ready", PATH=f"{tmp_path}:{PLAIN}")
    assert "uv was given sync --quiet" in done.stdout
    assert done.returncode == 0


def test_demo_ignores_an_environment_elsewhere(clone: Path, tmp_path: Path) -> None:
    (clone / ".venv" / "ready").unlink()
    (tmp_path / "uv").write_text("#!/bin/sh\necho in $UV_PROJECT_ENVIRONMENT\n")
    (tmp_path / "uv").chmod(0o755)
    path = f"{tmp_path}:{PLAIN}"
    done = make(clone, ".venv/ready", PATH=path, UV_PROJECT_ENVIRONMENT="/elsewhere")
    assert "in .venv\n" in done.stdout


@pytest.mark.slow
def test_demo_installs_uv_where_pip_installs_for_the_user(clone: Path) -> None:
    shutil.rmtree(clone / ".venv")
    environ = {"PIP_USER": "1", "PIP_NO_INDEX": "1"}
    done = make(clone, ".venv/ready", f"PYTHON={sys.executable}", **environ)
    # pip looks for uv, instead of refusing to install outside the environment.
    assert "No matching distribution found for uv" in done.stdout


def test_demo_explains_how_to_replace_ensurepip(clone: Path, tmp_path: Path) -> None:
    (clone / ".venv" / "ready").unlink()
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    done = make(clone, ".venv/ready", f"PYTHON={tmp_path / 'python'}")
    assert done.returncode == 2
    assert "install uv, or the package python3-venv." in done.stdout
