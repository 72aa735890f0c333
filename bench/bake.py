"""Measure a bake and `cookiecutter --version` in interleaved rounds."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 15
TEMPLATE = Path(__file__).parents[1]
COOKIECUTTER = Path(sys.executable).with_name("cookiecutter")
EMPTY = "{{cookiecutter.project_slug}}"


def seconds(*command: str | Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as floor:
        (Path(floor) / EMPTY).mkdir()
        (Path(floor) / EMPTY / "file").touch()
        (Path(floor) / "cookiecutter.json").write_text('{"project_slug": "empty"}')
        clone = Path(floor) / "clone"  # Without .venv, which Cookiecutter would copy.
        subprocess.run(["git", "clone", "--quiet", TEMPLATE, clone], check=True)
        commands = {
            "cookiecutter --version": [COOKIECUTTER, "--version"],
            "a template of one empty file": [COOKIECUTTER, floor, "--no-input"],
            "this template": [COOKIECUTTER, clone, "--no-input"],
        }
        rounds = [[seconds(*c) for c in commands.values()] for _ in range(ROUNDS + 1)]
    medians = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]
    for name, median in zip(commands, medians, strict=True):
        print(f"{name:30} {median:.3f} s  {median / medians[0]:.2f}")


if __name__ == "__main__":
    main()
