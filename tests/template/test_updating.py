"""`cruft update` merges later releases and other answers into a project."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ..support.actions import Runner
from ..support.answers import choices
from ..support.commands import ON_PATH, PROGRAMS, TEMPLATE, run
from ..support.documents import blocks, commands
from ..support.projects import Bake, contents, files, install
from ..support.repository import (
    PERSON,
    commit,
    copy_template,
    git,
    replace,
    start_repository,
)

pytestmark = pytest.mark.slow

PROJECT = "{{cookiecutter.project_slug}}"

# The release before this one: a pattern in each file, and its text in that release.
BEFORE = {
    f"{PROJECT}/pyproject.toml": (r'"psycopg2-binary>=[\d.]+', '"psycopg2-binary>=2'),
    f"{PROJECT}/README.md": (r"^You need Python [\d.]+ or later", "Python"),
    f"{PROJECT}/{PROJECT}/__init__.py": (r"Create the application", "Make it"),
    f"{PROJECT}/{PROJECT}/core/health.py": (r"\Z", "\n\nUNUSED = True\n"),
    "templates/pool/psycopg2.py": (r'\A"""[^\n]*', '"""A pool.'),
}
# The release before that.
FIRST = (f"{PROJECT}/pyproject.toml", r'"mypy>=[\d.]+', '"mypy>=1')
ADDED = f"{PROJECT}/tests/core/test_migrate.py"
REMOVED = f"{PROJECT}/setup.cfg"

HELLO = '''
from flask import Blueprint, current_app

from .core.config import Settings, number_setting

SETTINGS: Settings = {"GREETINGS": number_setting(3)}

bp = Blueprint("hello", __name__)


@bp.get("/hello")
def hello() -> str:
    """Greet as often as `GREETINGS` says."""
    return "Hello! " * int(current_app.config["GREETINGS"])
'''
TEST_HELLO = """
from flask.testing import FlaskClient


def test_greeting(client: FlaskClient) -> None:
    assert client.get("/hello").text == "Hello! " * 3
"""

# The last commit before the machinery moved into `core/`, and an owner's module.
BEFORE_CORE = "79b94f205a4617f2716a372acdae2facc358ec66"
HELLO_BEFORE_CORE = """
from flask import Blueprint, current_app

from .config import number

bp = Blueprint("hello", __name__)


@bp.get("/hello")
def hello() -> str:
    return "Hello! " * number(current_app, "GREETINGS", 3)
"""


GH = """#!/bin/sh
echo "$@" >> "$CALLS"
test "$2" != list || echo 0
"""

# The value of the secret `TEMPLATE_TOKEN`, and a hook that looks for it.
TOKEN = "github_pat_0123456789"
SPY = """
import os
open({0!r}, "a").write(str(dict(os.environ)))
"""

CLOCK = """
import datetime, os

AHEAD = datetime.timedelta(days=int(os.environ["DAYS_AHEAD"]))


class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + AHEAD

    @classmethod
    def utcnow(cls):
        return super().utcnow() + AHEAD


datetime.datetime = Later
"""

# The owner's changes to a project: new files, and lines after existing ones.
OWN = {"app/hello.py": HELLO.lstrip(), "tests/test_hello.py": TEST_HELLO.lstrip()}
REGISTER = "    app.register_blueprint(hello.bp)\n"
EDITS = {
    "app/__init__.py": (r"register_blueprint\(notes.bp\)\n", REGISTER),
    ".env.example": (r"\Z", "\n# How often to greet.\n#GREETINGS=3\n"),
    ".gitignore": (r"\Z", "*.log\n"),
    "README.md": (r"\Z", "\n## Greetings\n\nThere are three of them.\n"),
    "pyproject.toml": (r'    "flask>[^\n]*\n', '    "flask-login>=0.6",\n'),
}


NAMES = {
    "https://github.com/org/flask-db-template": "{}",
    "cruft link": "git rm .cruft.json\ngit commit --message Unlinked\ncruft link",
    "--checkout v0.1.0": "--checkout before",
    "--checkout v0.2.0": "--checkout now",
}


class Project:
    """A project made from a release of the template in `repository`, under git."""

    def __init__(self, repository: Path, parent: Path, release: str, **answers: object):
        answers = {"project_slug": "app"} | answers
        self.folder = parent / str(answers["project_slug"])
        options = ["--no-input", "--checkout", release, "--extra-context"]
        cruft("create", repository, *options, json.dumps(answers), cwd=parent)
        start_repository(self.folder)

    def update(self, environ: dict[str, str] | None = None, **answers: object) -> str:
        """Update to the newest release, with other answers if any are given.

        Return the output of cruft.
        """
        commit(self.folder)
        other = ["--variables-to-update", json.dumps(answers)] if answers else []
        command = ["update", "--skip-apply-ask", *other]
        said = cruft(*command, cwd=self.folder, **environ or {})
        assert [path for path in files(self.folder) if path.suffix == ".rej"] == []
        return said

    def take(self, release: str) -> None:
        """Type the commands of the document for the release, and commit."""
        self.type(release, typed("Take a release"))

    def type(self, release: str, commands: list[str]) -> str:
        """Type commands of the document for the release; return the last output."""
        for command in commands:
            command = command.replace("v0.2.0", release)
            said = run("bash", "-c", command, cwd=self.folder, **ON_PATH | PERSON)
        return said

    def conflicts(self) -> list[str]:
        """Return the files that git could not merge."""
        options = ["--name-only", "--diff-filter=U"]
        return git(self.folder, "diff", *options).split()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with three releases: `first`, `before`, and `now`.

    The last one has the current files.
    """
    folder = copy_template(tmp_path_factory.mktemp("template"))
    now = {path: (folder / path).read_text() for path in [*BEFORE, ADDED]}
    for path, (pattern, then) in BEFORE.items():
        replace(folder / path, pattern, then)
    (folder / ADDED).unlink()
    (folder / REMOVED).write_text("[flake8]\n")
    path, pattern, then = FIRST
    before = (folder / path).read_text()
    replace(folder / path, pattern, then)
    start_repository(folder)
    git(folder, "tag", "first")
    (folder / path).write_text(before)
    commit(folder)
    git(folder, "tag", "before")
    for tag in ("v0.9.0", "v0.10.1-rc1", "v0.10.1rc2"):
        git(folder, "tag", tag)
    for path, text in now.items():
        (folder / path).write_text(text)
    (folder / REMOVED).unlink()
    commit(folder)
    git(folder, "tag", "now")
    git(folder, "tag", "v0.10.0")
    return folder


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's configuration of Cookiecutter out of the tests."""
    path = tmp_path / "cookiecutterrc"
    path.write_text(f"replay_dir: {tmp_path}\ncookiecutters_dir: {tmp_path}\n")
    monkeypatch.setenv("COOKIECUTTER_CONFIG", str(path))


def test_unchanged_project_becomes_that_of_the_release(
    repository: Path, tmp_path: Path, bake: Bake
) -> None:
    project = Project(repository, tmp_path, "before")
    assert contents(project.folder) != contents(bake(project_slug="app"))
    assert not is_up_to_date(project)
    assert "Now type:" not in project.update()
    assert is_up_to_date(project)
    assert contents(project.folder) == contents(bake(project_slug="app"))


def test_update_keeps_own_changes_and_passes_tests(
    repository: Path, tmp_path: Path, bake: Bake
) -> None:
    project = Project(repository, tmp_path, "before")
    edit(project.folder)
    project.update()
    assert contents(project.folder) == contents(edited(bake))
    programs = install(project.folder)
    run(programs / "mypy", cwd=project.folder)
    core = ["tests/core/test_migrate.py", "tests/core/test_config.py"]
    run(programs / "pytest", "tests/test_hello.py", *core, cwd=project.folder)


@pytest.mark.parametrize("crlf", ["false", "true"], ids=["Linux", "Windows"])
def test_new_clone_takes_the_next_release(
    repository: Path, tmp_path: Path, bake: Bake, crlf: str
) -> None:
    project = Project(repository, tmp_path, "first")
    edit(project.folder)
    commit(project.folder)
    project.take("before")
    # Unlike a path, a URL copies only what the commits contain.
    options = ["--quiet", f"--config=core.autocrlf={crlf}"]
    git(tmp_path, "clone", *options, f"file://{project.folder}", "clone")
    project.folder = tmp_path / "clone"
    project.take("now")
    assert contents(project.folder) == contents(edited(bake))


def test_changed_file_that_the_release_deletes_is_handled_as_documented(
    repository: Path, tmp_path: Path
) -> None:
    project = Project(repository, tmp_path, "before")
    removed = project.folder / Path(REMOVED).name
    removed.write_text(removed.read_text() + "max-line-length = 99\n")
    edit(project.folder)
    commit(project.folder)
    said = project.type("now", typed("Take a release")[:3])
    assert f"{removed.name}: patch does not apply" in said
    assert list(project.folder.rglob("*.rej"))
    assert "`git add --all` and `git reset --hard`." in document()
    git(project.folder, "add", "--all")
    git(project.folder, "reset", "--hard")
    assert git(project.folder, "status", "--porcelain") == ""
    removed.unlink()
    commit(project.folder)
    project.take("now")
    assert list(project.folder.rglob("*.rej")) == []
    assert not removed.exists()


def test_line_changed_by_both_is_the_only_conflict(
    repository: Path, tmp_path: Path
) -> None:
    project = Project(repository, tmp_path, "before")
    edit(project.folder)
    line = '"psycopg2-binary>=2,<2.9"'
    replace(project.folder / "pyproject.toml", '"psycopg2-binary>=2[^"]*"', line)
    project.update()
    assert project.conflicts() == ["pyproject.toml"]
    text = (project.folder / "pyproject.toml").read_text()
    assert text.count("<<<<<<<") == 1
    assert line in text.split("=======")[0]


def test_deleted_file_stays_deleted(repository: Path, tmp_path: Path) -> None:
    project = Project(repository, tmp_path, "before")
    gone = project.folder / "app" / "core" / "health.py"
    gone.unlink()
    project.update()
    assert project.conflicts() == []
    assert not gone.exists()
    assert (project.folder / "tests" / "core" / "test_migrate.py").exists()


def test_skipped_file_stays_unchanged(repository: Path, tmp_path: Path) -> None:
    project = Project(repository, tmp_path, "before")
    before = contents(project.folder)
    settings = project.folder / ".cruft.json"
    state = json.loads(settings.read_text())
    settings.write_text(json.dumps(state | {"skip": ["pyproject.toml"]}))
    project.update()
    after = contents(project.folder)
    assert after["pyproject.toml"] == before["pyproject.toml"]
    assert after["README.md"] != before["README.md"]


def test_renamed_package_takes_the_release(
    repository: Path, tmp_path: Path, bake: Bake
) -> None:
    project = Project(repository, tmp_path, "before", project_slug="travelogue")
    git(project.folder, "mv", "travelogue", "diary")
    for path in git(project.folder, "ls-files").splitlines():
        text = (project.folder / path).read_text()
        (project.folder / path).write_text(text.replace("travelogue", "diary"))
    project.update()
    assert contents(project.folder) == contents(bake(project_slug="diary"))


@pytest.mark.parametrize("name", choices())
def test_answer_can_be_changed_and_restored(
    repository: Path, tmp_path: Path, bake: Bake, name: str
) -> None:
    default, *others = choices()[name]
    project = Project(repository, tmp_path, "now")
    edit(project.folder)
    for value in (*others, default):
        project.update(**{name: value})
        assert project.conflicts() == []
        assert contents(project.folder) == contents(edited(bake, **{name: value}))


def test_release_and_answers_can_change_together(
    repository: Path, tmp_path: Path, bake: Bake
) -> None:
    project = Project(repository, tmp_path, "before", pool="none", worker="thread")
    edit(project.folder)
    answers = {"pool": "psycopg2", "worker": "none", "docker": False}
    text = {"description": 'Of "notes".', "author_name": "D'Arcy"}
    project.update(**answers | text)
    assert contents(project.folder) == contents(edited(bake, **answers, **text))


def test_updates_over_two_years_reject_nothing(
    repository: Path, tmp_path: Path, bake: Bake
) -> None:
    project = Project(repository, tmp_path, "before")
    edit(project.folder)
    answers: dict[str, object] = {}
    changes: list[dict[str, object]] = [{}, {"ci": "none"}, {"docker": False}, {}]
    for number, change in enumerate(changes, 1):
        answers |= change
        later = clock_shifted(tmp_path, days=number * 183)
        project.update(later, **change)
        assert project.conflicts() == []
        assert contents(project.folder) == contents(edited(bake, **answers))
        difference = cruft("diff", cwd=project.folder, **later)
        assert "/LICENSE" not in difference


@pytest.mark.parametrize("license", choices()["license"])
def test_license_is_the_same_in_two_years(
    template: Path, tmp_path: Path, bake: Bake, license: str
) -> None:
    answers = ("--no-input", "project_slug=app", f"license={license}")
    later = clock_shifted(tmp_path, days=732)
    run(PROGRAMS / "cookiecutter", template, *answers, cwd=tmp_path, **later)
    assert contents(tmp_path / "app") == contents(
        bake(project_slug="app", license=license)
    )


def test_shifted_clock_applies_to_templates(tmp_path: Path) -> None:
    code = "import arrow; print(arrow.utcnow().year)"
    python = PROGRAMS / "python"
    now, later = (
        int(run(python, "-c", code, cwd=tmp_path, **environ))
        for environ in ({}, clock_shifted(tmp_path, days=732))
    )
    assert now + 2 <= later <= now + 3


@pytest.mark.parametrize("worker", choices()["worker"])
def test_project_from_before_core_takes_the_release(
    tmp_path: Path, bake: Bake, worker: str
) -> None:
    repository = with_history(tmp_path / "template")
    project = Project(repository, tmp_path, BEFORE_CORE, worker=worker)
    edit_before_core(project.folder)
    project.update()
    # The owner and the template changed neighboring lines: git shows both.
    assert set(project.conflicts()) <= {
        "README.md",
        "app/__init__.py",
        "pyproject.toml",
    }
    assert "app.register_blueprint(hello.bp)" in read(project, "app/__init__.py")
    assert "core.init_app(app, config)" in read(project, "app/__init__.py")
    assert "flask-login" in read(project, "pyproject.toml")
    assert "## Greetings" in read(project, "README.md")
    move_into_core(project)
    expected = contents(edited(bake, worker=worker))
    assert contents(project.folder) == expected


def test_project_made_without_cruft_can_be_linked(
    repository: Path, tmp_path: Path, bake: Bake
) -> None:
    project = Project(repository, tmp_path, "before", pool="none")
    (project.folder / ".cruft.json").unlink()
    edit(project.folder)
    [options] = re.findall(r"`(-y --extra-context .*?)`", document())
    command = f"cruft link {repository} --checkout before {options}"
    run("bash", "-c", command, cwd=project.folder, **ON_PATH)
    project.update()
    assert contents(project.folder) == contents(edited(bake, pool="none"))


def test_bake_and_update_leave_secrets_alone(
    repository: Path, tmp_path: Path, bake: Bake
) -> None:
    assert contents(bake(project_slug="app")) == contents(bake(project_slug="app"))
    project = Project(repository, tmp_path, "before")
    secrets = [project.folder / ".env", project.folder / "instance" / "secret_key"]
    secrets[1].parent.mkdir()
    for path in secrets:
        path.write_text("SECRET_KEY=0123456789abcdef\n")
    project.update()
    assert project.conflicts() == []
    assert {path.read_text() for path in secrets} == {"SECRET_KEY=0123456789abcdef\n"}


def test_documented_commands_link_and_update_a_project(
    repository: Path, tmp_path: Path, bake: Bake
) -> None:
    text = "\n".join(typed())
    for name, here in NAMES.items():
        text = text.replace(name, here.format(repository))
    script = tmp_path / "script"
    script.write_text(text)
    programs = tmp_path / "bin"
    environ = {"UV_TOOL_BIN_DIR": str(programs), "UV_TOOL_DIR": str(tmp_path / "tools")}
    environ["PATH"] = f"{programs}:{PROGRAMS}:{os.environ['PATH']}"
    run("bash", "-c", f"yes '' | bash -e {script}", cwd=tmp_path, **environ | PERSON)
    project = tmp_path / "my_flask_app"
    assert git(project, "log", "--format=%s").splitlines() == [
        "Release 0.2.0 of the template",
        "Follow the template",
        "Unlinked",
        "As the template makes it",
    ]
    assert git(project, "status", "--porcelain") == ""
    assert contents(project) == contents(bake())


def document() -> str:
    return (TEMPLATE / "docs" / "updating.md").read_text()


def typed(section: str = "") -> list[str]:
    """Return the commands of the document, or of one of its sections."""
    return [c.text for c in commands(document()) if c.section == (section or c.section)]


def clock_shifted(folder: Path, days: int) -> dict[str, str]:
    """Return an environment in which the clock of Python and Jinja is `days` ahead."""
    (folder / "clock").mkdir(exist_ok=True)
    (folder / "clock" / "sitecustomize.py").write_text(CLOCK)
    return {"PYTHONPATH": str(folder / "clock"), "DAYS_AHEAD": str(days)}


def with_history(folder: Path) -> Path:
    """Return a repository of the template with its history and the current files."""
    if not has_history():
        pytest.skip(f"This clone lacks commit {BEFORE_CORE}: fetch the whole history.")
    run("git", "clone", "--quiet", TEMPLATE, folder, cwd=TEMPLATE)
    git(folder, "checkout", "--quiet", "-B", "main")
    git(folder, "rm", "--quiet", "-r", ".")
    copy_template(folder)
    commit(folder)
    return folder


def has_history() -> bool:
    commit = f"{BEFORE_CORE}^{{commit}}"
    found = subprocess.run(["git", "cat-file", "-e", commit], cwd=TEMPLATE)
    return found.returncode == 0


def edit_before_core(folder: Path) -> None:
    """Apply the owner's changes to a project from before `core/`."""
    for path, text in OWN.items():
        (folder / path).write_text(text)
    (folder / "app/hello.py").write_text(HELLO_BEFORE_CORE.lstrip())
    for path, (pattern, addition) in EDITS.items():
        replace(folder / path, pattern, rf"\g<0>{addition}")
    old = "    app.register_blueprint(hello.bp)\n"
    new = f"\n    from . import hello\n\n{old}"
    replace(folder / "app/__init__.py", re.escape(old), new)


def move_into_core(project: Project) -> None:
    """Follow the steps of docs/updating.md for the update to `core/`."""
    for path in project.conflicts():
        git(project.folder, "checkout", "--theirs", path)
        pattern, addition = EDITS[path]
        replace(project.folder / path, pattern, rf"\g<0>{addition}")
    import_hello(project.folder / "app/__init__.py")
    (project.folder / "app/hello.py").write_text(HELLO.lstrip())


def read(project: Project, path: str) -> str:
    return (project.folder / path).read_text()


@pytest.fixture
def published(repository: Path, tmp_path: Path) -> Iterator[Project]:
    """A project that was updated to the release `before`, pushed to a remote."""
    project = Project(repository, tmp_path, "first")
    edit(project.folder)
    commit(project.folder)
    project.take("before")
    git(tmp_path, "clone", "--quiet", "--bare", str(project.folder), "remote")
    yield project


def test_weekly_workflow_opens_a_pull_request(
    repository: Path, published: Project, tmp_path: Path, bake: Bake
) -> None:
    calls = weekly(repository, tmp_path).calls
    git(tmp_path, "clone", "--quiet", "--branch=template", "remote", "branch")
    lock = tmp_path / "branch" / "uv.lock"
    assert lock.exists()
    lock.unlink()
    assert contents(tmp_path / "branch") == contents(edited(bake))
    assert calls == ["pr list --head template --json number --jq length"] + [
        "pr create --fill"
    ]


def test_weekly_workflow_does_nothing_between_releases(
    repository: Path, published: Project, tmp_path: Path
) -> None:
    weekly(repository, tmp_path)
    git(tmp_path / "remote", "branch", "--force", "main", "template")
    assert weekly(repository, tmp_path).calls == []


def test_weekly_workflow_never_goes_back(repository: Path, tmp_path: Path) -> None:
    template = tmp_path / "template"
    git(tmp_path, "clone", "--quiet", str(repository), "template")
    with (template / PROJECT / "README.md").open("a") as file:
        file.write("\nA later line.\n")
    commit(template)
    project = Project(template, tmp_path, "main")
    git(tmp_path, "clone", "--quiet", "--bare", str(project.folder), "remote")
    run_of_it = weekly(template, tmp_path)
    assert (run_of_it.status, run_of_it.calls) == (0, [])
    assert "The project is newer than v0.10.0." in run_of_it.output


@pytest.mark.parametrize("options", [[], ["--depth=1"]], ids=["whole", "shallow"])
def test_weekly_workflow_fails_when_files_stay_unmerged(
    repository: Path, published: Project, tmp_path: Path, options: list[str]
) -> None:
    line = '"psycopg2-binary>=2,<2.9"'
    replace(published.folder / "pyproject.toml", '"psycopg2-binary>=2[^"]*"', line)
    commit(published.folder)
    git(published.folder, "push", "--quiet", str(tmp_path / "remote"), "main")
    run_of_it = weekly(repository, tmp_path, *options)
    assert run_of_it.status == 1
    assert "Update by hand: pyproject.toml" in run_of_it.output
    assert run_of_it.calls == []
    assert "template" not in git(tmp_path / "remote", "branch")


def test_weekly_workflow_is_valid(tmp_path: Path) -> None:
    path = tmp_path / ".github" / "workflows" / "template.yml"
    path.parent.mkdir(parents=True)
    path.write_text(weekly_workflow())
    run(PROGRAMS / "actionlint", path, cwd=TEMPLATE)


def test_weekly_workflow_hides_its_token_from_the_release(
    repository: Path, published: Project, tmp_path: Path
) -> None:
    template = tmp_path / "template"
    git(tmp_path, "clone", "--quiet", str(repository), "template")
    with (template / "hooks" / "post_gen_project.py").open("a") as hook:
        hook.write(SPY.format(str(tmp_path / "seen")))
    commit(template)
    git(template, "tag", "v0.11.0")
    settings = published.folder / ".cruft.json"
    settings.write_text(settings.read_text().replace(str(repository), str(template)))
    commit(published.folder)
    git(published.folder, "push", "--quiet", str(tmp_path / "remote"), "main")
    assert "pr create --fill" in weekly(template, tmp_path).calls
    seen = (tmp_path / "seen").read_text()
    assert "PATH" in seen
    assert TOKEN not in seen
    [first, *_] = weekly_jobs().values()
    assert first["steps"][0]["with"] == {"persist-credentials": False}
    assert "secrets." not in json.dumps(first)


class Run(NamedTuple):
    """The result of the last job of the weekly workflow that ran."""

    status: int
    output: str
    calls: list[str]


def weekly(repository: Path, folder: Path, *options: str) -> Run:
    """Run each job in a new clone of `folder/remote`, with a fake `gh`."""
    programs, calls = folder / "bin", folder / "calls"
    programs.mkdir(exist_ok=True)
    (programs / "gh").write_text(GH)
    (programs / "gh").chmod(0o755)
    calls.write_text("")
    environ = {"CALLS": str(calls), "TEMPLATE": str(repository)}
    environ["PATH"] = f"{programs}:{PROGRAMS}:{os.environ['PATH']}"
    runner = Runner(folder, secrets={"TEMPLATE_TOKEN": TOKEN})
    for name, job in weekly_jobs().items():
        if runner.is_due(job):
            clone = folder / name
            shutil.rmtree(clone, ignore_errors=True)
            url = f"file://{folder / 'remote'}"
            git(folder, "clone", "--quiet", *options, url, name)
            done = runner.run(name, job, clone, environ)
            if done.returncode:
                break
    return Run(done.returncode, done.stdout, calls.read_text().splitlines())


def weekly_jobs() -> dict[str, Any]:
    """Return the jobs of the workflow from the document."""
    return dict(yaml.safe_load(weekly_workflow())["jobs"])


def weekly_workflow() -> str:
    """Return the workflow from the document."""
    [workflow] = blocks(document(), "yaml")
    return workflow


def is_up_to_date(project: Project) -> bool:
    """Return whether `cruft check` succeeds."""
    check = subprocess.run([PROGRAMS / "cruft", "check"], cwd=project.folder)
    return check.returncode == 0


def edited(bake: Bake, **answers: object) -> Path:
    """Return a new project of the current template with the owner's changes."""
    folder = bake(project_slug="app", **answers)
    edit(folder)
    return folder


def edit(folder: Path) -> None:
    """Apply the owner's changes to a project."""
    for path, text in OWN.items():
        (folder / path).write_text(text)
    for path, (pattern, addition) in EDITS.items():
        replace(folder / path, pattern, rf"\g<0>{addition}")
    import_hello(folder / "app/__init__.py")


def import_hello(factory: Path) -> None:
    replace(factory, "import core,", "import core, hello,")
    replace(factory, r"app, config\)", "app, config, hello.SETTINGS)")


def cruft(*command: str | Path, cwd: Path, **environ: str) -> str:
    return run(PROGRAMS / "cruft", *command, cwd=cwd, **environ)
