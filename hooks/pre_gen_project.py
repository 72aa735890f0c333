"""Reject an old Python or Cookiecutter, and answers that would break a project."""

import json
import os
import re
import sys
from contextlib import suppress
from email.errors import HeaderParseError
from email.headerregistry import Address
from importlib.metadata import version
from pathlib import Path

ANSWERS = json.loads(r'{{ cookiecutter | tojson }}')
RESERVED_NAMES = ANSWERS["_reserved_names"].split()
PYTHON = (3, 11)
COOKIECUTTER = (2, 7)  # The first version to which `docker=no` means no.


def find_error():
    """Return a message about the first error, or None."""
    return (
        find_old_program()
        or find_bad_choice()
        or find_bad_slug()
        or find_bad_text()
        or find_bad_email()
    )


def find_old_program():
    if sys.version_info < PYTHON:
        found = "{}.{}".format(*sys.version_info[:2])
        return (
            f"Cookiecutter runs on Python {found}: run it on Python 3.11 or later, "
            "as `uvx --python 3.13 cookiecutter` does."
        )
    found = version("cookiecutter")
    if tuple(map(int, found.split(".")[:2])) < COOKIECUTTER:
        return f"This is Cookiecutter {found}: install 2.7 or later."


def find_bad_choice():
    # Cookiecutter takes the answers of a replay file as they are. cruft reads none.
    folder = Path(os.environ.get("PWD", ""), ANSWERS.get("_repo_dir", ""))
    with suppress(OSError, ValueError):
        questions = json.loads((folder / "cookiecutter.json").read_text("utf-8"))
        for name, choices in questions.items():
            is_choice = isinstance(choices, list) and not name.startswith("_")
            if is_choice and ANSWERS.get(name, choices[0]) not in choices:
                return f"{name} is {ANSWERS[name]!r}: use one of {', '.join(choices)}."
    if not isinstance(ANSWERS["docker"], bool):
        return f"docker is {ANSWERS['docker']!r}: use true or false, without quotes."


def find_bad_slug():
    slug = ANSWERS["project_slug"]
    if not re.fullmatch(r"[a-z][a-z0-9]*(__?[a-z0-9]+)*", slug) or len(slug) > 40:
        return (
            f"project_slug is {slug!r}: use 1 to 40 lower-case letters, digits and "
            "underscores, a letter first and no underscore last."
        )
    reserved = slug in RESERVED_NAMES or slug in sys.stdlib_module_names
    if reserved or slug.startswith("pg_"):
        return (
            f"project_slug is {slug!r}, a name that Python, PostgreSQL or an installed "
            f"package uses: choose another, such as {'app_' + slug!r}."
        )


def find_bad_text():
    for name in ("project_name", "description", "author_name", "author_email"):
        if re.search(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", ANSWERS[name]):
            return (
                f"{name} is {ANSWERS[name]!r}, with a line break or control character: "
                "use one plain line."
            )
        if len(ANSWERS[name]) > 500:
            return f"{name} has {len(ANSWERS[name])} characters: use at most 500."
    for name in ("project_name", "author_name"):
        if not ANSWERS[name].strip():
            return f"{name} is empty: use at least one character."


def find_bad_email():
    email = ANSWERS["author_email"]
    try:
        # Tools that read the package's metadata parse the address in the same way.
        has_domain = Address(addr_spec=email).domain
    except (HeaderParseError, IndexError, ValueError):
        has_domain = False
    if not has_domain or re.search(r'[\s"\\<>]', email):
        return f"author_email is {email!r}: use an address such as you@example.com."


if error := find_error():
    sys.exit(error)
