"""Documents, docstrings, comments and messages avoid phrases that read badly."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.commands import TEMPLATE

FOLDERS = ("bench", "docs", "hooks", "templates", "tests", "{{cookiecutter*")
THING = "(?:connection|file|job|line|process|query|request|task|test|thread)"
RATE = rf"(?:an? {THING}|{THING}(?:e?s)) an? (?:second|minute|hour|{THING})"

# Each pattern with a line that it must match.
PATTERNS = {
    # A clause as the subject: name the thing that acts. A question is fine.
    r'(?:^|[.:;] +|# |"""|- )(?:What|Who|Whatever|Whoever) [^?]+$': (
        "# What a killed worker had started runs in another one."
    ),
    # A comment is a whole sentence.
    r"# (?:or|which|Or|Which|what|who) \w": "port = 0  # which the system replaces",
    # Write "one line per request".
    rf"\b{RATE}\b(?! time)": "It writes a line a request.",
    # Write "commit the file" or "is committed".
    r"\b(?:is|are|was|were) to be\b": "`uv.lock` is to be committed.",
    # Write "is not a daemon thread".
    r"(?<![Tt]here )\bis no (?!longer\b|more\b|one\b)[a-z]+": "It is no daemon.",
    r"\bin no case\b": "It waits in no case.",
    r"\banew\b": "The worker starts anew.",
    r"\bbegun again\b": "The job is begun again.",
    # A pool checks out and returns; a queue requeues.
    r"\b(?:gave|gives?|given|puts?|takes?|taken) back\b": "It takes back a connection.",
    # Only people are "who".
    rf"\b(?:{THING}(?:e?s)?|(?:server|worker)s?),? who\b": "a thread who waits",
    # The spelling is that of Flask's documentation.
    r"(?i)\b(?:behaviour|colour|initialis|licence)": "the colours of the terminal",
}


def documents() -> Iterator[Path]:
    """Yield the documents and the modules of the template, except this one."""
    yield from TEMPLATE.glob("*.md")
    yield from TEMPLATE.glob(".github/*.py")
    for folder in FOLDERS:
        for path in TEMPLATE.glob(f"{folder}/**/*"):
            # A file that exists for some answers only has a longer name.
            if re.search(r"\.(md|py)({%.*)?$", path.name) and path.is_file():
                yield path


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line, except for headings of a document."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not (path.suffix == ".md" and re.match("#+ |[|]", line)):
            yield number, line.strip()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prose_has_no_phrase_that_reads_badly(pattern: str) -> None:
    found = [
        f"{path.relative_to(TEMPLATE)}:{number}: {line}"
        for path in documents()
        if path != Path(__file__)
        for number, line in prose(path)
        if re.search(pattern, line)
    ]
    assert found == []


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_matches_its_example(pattern: str) -> None:
    assert re.search(pattern, PATTERNS[pattern])


def test_documents_are_found() -> None:
    names = {path.name for path in documents()}
    assert {"README.md", "pre_gen_project.py", "psycopg2.py", "db.py"} <= names
    assert any(name.startswith("{%") for name in names)
