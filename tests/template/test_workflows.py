"""The template's own workflows are valid, and their steps run on Linux."""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..support.answers import combinations, label
from ..support.commands import PROGRAMS, TEMPLATE, run
from ..support.repository import copy_template

WORKFLOWS = TEMPLATE / ".github" / "workflows"

# Steps that these tests do not run. `.ci/run` runs `make test`.
EVERYTHING = {"make test", "make mutations"}
BROKER = 'sudo apt-get update && sudo apt-get install --yes "$BROKER-server"'
# This machine has no container engine: test_docker.py executes the files without one.
CONTAINERS = "ci/containers"
ELSEWHERE = EVERYTHING | {BROKER, "brew install postgresql@18"}

# The jobs that name tests, and the least number of these tests.
PYTESTS = {
    "ci/bake": len(combinations("pool", "worker", "ci", "docker")),
    "ci/project": 1,
    "ci/control": 5,
    "newest/brokers": 1,
    "newest/applications": 1,
}

GH = """#!/bin/sh
case "$*" in
    "issue list "*) echo "$OPEN" ;;
    *) echo "$@" >> called ;;
esac
"""


def steps(job: str) -> list[str]:
    """Return the commands of the job `workflow/name`."""
    workflow, name = job.split("/")
    return [step["run"] for step in jobs(workflow)[name]["steps"] if "run" in step]


def jobs(workflow: str) -> dict[str, Any]:
    text = (WORKFLOWS / f"{workflow}.yml").read_text()
    return dict(yaml.safe_load(text)["jobs"])


def bash(command: str, folder: Path, **environ: str) -> str:
    """Run a step as a workflow does."""
    return run("bash", "-eo", "pipefail", "-c", command, cwd=folder, **environ)


def test_every_step_is_tested_or_listed() -> None:
    names = [f"{w.stem}/{job}" for w in WORKFLOWS.iterdir() for job in jobs(w.stem)]
    everything = {step for name in names for step in steps(name)} - ELSEWHERE
    tested = {"ci/projects", "newest/report", "newest/test", CONTAINERS} | set(PYTESTS)
    assert everything == {step for name in tested for step in steps(name)} - ELSEWHERE
    assert (TEMPLATE / ".ci" / "run").read_text().endswith("\nmake test\n")


def test_workflows_pass_their_linters() -> None:
    run(PROGRAMS / "actionlint", cwd=TEMPLATE)
    run(PROGRAMS / "zizmor", "--offline", "--pedantic", ".github", cwd=TEMPLATE)


@pytest.mark.slow
@pytest.mark.parametrize("job", PYTESTS)
def test_step_finds_the_tests_that_it_names(job: str) -> None:
    [step] = [step for step in steps(job) if "pytest" in step]
    pytest = f"{PROGRAMS}/pytest --collect-only -q -n0"
    command = re.sub(r"uv run pytest|\.venv/bin/pytest", pytest, step)
    found = bash(command, TEMPLATE, PROJECT="sqlalchemy-none").count("::")
    assert found >= PYTESTS[job]


def test_matrix_has_every_pool_with_every_worker(tmp_path: Path) -> None:
    [step] = steps("ci/projects")
    output = tmp_path / "output"
    bash(step, TEMPLATE, GITHUB_OUTPUT=str(output))
    matrix = jobs("ci")["project"]["strategy"]["matrix"]
    printed = dict(line.split("=", 1) for line in output.read_text().splitlines())
    for key, name in {"project": "projects", "exclude": "exclude"}.items():
        assert matrix[key] == f"${{{{ fromJSON(needs.projects.outputs.{name}) }}}}"
        assert jobs("ci")["projects"]["outputs"][name] == (
            f"${{{{ steps.list.outputs.{name} }}}}"
        )
    projects = json.loads(printed["projects"])
    assert projects == [label(pair) for pair in combinations("pool", "worker")]
    excluded = json.loads(printed["exclude"])
    assert {each["project"] for each in excluded} <= set(projects)
    # A matrix of GitHub has at most 256 jobs.
    assert len(projects) * len(matrix["os"]) * len(matrix["python"]) <= 256


def test_upper_bounds_are_removed(tmp_path: Path) -> None:
    folder = copy_template(tmp_path)
    [step] = [step for step in steps("newest/test") if step.startswith("sed ")]
    bash(step, folder)
    for path in ("pyproject.toml", "{{cookiecutter.project_slug}}/pyproject.toml"):
        assert ",<" in (TEMPLATE / path).read_text()
        assert ",<" not in (folder / path).read_text()
    assert tomllib.loads((folder / "pyproject.toml").read_text())["dependency-groups"]


@pytest.mark.parametrize("number_open, calls", [("0", 1), ("2", 0)])
def test_issue_is_opened_unless_one_is_open(
    tmp_path: Path, number_open: str, calls: int
) -> None:
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "called").touch()
    [step] = steps("newest/report")
    environ = {"TITLE": "They fail", "RUN": "https://a.example/1", "OPEN": number_open}
    bash(step, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **environ)
    create = "issue create --title They fail --body See https://a.example/1\n"
    assert (tmp_path / "called").read_text() == create * calls
