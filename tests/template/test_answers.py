"""Invalid answers stop the bake with one message; odd answers arrive unchanged."""

import json
import keyword
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from cookiecutter.exceptions import FailedHookException
from cookiecutter.generate import generate_context
from cookiecutter.main import cookiecutter
from cookiecutter.prompt import prompt_for_config
from cookiecutter.utils import create_env_with_context
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from ..support.answers import QUESTIONS, Answers, choices, combinations, label
from ..support.commands import PROGRAMS, run
from ..support.projects import Bake, check_style

SHAPE = (
    "use 1 to 40 lower-case letters, digits and underscores, a letter first and no "
    "underscore last."
)
RESERVED = (
    "a name that Python, PostgreSQL or an installed package uses: choose another, "
    "such as "
)
CONTROL = "with a line break or control character: use one plain line."

SLUGS = {
    "Notes": SHAPE,
    "my-notes": SHAPE,
    "1notes": SHAPE,
    "notes_": SHAPE,
    "_notes": SHAPE,
    "my notes": SHAPE,
    "n" * 41: SHAPE,
    "a___b": SHAPE,  # Docker rejects it as a tag.
    "nоtes": SHAPE,  # a Cyrillic о
    "ｎotes": SHAPE,  # a full-width n, which Python reads as n
    "notes٣": SHAPE,  # an Arabic digit
    'notes"': SHAPE,
    "class": RESERVED,
    "match": RESERVED,
    "json": RESERVED,
    "test": RESERVED,
    "flask": RESERVED,
    "psycopg2": RESERVED,
    "psycopg2_binary": RESERVED,
    "tests": RESERVED,
    "flask_devserver": RESERVED,
    "pg_notes": RESERVED,
    "public": RESERVED,
    "template0": RESERVED,
    "true": RESERVED,  # as YAML reads it in compose.yaml
    "license": RESERVED,  # LICENSE, for macOS and Windows
    "lpt1": RESERVED,  # a device of Windows
    "htmlcov": RESERVED,  # Git ignores it.
    "node_modules": RESERVED,  # So does `flask dev`.
    "sitecustomize": RESERVED,  # Python imports it when it starts.
}

BAD_EMAILS = ["", "me", "me@", 'a"b@c', "a@b c", "a@b\\", "a@b@c", "a@b..c"]
BAD_EMAILS += ["a..b@example.com", "müller@example.com", ".a@b.c", "a,b@c.d"]
EMAILS = ["o'b+x@example.com", "me@exämple.com", "a@b", "#$%&'*/=?^`{|}~@b.c"]
EMAILS += ["a(c)@b.c", "a@[192.0.2.1]"]

# Project names whose default package name must be accepted.
NAMES = """
    Notes|My Flask App|3D Viewer|007|24/7|2 + 2|😀|👩‍👩‍👧|—|...|_|__init__|-x-|日本語
    Ångström|Straße|Łódź|naïve café|O'Brien's Notes|Rock'n'Roll|C++|C#|F*|A|a b|x  y|Z_
    class|match|None|True|type|import|lambda|async|JSON|Test|tests|Calendar|Queue|Email
    Site|Code|Secrets|Platform|Statistics|This|Flask|Celery|SQLAlchemy|psycopg2|Redis
    Click|uv|pip|Build|dist|instance|core|Types Psutil|Flask DevServer|Typing Extensions
    public|Public|postgres|template0|pg notes|PG-Stat|pg|no|On|null|off|Con|AUX|nul
    an application whose name is a sentence|A name that is cut at letter 40 is - x
    1 very long name which begins with a digit and goes on|<b>&amp;</b>|{{ 1 }}|$x
"""

ODD = [
    """both 'kinds' of "quotes" """.strip(),
    "back\\slashes\\",
    "{{ braces }} {% and %} {# more #}",
    "# number sign #",
    "emoji 😀 👩‍👩‍👧 and ünïcödé",
    "<b>&amp;</b> *stars* _lines_ `ticks` [link](to) ~~struck~~",
    "x" * 500,
]


# Descriptions that Markdown would read as something else at the start of a line.
STARTS = ["- dash", "+ plus", "> quote", "1. One", "2) Two.", "---", "    x"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder in an empty folder. A rejected bake leaves both empty."""
    folder = tmp_path / "parent" / "output"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def refusal(
    template: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """A function that bakes with invalid answers and returns the error message."""

    def refusal(**answers: str) -> str:
        with pytest.raises(FailedHookException):
            bake_in(folder, template, answers)
        assert list(folder.iterdir()) == []
        [sentence] = [line for line in capfd.readouterr().err.splitlines() if line]
        return sentence

    return refusal


def bake_in(
    folder: Path, template: Path, answers: dict[str, str], **options: Any
) -> None:
    """Bake without asking questions."""
    cookiecutter(
        str(template),
        no_input=True,
        extra_context=answers,
        output_dir=str(folder),
        default_config=True,
        **options,
    )


@pytest.mark.parametrize("slug", SLUGS, ids=ascii)
def test_bad_slug_is_rejected(refusal: Callable[..., str], slug: str) -> None:
    sentence = refusal(project_slug=slug)
    if SLUGS[slug] == SHAPE:
        assert sentence == f"project_slug is {slug!r}: {SHAPE}"
    else:
        assert sentence == f"project_slug is {slug!r}, {RESERVED}{'app_' + slug!r}."


@pytest.mark.parametrize("slug", ["", ".", "..", "../notes", "a/b", "a\\b", "{}/notes"])
def test_slug_outside_the_folder_is_rejected_without_hooks(
    template: Path, folder: Path, slug: str
) -> None:
    answers = {"project_slug": slug.format(folder.parent)}
    before = set(folder.parent.rglob("*"))
    with pytest.raises(UndefinedError, match="project_slug_must_name_one_folder"):
        bake_in(folder, template, answers, overwrite_if_exists=True, accept_hooks=False)
    assert set(folder.parent.rglob("*")) == before


def test_default_slug_of_every_name_is_accepted(template: Path) -> None:
    names = [name.strip() for line in NAMES.split("\n") for name in line.split("|")]
    names = [name for name in names if name]
    assert len(names) > 60
    hook = (template / "hooks" / "pre_gen_project.py").read_text()
    for name in names:
        context = generate_context(
            str(template / "cookiecutter.json"), extra_context={"project_name": name}
        )
        context["cookiecutter"] = prompt_for_config(context, no_input=True)
        environment = create_env_with_context(context)
        exec(environment.from_string(hook).render(context), {})  # It may exit.


@pytest.mark.parametrize("answers", combinations("worker"), ids=label)
def test_reserved_names_include_files_of_the_project(
    bake: Bake, answers: Answers
) -> None:
    project = bake(project_slug="app", **answers)
    ignored = (project / ".gitignore").read_text().split()
    # A pattern such as `celery*` would hide the package `celeryx`.
    names = {pattern.strip("/").replace("*", "x") for pattern in ignored}
    names |= {path.name.lower() for path in project.iterdir()} - {"app"}
    could_be_slugs = {name for name in names if re.fullmatch("[a-z][a-z0-9_]*", name)}
    assert could_be_slugs - set(QUESTIONS["_reserved_names"].split()) == set()


def test_reserved_names_include_names_of_python() -> None:
    python = {*sys.stdlib_module_names, *keyword.kwlist, *keyword.softkwlist}
    lower = {name for name in python if name[0].islower() and name == name.lower()}
    assert lower - set(QUESTIONS["_reserved_names"].split()) == set()


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028"])
@pytest.mark.parametrize(
    "name", ["project_name", "description", "author_name", "author_email"]
)
def test_control_character_is_rejected(
    refusal: Callable[..., str], name: str, character: str
) -> None:
    answers = {"project_slug": "notes", name: f"a{character}b"}
    sentence = refusal(**answers)
    shown = answers[name].replace("\r", "\n")  # as Jinja does
    assert sentence == f"{name} is {shown!r}, {CONTROL}"


@pytest.mark.parametrize(
    "name, value, advice",
    [
        ("worker", "redis", "use one of none, thread, procrastinate, celery."),
        ("license", "GPL", "use one of MIT, BSD-3-Clause, Apache-2.0, Proprietary."),
        ("docker", "no", "use true or false, without quotes."),
    ],
)
def test_unknown_choice_in_a_replay_file_is_rejected(
    template: Path,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    value: str,
    advice: str,
) -> None:
    context = generate_context(str(template / "cookiecutter.json"))
    answers = prompt_for_config(context, no_input=True) | {name: value}
    replay = tmp_path / "replay.json"
    replay.write_text(json.dumps({"cookiecutter": answers}))
    with pytest.raises(FailedHookException):
        cookiecutter(
            str(template),
            replay=str(replay),
            output_dir=str(folder),
            default_config=True,
        )
    assert list(folder.iterdir()) == []
    assert f"{name} is {value!r}: {advice}\n" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["project_name", "description", "author_name"])
def test_long_text_is_rejected(refusal: Callable[..., str], name: str) -> None:
    answers = {"project_slug": "notes", name: "x" * 501}
    sentence = refusal(**answers)
    assert sentence == f"{name} has 501 characters: use at most 500."


@pytest.mark.parametrize("name", ["project_name", "author_name"])
def test_empty_text_is_rejected(refusal: Callable[..., str], name: str) -> None:
    sentence = refusal(**{"project_slug": "notes", name: " "})
    assert sentence == f"{name} is empty: use at least one character."


@pytest.mark.parametrize("email", BAD_EMAILS, ids=ascii)
def test_bad_email_is_rejected(refusal: Callable[..., str], email: str) -> None:
    sentence = refusal(author_email=email)
    message = f"author_email is {email!r}: use an address such as you@example.com."
    assert sentence == message


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:12]))
def test_odd_text_arrives_unchanged(template: Path, tmp_path: Path, text: str) -> None:
    questions = [name for name in QUESTIONS if not name.startswith("_")]
    typed = {"project_name": text, "description": text, "author_name": text}
    answers = typed | {"project_slug": "notes"}
    transcript = subprocess.run(
        [PROGRAMS / "cookiecutter", template, "--output-dir", tmp_path],
        input="".join(f"{answers.get(name, '')}\n" for name in questions),
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    assert [name for name in questions if prompt(name) not in transcript] == []
    project = tmp_path / "notes"
    metadata = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]
    assert metadata["description"] == text
    assert metadata["authors"][0]["name"] == text
    assert text in (project / "LICENSE").read_text("utf-8")
    assert shown((project / "README.md").read_text("utf-8"))[:2] == [text, text]
    check_style(project)
    assert build(project)["Summary"] == text


def test_given_answers_run_as_security_md_warns(template: Path, folder: Path) -> None:
    code = "{{ cycler.__init__.__globals__.os.getpid() }}"
    bake_in(folder, template, {"description": code})
    settings = (folder / "my_flask_app" / "pyproject.toml").read_text()
    assert f'description = "{os.getpid()}"' in settings


@pytest.mark.parametrize("text", STARTS)
def test_description_is_a_paragraph(bake: Bake, text: str) -> None:
    project = bake(project_slug="notes", description=text)
    readme = (project / "README.md").read_text("utf-8")
    tokens = MarkdownIt().parse(readme)[3:6]
    kinds = [token.type for token in tokens]
    assert kinds == ["paragraph_open", "inline", "paragraph_close"]
    assert shown(readme)[1] == text.strip()


@pytest.mark.slow
@pytest.mark.parametrize("email", EMAILS)
def test_odd_email_passes_the_build_backend(
    template: Path, folder: Path, email: str
) -> None:
    bake_in(folder, template, {"project_slug": "notes", "author_email": email})
    build(folder / "notes")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a__b", "company-notes"])
def test_distribution_may_have_another_name(bake: Bake, name: str) -> None:
    project = bake(project_slug="a__b")
    settings = project / "pyproject.toml"
    settings.write_text(
        settings.read_text().replace('name = "a__b"', f'name = "{name}"', 1)
    )
    build(project)


@pytest.mark.slow
@pytest.mark.parametrize("license", choices()["license"])
def test_proprietary_project_rejects_upload(bake: Bake, license: str) -> None:
    classifiers = build(bake(project_slug="notes", license=license)).get_all(
        "Classifier", []
    )
    private = "Private :: Do Not Upload" in classifiers
    assert private == (license == "Proprietary")


def build(project: Path) -> Message:
    """Build the project's wheel and return its metadata."""
    run(PROGRAMS / "uv", "build", "--wheel", "--quiet", cwd=project)
    [wheel] = (project / "dist").glob("*.whl")
    [metadata] = distributions(path=[str(wheel)])
    return metadata.metadata


def prompt(name: str) -> str:
    """Return the wording of a question, as a user sees it."""
    wording = QUESTIONS["__prompts__"][name]
    return str(wording["__prompt__"] if isinstance(wording, dict) else wording)


def shown(markdown: str) -> list[str]:
    """Return the text of each heading and paragraph, as a reader sees it."""
    inline = [token for token in MarkdownIt().parse(markdown) if token.type == "inline"]
    return ["".join(part.content for part in token.children or ()) for token in inline]
