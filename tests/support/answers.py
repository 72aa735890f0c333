"""The questions of the template, and every combination of their answers."""

import itertools
import json
from typing import Any

from .commands import TEMPLATE

QUESTIONS: dict[str, Any] = json.loads((TEMPLATE / "cookiecutter.json").read_text())

Answers = dict[str, Any]


def choices() -> dict[str, list[Any]]:
    """Return the answers to choose from, by question."""
    fixed = {}
    for name, default in QUESTIONS.items():
        if isinstance(default, list) and not name.startswith("_"):
            fixed[name] = default
        elif isinstance(default, bool):
            fixed[name] = [True, False]
    return fixed


def combinations(*names: str) -> list[Answers]:
    """Return every combination of the answers to `names`, or to all of `choices()`."""
    wanted = {name: choices()[name] for name in names} or choices()
    return [
        dict(zip(wanted, values, strict=True))
        for values in itertools.product(*wanted.values())
    ]


def label(value: object) -> str:
    """Name a test after its answers."""
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)
