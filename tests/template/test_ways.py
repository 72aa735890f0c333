"""The template works from a folder, an archive or a repository."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ..support.answers import QUESTIONS, Answers, choices
from ..support.commands import PROGRAMS, clean_environment, run
from ..support.projects import Bake, contents
from ..support.repository import copy_template, start_repository

pytestmark = pytest.mark.slow

# An answer that is not the default, for every question.
ANSWERS = {name: others[-1] for name, others in choices().items()} | {
    "project_name": "Our Notes",
    "project_slug": "app",
    "description": "Notes of ours.",
    "author_name": "D'Arcy",
    "author_email": "me@example.com",
}

SENTENCES = {
    "cookiecutter": "This is Cookiecutter 2.6.0: install 2.7 or later.",
    "python": "Cookiecutter runs on Python 3.10: run it on Python 3.11 or later, "
    "as `uvx --python 3.13 cookiecutter` does.",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the whole template."""
    folder = copy_template(tmp_path_factory.mktemp("repositories") / "whole")
    start_repository(folder)
    return folder


@pytest.fixture
def expected(bake: Bake) -> dict[str, str]:
    """The files that each way of baking must produce."""
    return contents(bake(**ANSWERS))


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Cookiecutter configuration of a new user."""
    folder = tmp_path / "user"
    folder.mkdir()
    path = folder / "config"
    settings = dict.fromkeys(["replay_dir", "cookiecutters_dir"], str(folder))
    path.write_text(json.dumps(settings))
    monkeypatch.setenv("COOKIECUTTER_CONFIG", str(path))
    return path


def test_every_answer_can_be_an_argument(
    whole: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    assert set(ANSWERS) == {name for name in QUESTIONS if not name.startswith("_")}
    assert baked(tmp_path, whole, "--no-input", *on_command_line(ANSWERS)) == expected


@pytest.mark.parametrize("kind", ["git+file://{}", "{}.zip"])
def test_template_can_be_anywhere(
    whole: Path, tmp_path: Path, expected: dict[str, str], kind: str
) -> None:
    shutil.make_archive(str(whole), "zip", whole.parent, whole.name)
    options = ["--no-input", *on_command_line(ANSWERS)]
    assert baked(tmp_path, kind.format(whole), *options) == expected


def test_answers_can_be_configured(
    whole: Path, tmp_path: Path, expected: dict[str, str], configuration: Path
) -> None:
    settings = json.loads(configuration.read_text()) | {"default_context": ANSWERS}
    configuration.write_text(json.dumps(settings))
    assert baked(tmp_path, whole, "--no-input") == expected


def test_last_answers_can_be_replayed(
    whole: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    baked(tmp_path, whole, "--no-input", *on_command_line(ANSWERS))
    shutil.rmtree(tmp_path / "app")
    assert baked(tmp_path, whole, "--replay") == expected


@pytest.mark.parametrize("command", [["cookiecutter"], ["cruft", "create"]], ids=str)
@pytest.mark.parametrize("what", SENTENCES)
def test_old_program_is_rejected(
    whole: Path, tmp_path: Path, what: str, command: list[str]
) -> None:
    forge_old_versions(tmp_path / "forged")
    folder, temporary = tmp_path / "folder", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    environ = {"PYTHONPATH": str(tmp_path / "forged" / what), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [PROGRAMS / command[0], *command[1:], whole, "--no-input"],
        cwd=folder,
        env=clean_environment() | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == SENTENCES[what]
    assert list(folder.iterdir()) == []
    # Cookiecutter itself leaves the script of a failed hook behind.
    assert [path for path in temporary.iterdir() if path.suffix != ".py"] == []


def forge_old_versions(folder: Path) -> None:
    """Make folders for PYTHONPATH that pretend to an old Cookiecutter or Python."""
    metadata = folder / "cookiecutter" / "cookiecutter-2.6.0.dist-info" / "METADATA"
    customization = folder / "python" / "sitecustomize.py"
    for path in (metadata, customization):
        path.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: cookiecutter\nVersion: 2.6.0\n")
    hook = "sys.orig_argv[-1].endswith('.py')"
    version = "sys.version_info = (3, 10, 0, 'final', 0)"
    customization.write_text(f"import sys\nif {hook}:\n    {version}\n")


def on_command_line(answers: Answers) -> list[str]:
    """Return the answers as arguments of Cookiecutter."""
    return [f"{name}={value}" for name, value in answers.items()]


def baked(folder: Path, template: str | Path, *options: str) -> dict[str, str]:
    """Bake in the folder and return the text of each generated file."""
    flags = [option for option in options if option.startswith("--")]
    answers = [option for option in options if not option.startswith("--")]
    run(PROGRAMS / "cookiecutter", *flags, template, *answers, cwd=folder)
    return contents(folder / "app")
