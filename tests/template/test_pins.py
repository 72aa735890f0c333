"""Each action and each image has one pin, which Dependabot updates."""

import re
from collections.abc import Iterator

import pytest
import yaml

from ..support.commands import PROGRAMS, TEMPLATE, run

# Dependabot reads SEEN. The files in UNSEEN must have the same pins.
SEEN = [".github/workflows/*.yml", ".github/images/Dockerfile"]
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


def test_dependabot_reads_every_kind_of_pin() -> None:
    text = (TEMPLATE / ".github" / "dependabot.yml").read_text()
    updates = yaml.safe_load(text)["updates"]
    assert {update["package-ecosystem"]: update["directory"] for update in updates} == {
        "github-actions": "/",
        "docker": "/.github/images",
        "uv": "/",
    }
    run(
        PROGRAMS / "check-jsonschema",
        "--builtin-schema=vendor.dependabot",
        ".github/dependabot.yml",
        cwd=TEMPLATE,
    )


def pins(kind: str, patterns: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the file, the name and the pin of each action or image."""
    for path in sorted({path for each in patterns for path in TEMPLATE.glob(each)}):
        if path.is_file():
            text = path.read_text(errors="ignore")
            for name, pin in KINDS[kind].findall(text):
                pin = re.sub(r" +", " ", pin).removesuffix("-dind")
                yield path.relative_to(TEMPLATE).as_posix(), name, pin
