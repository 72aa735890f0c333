"""The Dockerfile and compose.yaml, linted and executed without a container engine."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from ..support.answers import Answers, combinations, label
from ..support.commands import DEADLINE, PROGRAMS, SETTINGS, TEMPLATE, run, wait_for
from ..support.dockerfile import Image
from ..support.projects import Bake, embedded_server, install, reachable_python
from ..support.repository import replace
from ..support.serving import free_port, page

SERVICES = {
    "none": {"db", "migrate", "web"},
    "thread": {"db", "migrate", "web"},
    "procrastinate": {"db", "migrate", "web", "worker"},
    "celery": {"db", "migrate", "web", "worker", "beat", "broker"},
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read, such as `/`."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def image(bake: Bake, folder: Path, **answers: str) -> Image:
    """Return the image of a project, not yet built."""
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    return Image(bake(project_slug="app", **answers), folder, reachable_python(user))


@pytest.mark.parametrize("answers", combinations("worker"), ids=label)
def test_docker_files_pass_their_linters(bake: Bake, answers: Answers) -> None:
    project = bake(project_slug="app", **answers)
    schema = "--builtin-schema=vendor.compose-spec"
    run(PROGRAMS / "hadolint", "Dockerfile", cwd=project)
    run(PROGRAMS / "check-jsonschema", schema, "compose.yaml", cwd=project)


@pytest.mark.parametrize("answers", combinations("worker"), ids=label)
def test_services_match_the_worker(bake: Bake, answers: Answers) -> None:
    compose = load(bake(project_slug="app", **answers))
    services = compose["services"]
    assert set(services) == SERVICES[answers["worker"]]
    for service in services.values():
        assert_conditions_can_come_true(service.get("depends_on", {}), services)
    assert volumes_used(services) == set(compose["volumes"])


@pytest.mark.parametrize("answers", combinations("worker"), ids=label)
def test_compose_requires_secrets_and_contains_none(
    bake: Bake, answers: Answers
) -> None:
    for service in load(bake(project_slug="app", **answers))["services"].values():
        for name, value in service.get("environment", {}).items():
            if name.endswith(("PASSWORD", "KEY")):
                assert value.startswith("${") and ":?" in value, name
            if name.endswith("URL"):
                assert urlsplit(value).password is None, name


@pytest.mark.parametrize("answers", combinations("worker"), ids=label)
def test_services_have_minimal_privileges(bake: Bake, answers: Answers) -> None:
    for service in load(bake(project_slug="app", **answers))["services"].values():
        # Compose refuses to write a config into a read-only service.
        assert service["read_only"] == ("configs" not in service)
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "build" in service or service["user"] != "root"


@pytest.mark.parametrize("answers", combinations("worker"), ids=label)
def test_configs_can_be_read_by_the_user_of_the_service(
    bake: Bake, answers: Answers
) -> None:
    # Some versions of Compose write a config for root only, unless it has a mode.
    services = load(bake(project_slug="app", **answers))["services"].values()
    modes = [each["mode"] for s in services for each in s.get("configs", [])]
    assert modes == [0o444]


@pytest.mark.parametrize("answers", combinations("worker"), ids=label)
def test_sigterm_stops_a_program_that_is_starting(bake: Bake, answers: Answers) -> None:
    # The kernel ignores a SIGTERM to process 1 until the program has a handler for it.
    for service in load(bake(project_slug="app", **answers))["services"].values():
        assert service["init"] is True


@pytest.mark.parametrize("answers", combinations("worker"), ids=label)
def test_env_file_cannot_move_the_published_port(bake: Bake, answers: Answers) -> None:
    project = bake(project_slug="app", **answers)
    web = load(project)["services"]["web"]
    # Like FLASK_DEBUG, PORT may be in .env, which Compose also gives to the container.
    assert web["ports"] == [f"127.0.0.1:8000:{web['environment']['PORT']}"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("psql"), reason="needs psql")
def test_application_role_is_not_a_superuser(bake: Bake, shared: Path) -> None:
    project = bake(project_slug="app")
    script = load(project)["configs"]["role"]["content"]
    with embedded_server(shared) as url:
        services = shared.parent / "server" / "postgres" / "pg_service.conf"
        environ = {"PGSERVICEFILE": str(services), "POSTGRES_PASSWORD": "a 'quote'"}
        script = script.replace("ROLE postgres", "ROLE admin")
        run_sql("service=admin dbname=postgres", script, **environ)
        port = urlsplit(url).port
        app = f"host=127.0.0.1 port={port} user=app dbname=app"
        password = {"PGPASSWORD": environ["POSTGRES_PASSWORD"]}
        run_sql(app, "CREATE TABLE notes (body text);", **password)
        with pytest.raises(pytest.fail.Exception, match="permission denied to COPY"):
            run_sql(app, "COPY notes FROM PROGRAM 'id';", **password)
        with pytest.raises(pytest.fail.Exception, match="authentication failed"):
            run_sql("service=admin", "SELECT 1;", **environ)


@pytest.mark.slow
def test_build_without_lock_file_names_the_command(bake: Bake, folder: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="run `uv lock` or `uv sync`"):
        image(bake, folder).build()


@pytest.mark.slow
def test_documented_secret_reaches_only_the_step_with_pip(
    bake: Bake, folder: Path
) -> None:
    built = image(bake, folder)
    dockerfile = built.project / "Dockerfile"
    text = (TEMPLATE / "docs" / "deploying.md").read_text()
    [mount] = re.findall(r"`(--mount=type=secret,\S+)`", text)
    replace(dockerfile, "RUN pip", f"RUN {mount} pip")
    run(PROGRAMS / "hadolint", "Dockerfile", cwd=built.project)
    shown = " pip config list > seen\nRUN pip config list > later\n"
    replace(dockerfile, " pip install.*", shown)
    [name] = re.findall(r"`--secret id=(\w+)`", text)
    built.secrets = {name: "https://me:password@pypi.example.com/simple"}
    built.build()
    assert "me:password" in (built.root / "seen").read_text()
    assert "me:password" not in (built.root / "later").read_text()


@pytest.mark.slow
def test_image_contains_only_production_files(bake: Bake, folder: Path) -> None:
    built = image(bake, folder)
    install(built.project)
    built.build()
    names = {path.name for path in built.root.rglob("*")}
    assert {"app", "granian", "0001_notes.sql", "notes.html"} < names
    assert names & {"devserver", "conftest.py", "uv", "pytest", "ruff"} == set()
    assert built.user != 0


@pytest.mark.slow
def test_image_is_readable_when_the_checkout_is_not(bake: Bake, folder: Path) -> None:
    built = image(bake, folder)
    install(built.project)
    for path in (built.project, *built.project.rglob("*")):
        # The files in .venv are links to those in uv's cache: leave their modes alone.
        if not path.is_symlink() and ".venv" not in path.parts:
            path.chmod(path.stat().st_mode & 0o700)
    built.build()
    app = built.root / "app"
    ours = [app / "app", *(app / "app").rglob("*")]
    assert [path for path in ours if not path.stat().st_mode & 0o004] == []


@pytest.mark.slow
def test_services_migrate_serve_and_stop(bake: Bake, folder: Path) -> None:
    built = image(bake, folder, worker="procrastinate")
    install(built.project)
    built.build()
    with embedded_server(built.project) as url:
        assert "Applied 0001_notes.sql" in end_of(service(built, "migrate", url))
        assert "waiting" in end_of(service(built, "worker", url, "--status"))
        assert_serves(built, service(built, "web", url))


def load(project: Path) -> Any:
    """Return the parsed compose.yaml."""
    return yaml.safe_load((project / "compose.yaml").read_text())


def run_sql(database: str, script: str, **environ: str) -> None:
    """Run the script as the image of PostgreSQL runs it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.sql")
        path.write_text(script)
        strict = ["--no-psqlrc", "--set=ON_ERROR_STOP=1", f"--file={path}"]
        run("psql", *strict, database, cwd=Path(folder), **environ)


def assert_conditions_can_come_true(wanted: Any, services: Any) -> None:
    for name, condition in wanted.items():
        if condition["condition"] == "service_healthy":
            assert "test" in services[name]["healthcheck"], name
        else:
            assert services[name]["restart"] == "no", name


def volumes_used(services: Any) -> set[str]:
    """Return the names of the volumes that the services mount."""
    volumes = [
        each for service in services.values() for each in service.get("volumes", [])
    ]
    return {volume.partition(":")[0] for volume in volumes}


def service(image: Image, name: str, url: str, *words: str) -> dict[str, Any]:
    """Return arguments that start a service of compose.yaml with the database `url`."""
    says = load(image.project)["services"][name]
    environ = says["environment"]
    at = urlsplit(url)
    server = f"{at.username}@{at.hostname}:{at.port}{at.path}"
    ours = {
        "DATABASE_URL": environ["DATABASE_URL"].replace("app@db/app", server),
        "PGPASSWORD": at.password,
        "PORT": str(free_port()),
        "TRUSTED_PROXIES": "1",
        **SETTINGS,
    }
    settings = {name: ours.get(name, value) for name, value in environ.items()}
    words = (*says.get("command", "").split(), *words)
    return image.command(*words, **settings)


def end_of(command: dict[str, Any]) -> str:
    """Run the command and return its output. If it fails, fail the test."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(**command, **streams, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stdout
    return str(done.stdout)


def assert_serves(image: Image, command: dict[str, Any]) -> None:
    notes = f"http://127.0.0.1:{command['env']['PORT']}/notes"
    check = command | {"args": image.healthcheck}
    with subprocess.Popen(**command) as server:
        try:
            assert "Nothing here yet" in wait_for(lambda: page(notes), "page")
            assert "<li>Buy milk</li>" in page(notes, body="Buy milk")
            assert subprocess.run(**check, timeout=DEADLINE).returncode == 0
            server.terminate()
            assert server.wait(DEADLINE) == 0
            assert subprocess.run(**check, timeout=DEADLINE).returncode != 0
        finally:
            server.kill()
