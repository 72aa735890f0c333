"""Each seeded defect matches the code, and names a test that exists."""

import re
import sys
from pathlib import Path

import pytest

from ..mutations import DEFECTS, PROJECT
from ..mutations.__main__ import Report, notices
from ..support.commands import TEMPLATE, run
from ..support.repository import copy_template

FOLDERS = [
    "tests/project",
    "tests/template",
    "tests/in_project",
    f"{PROJECT}/tests",
    f"{PROJECT}/tests/core",
    "templates/tests",
]
DEFECT = DEFECTS[0]


def test_every_defect_matches_the_code_once(tmp_path: Path) -> None:
    copy = copy_template(tmp_path)
    for defect in DEFECTS:
        defect.put_into(copy)
    with pytest.raises(ValueError, match="^No teardown: .* is not once in .*db.py.$"):
        DEFECT.put_into(copy)


def test_every_defect_names_an_existing_test() -> None:
    modules = [path for name in FOLDERS for path in (TEMPLATE / name).glob("*.py*")]
    text = "\n".join(path.read_text() for path in modules)
    there = set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))
    assert {defect.function for defect in DEFECTS} <= there


@pytest.mark.parametrize(
    "name, error, noticed",
    [
        (DEFECT.function, "E   assert 1 == 2", True),
        ("test_another", "E   assert 1 == 2", False),
        (DEFECT.function, "    assert 1 == 2\nE   SyntaxError", False),
    ],
)
def test_defect_counts_as_noticed_only_by_its_test(
    name: str, error: str, noticed: bool
) -> None:
    report = Report(passed=0, failures={name: error}, seconds=1.0)
    assert bool(notices(DEFECT, report)) == noticed


@pytest.mark.slow
def test_command_tries_the_defects() -> None:
    # `make mutations` has no fixtures that set this.
    command = ["env", "-u", "BYTECODE", sys.executable, "-m", "tests.mutations"]
    found = run(*command, "A transaction in which a query failed", cwd=TEMPLATE)
    assert "1 of 1 were noticed." in found
