"""Refuse a Python or a Cookiecutter that is too old before anything is asked."""

import sys
from importlib.metadata import version

PYTHON = (3, 11)
COOKIECUTTER = (2, 7)  # the first one to which `docker=no` means no


def complaint():
    """Return the sentence about what is too old, or None."""
    if sys.version_info < PYTHON:
        found = "{}.{}".format(*sys.version_info[:2])
        return (
            f"Cookiecutter runs on Python {found}: install it for Python 3.11 or later, "
            "as `uvx --python 3.13 cookiecutter` does."
        )
    found = version("cookiecutter")
    if tuple(map(int, found.split(".")[:2])) < COOKIECUTTER:
        return f"This is Cookiecutter {found}: install 2.7 or later."


if found := complaint():
    sys.exit(found)
