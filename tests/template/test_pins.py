"""Each action and each image has one pin, which Dependabot updates."""

import re
from collections.abc import Iterator

import pytest
import yaml

from ..support.commands import PROGRAMS, TEMPLATE, run

# Dependabot reads SEEN. The files in UNSEEN must have the same pins.
SEEN = [".github/workflows/*.yml", ".github/*/action.yml", ".github/images/Dockerfile"]
UNSEEN = ["{{cookiecutter.project_slug}}/**/*", "docs/*.md", "tests/support/*.py"]

ACTION = re.compile(r"\buses: ([\w./-]+)@(\S+ +# \S+)")
IMAGE = re.compile(r'(?:^FROM |image: |- name: |services: \[")([a-z]+):([\w.-]+)', re.M)
KINDS = {"action": ACTION, "image": IMAGE}


@pytest.mark.parametrize("kind", KINDS)
def test_project_pins_match_those_dependabot_updates(kind: str) -> None:
    seen = {(name, pin) for _, name, pin in pins(kind, SEEN)}
    assert len({name for name, _ in seen}) == len(seen) > 1
    found = list(pins(kind, UNSEEN))
    assert [each for each in found if each[1:] not in seen] == []
    assert {each[1:] for each in found} == seen


def test_every_file_requires_the_same_uv() -> None:
    # An older uv ignores [tool.uv], and so the required version in it.
    paths = [*TEMPLATE.glob(UNSEEN[0]), TEMPLATE / "Makefile", TEMPLATE / "README.md"]
    texts = [path.read_text(errors="ignore") for path in paths if path.is_file()]
    found = re.findall(r"\buv>=([\d.]+)|/uv/\) ([\d.]+)", "\n".join(texts))
    assert len(found) == 5
    assert {"".join(versions) for versions in found} == {required_uv()}


def test_dependabot_reads_every_kind_of_pin() -> None:
    text = (TEMPLATE / ".github" / "dependabot.yml").read_text()
    updates = yaml.safe_load(text)["updates"]
    assert {
        each["package-ecosystem"]: each.get("directories", each.get("directory"))
        for each in updates
    } == {
        "github-actions": ["/", "/.github/documents"],
        "docker": "/.github/images",
        "uv": "/",
    }
    run(
        PROGRAMS / "check-jsonschema",
        "--builtin-schema=vendor.dependabot",
        ".github/dependabot.yml",
        cwd=TEMPLATE,
    )


def required_uv() -> str:
    """Return the least version of uv that a project requires."""
    text = (TEMPLATE / "{{cookiecutter.project_slug}}" / "pyproject.toml").read_text()
    [version] = re.findall(r'required-version = ">=([\d.]+)"', text)
    return str(version)


def pins(kind: str, patterns: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the file, the name and the pin of each action or image."""
    for path in sorted({path for each in patterns for path in TEMPLATE.glob(each)}):
        if path.is_file():
            text = path.read_text(errors="ignore")
            for name, pin in KINDS[kind].findall(text):
                pin = re.sub(r" +", " ", pin).removesuffix("-dind")
                yield path.relative_to(TEMPLATE).as_posix(), name, pin
