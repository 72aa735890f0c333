"""Hostile requests, made up by a scanner that nobody here wrote, to a baked project."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..support.commands import (
    DEADLINE,
    PROGRAMS,
    SETTINGS,
    clean_environment,
    run,
    wait_for,
)
from ..support.projects import embedded_server
from ..support.serving import free_port, page

HOSTILE = int(
    os.environ.get("HOSTILE", "500")
)  # requests at least; 10000 for a long run
HEADERS = [
    {"name": name, "in": "header", "schema": {"type": "string"}}
    for name in ("Cookie", "Origin", "Range", "Sec-Fetch-Site", "X-Request-ID")
]
NOTE = {
    "type": "object",
    "required": ["id", "body"],
    "additionalProperties": False,
    "properties": {
        "id": {"type": "integer"},
        "body": {"type": "string", "minLength": 1, "maxLength": 1000},
    },
}
BODY = {
    "type": "object",
    "required": ["body"],
    "properties": {
        "body": {
            "type": "string",
            "maxLength": 1000,
            "pattern": r"^[^\x00]*[^\x00\s][^\x00]*$",
        }
    },
}
PROBLEM = {
    "type": "object",
    "required": ["detail", "status", "title"],
}


def operation(status: int, media: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Describe an operation: its success response, and a problem for the rest."""
    problem = {"application/problem+json": {"schema": PROBLEM}, "text/html": {}}
    responses = {
        str(status): {"description": "as asked", "content": media or problem},
        "default": {"description": "refused", "content": problem},
    }
    return {"parameters": HEADERS, "responses": responses} | more


def description() -> dict[str, Any]:
    """Describe in OpenAPI what the project answers in JSON."""
    listed = {"schema": {"type": "array", "items": NOTE, "maxItems": 100}}
    notes = operation(200, {"application/json": listed, "text/html": {}})
    sent = {"required": True, "content": {"application/json": {"schema": BODY}}}
    added = operation(201, {"application/json": {"schema": NOTE}}, requestBody=sent)
    path = {
        "name": "path",
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
    }
    health = operation(200, {"application/json": {}})
    missing = operation(404, {}, parameters=[*HEADERS, path])
    return {
        "openapi": "3.1.0",
        "info": {"title": "Notes", "version": "1"},
        "paths": {
            "/notes": {"get": notes, "post": added},
            "/healthz": {"get": health},
            "/readyz": {"get": health},
            "/missing/{path}": {"get": missing},
        },
    }


@contextmanager
def production(project: Path, log: Path) -> Iterator[str]:
    """Serve the project as in production, on a database with all migrations."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    programs = project / ".venv" / PROGRAMS.name
    with embedded_server(project) as dsn, log.open("w") as output:
        environ = {"DATABASE_URL": dsn, **SETTINGS}
        run(programs / "flask", "--app", "app", "migrate", cwd=project, **environ)
        server = subprocess.Popen(
            [programs / "flask", "--app", "app", "serve", "--port", port],
            cwd=project,
            env=clean_environment() | environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            wait_for(lambda: page(f"{url}/readyz"), "answer")
            yield url
        finally:
            server.terminate()
            server.wait(DEADLINE)


def test_scanner_finds_nothing(shared: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "openapi.json").write_text(json.dumps(description()))
    with production(shared, log) as url:
        options = ["--checks=all", "--seed=1", "--warnings=off", "--workers=2"]
        options += [f"--max-examples={HOSTILE // 5}", f"--url={url}"]
        scan = [PROGRAMS / "schemathesis", "run", "openapi.json", *options]
        print(run(*scan, cwd=tmp_path))
    statuses = re.findall(r'"status": (\d+)', log.read_text())
    assert len(statuses) >= HOSTILE
    assert not {status for status in statuses if status.startswith("5")}
