"""The CI of a project passes linters, and its steps pass on this machine."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..support.answers import Answers, combinations, label
from ..support.commands import ON_PATH, PROGRAMS, run
from ..support.projects import Bake, embedded_server
from ..support.repository import replace

GITHUB = ".github/workflows/ci.yml"
SCHEMAS = {
    "github": {GITHUB: "github-workflows", ".github/dependabot.yml": "dependabot"},
    "gitlab": {".gitlab-ci.yml": "gitlab-ci", "renovate.json": "renovate"},
    "none": {},
}


DATABASES = """
import psycopg2, sys
cursor = psycopg2.connect(sys.argv[1]).cursor()
cursor.execute("SELECT datname FROM pg_database ORDER BY datname")
print(cursor.fetchall())
"""


@pytest.mark.parametrize("answers", combinations("ci", "docker"), ids=label)
def test_ci_files_match_the_published_schemas(bake: Bake, answers: Answers) -> None:
    project = bake(project_slug="app", **answers)
    for file, schema in SCHEMAS[answers["ci"]].items():
        option = f"--builtin-schema=vendor.{schema}"
        run(PROGRAMS / "check-jsonschema", option, file, cwd=project)


@pytest.mark.parametrize("answers", combinations("docker"), ids=label)
def test_workflow_passes_its_linters(bake: Bake, answers: Answers) -> None:
    project = bake(project_slug="app", ci="github", **answers)
    run(PROGRAMS / "actionlint", GITHUB, cwd=project)
    run(PROGRAMS / "zizmor", "--offline", ".", cwd=project)


@pytest.mark.parametrize("answers", combinations("docker"), ids=label)
def test_github_and_gitlab_run_the_same(bake: Bake, answers: Answers) -> None:
    jobs = github(bake(ci="github", **answers)), gitlab(bake(ci="gitlab", **answers))
    assert jobs[0] == jobs[1]
    assert ("container" in jobs[0]) == answers["docker"]


@pytest.mark.parametrize("branch", ["main", "master"])
def test_workflow_runs_on_the_default_branch_of_git(bake: Bake, branch: str) -> None:
    triggers = workflow(bake(project_slug="app"))[True]  # YAML reads `on` as true.
    assert branch in triggers["push"]["branches"]


def test_no_bot_proposes_a_major_version_of_postgres(bake: Bake) -> None:
    # It could not read the volume of compose.yaml.
    dependabot = yaml.safe_load(
        (bake(project_slug="app") / ".github" / "dependabot.yml").read_text()
    )
    updates = {each["package-ecosystem"]: each for each in dependabot["updates"]}
    assert updates["docker-compose"]["ignore"] == [
        {
            "dependency-name": "postgres",
            "update-types": ["version-update:semver-major"],
        }
    ]
    renovate = json.loads((bake(ci="gitlab") / "renovate.json").read_text())
    [rule] = renovate["packageRules"]
    assert rule["matchPackageNames"] == ["postgres"]
    assert rule["matchUpdateTypes"] == ["major"]
    assert rule["enabled"] is False


@pytest.mark.slow
@pytest.mark.minutes(2)
def test_steps_pass_locally_and_clean_up(bake: Bake, shared: Path) -> None:
    project = bake(project_slug="app")
    jobs = github(project)
    assert jobs.pop("container") == ["docker build ."]  # See test_docker.py.
    run(PROGRAMS / "uv", "lock", cwd=project)
    with embedded_server(shared) as url:
        before = databases(shared, url)
        said = [take(step, project, url) for job in jobs.values() for step in job]
        assert databases(shared, url) == before
    assert not (project / "instance" / "postgres").exists()
    assert "Applied 0001_notes.sql\n" in said


def test_audit_runs_no_release_that_the_project_excludes(bake: Bake) -> None:
    project = bake(project_slug="app")
    replace(project / "pyproject.toml", '"7 days"', '"2025-01-01"')
    command, _, _ = github(project)["audit"][-1].partition(" --disable-pip")
    said = run("sh", "-c", f"{command} --version", cwd=project, **ON_PATH)
    assert said.endswith("pip-audit 2.7.3\n")


def databases(project: Path, url: str) -> str:
    """Return the names of the databases on the server."""
    python = project / ".venv" / PROGRAMS.name / "python"
    return run(python, "-c", DATABASES, url, cwd=project)


def take(step: str, project: Path, url: str) -> str:
    """Run a step as CI does, on the database at `url`, and return its output."""
    environ = workflow(project)["env"] | {
        "DATABASE_URL": url,
        **ON_PATH,
        "PYTEST_ADDOPTS": "-k 'not test_reload'",  # test_projects.py runs these, too.
        "UV_PYTHON": sys.executable,
    }
    return run("sh", "-e", "-c", step, cwd=project, **environ)


def workflow(project: Path) -> Any:
    """Return the parsed workflow."""
    return yaml.safe_load((project / GITHUB).read_text())


def github(project: Path) -> dict[str, list[str]]:
    """Return the commands of each job of the workflow."""
    jobs = workflow(project)["jobs"].items()
    return {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs}


def gitlab(project: Path) -> dict[str, list[str]]:
    """Return the commands of each job of the pipeline."""
    pipeline = yaml.safe_load((project / ".gitlab-ci.yml").read_text())
    return {name: job["script"] for name, job in pipeline.items() if "script" in job}
