"""Put each defect into a copy of the template, and check that its test fails.

First, each test runs without a defect and must pass. Then print a table in Markdown.
Exit with 1 if a test passes with its defect, or fails without one.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from ..support.commands import PROGRAMS, clean_environment, run
from ..support.machine import broker_server
from ..support.projects import install, put_inside, remove_database
from ..support.repository import copy_template
from . import DEFECTS, TEMPLATE, Defect

SECONDS = 300  # A defect may make a test hang.
# A few reloads show a defect. It often shows as a wait that fails.
ENVIRON = {"RELOADS": "5", "DEADLINE": "20"}

STOP = """
import sys
from pathlib import Path
from flask_devserver import postgres
postgres.stop(Path(sys.argv[1]))
"""


class Report(NamedTuple):
    """The result of a test run: the number of passed tests, and each failure."""

    passed: int
    failures: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        return "\n".join([f"{self.passed} passed.", *self.failures.values()])


class Workshop:
    """A folder with a copy of the template, and a project per set of answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "temporary"

    def test(self, answers: str, tests: Iterable[str], defect: Defect | None) -> Report:
        """Run tests of the project with these answers, or of the template itself."""
        template = self._copy(defect)
        if answers == TEMPLATE:
            run("git", "init", "--quiet", cwd=template)
            return self._pytest(PROGRAMS, template, [*tests, "--numprocesses=0"])
        project = self._bake(template, answers)
        report = self._pytest(project / ".venv" / PROGRAMS.name, project, tests)
        self._stop_left_over(project)
        return report

    def close(self) -> None:
        """Remove the databases, which for root are outside the folder."""
        for project in self.folder.glob("*/app"):
            remove_database(project / "instance" / "postgres")

    def _copy(self, defect: Defect | None) -> Path:
        template = self.folder / "template"
        shutil.rmtree(template, ignore_errors=True)
        copy_template(template)
        if defect:
            defect.put_into(template)
        return template

    def _bake(self, template: Path, answers: str) -> Path:
        """Bake over the existing project, and reuse its environment."""
        project = self.folder / answers / "app"
        pool, worker = answers.split("-")
        options = ["--no-input", "--overwrite-if-exists", "--output-dir"]
        options += [project.parent, f"pool={pool}", f"worker={worker}"]
        cookiecutter = [PROGRAMS / "cookiecutter", template, "project_slug=app"]
        run(*cookiecutter, *options, cwd=self.folder)
        put_inside(project)
        if not (project / ".venv").exists():
            install(project)
        for folder in project.glob("[adt]*/**/__pycache__"):
            # Python would use bytecode of a file that was saved in the same second.
            shutil.rmtree(folder, ignore_errors=True)
        return project

    def _pytest(self, programs: Path, folder: Path, tests: Iterable[str]) -> Report:
        xml = self.folder / "report.xml"
        xml.unlink(missing_ok=True)
        command = [programs / "python", "-m", "pytest", "--exitfirst", "-m", "", *tests]
        command += [f"--junitxml={xml}", f"--basetemp={self.temporary}"]
        began = time.monotonic()
        with (self.folder / "log").open("w+") as log:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    command,
                    cwd=folder,
                    env=clean_environment()
                    | ENVIRON
                    | {"BROKER_SERVER": broker_server()},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=SECONDS,
                )
            seconds = time.monotonic() - began
            if xml.exists() and "<testcase" in xml.read_text():
                return _read(xml, seconds)
            log.seek(0)
            return Report(0, {"all": log.read()}, seconds)

    def _stop_left_over(self, project: Path) -> None:
        """Stop the servers that a defect has kept running."""
        for pid_file in self.temporary.glob("*/**/postgres/data/postmaster.pid"):
            python = project / ".venv" / PROGRAMS.name / "python"
            home = pid_file.parents[1]
            run(python, "-c", STOP, home, cwd=project)
            shutil.rmtree(home.resolve())


def _read(xml: Path, seconds: float) -> Report:
    """Return the report in a file in JUnit's format."""
    failures, passed = {}, 0
    for case in ElementTree.parse(xml).iter("testcase"):
        kinds = {child.tag: child.text or "" for child in case}
        passed += not {"failure", "error", "skipped"} & set(kinds)
        if found := kinds.get("failure") or kinds.get("error"):
            failures[case.attrib["name"]] = found
    return Report(passed, failures, seconds)


def notices(defect: Defect, report: Report) -> str:
    """Return the name of the test that failed as expected, or an empty string."""
    for name, text in report.failures.items():
        errors = re.findall("^E .*", text, re.MULTILINE)
        ours = name.partition("[")[0] == defect.function
        if ours and re.search(defect.sign, "\n".join(errors)):
            return name
    return ""


def check_tests(workshop: Workshop, defects: list[Defect]) -> None:
    """Run the tests without a defect. Exit if one fails."""
    for answers in dict.fromkeys(defect.answers for defect in defects):
        tests = {defect.test for defect in defects if defect.answers == answers}
        report = workshop.test(answers, sorted(tests), None)
        if report.failures or report.passed < len(tests):
            sys.exit(f"Without a defect, with {answers}: {report}")


def try_defects(workshop: Workshop, defects: list[Defect]) -> int:
    """Print a table of the defects, and return the number of noticed ones."""
    noticed = 0
    print("| defect | the test that notices it | seconds |\n|---|---|---|")
    for defect in defects:
        report = workshop.test(defect.answers, [defect.test], defect)
        name = notices(defect, report)
        cell = f"`{name}`" if name else "**none**"
        print(f"| {defect.words} | {cell} | {report.seconds:.0f} |", flush=True)
        if name:
            noticed += 1
        else:
            print(report, file=sys.stderr)
    return noticed


def main() -> None:
    """Try all defects, or those that contain the first argument."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    defects = [defect for defect in DEFECTS if wanted in str(defect)]
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        try:
            check_tests(workshop, defects)
            noticed = try_defects(workshop, defects)
        finally:
            workshop.close()
    print(f"\n{noticed} of {len(defects)} were noticed.")
    sys.exit(noticed < len(defects))


if __name__ == "__main__":
    main()
