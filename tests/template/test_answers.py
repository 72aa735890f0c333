"""Bad answers stop the bake with one sentence; odd ones come out as they were typed."""

import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from cookiecutter.exceptions import FailedHookException, OutputDirExistsException
from cookiecutter.main import cookiecutter
from markdown_it import MarkdownIt

from ..support.answers import QUESTIONS
from ..support.commands import PROGRAMS
from ..support.projects import check_style

SHAPE = (
    "use 1 to 40 lower-case letters, digits and underscores, a letter first and no "
    "underscore last."
)
KEYWORD = "a keyword of Python: use another name."
TAKEN = (
    "which the project would import in place of another module: use a name that no "
    "module of Python's or its packages has."
)
CONTROL = "holds a line break or control character: use one plain line."

SLUGS = {
    "Notes": SHAPE,
    "my-notes": SHAPE,
    "1notes": SHAPE,
    "notes_": SHAPE,
    "_notes": SHAPE,
    "my notes": SHAPE,
    "n" * 41: SHAPE,
    "../notes": SHAPE,
    "nоtes": SHAPE,  # a Cyrillic о
    "ｎotes": SHAPE,  # a full-width n, which Python takes for an n
    "notes٣": SHAPE,  # an Arabic digit
    'notes"': SHAPE,
    "class": KEYWORD,
    "match": KEYWORD,
    "json": TAKEN,
    "flask": TAKEN,
    "psycopg2": TAKEN,
    "psycopg2_binary": TAKEN,
    "tests": TAKEN,
    "devserver": TAKEN,
}

ODD = [
    """both 'kinds' of "quotes" """.strip(),
    "back\\slashes\\",
    "{{ braces }} {% and %} {# more #}",
    "# number sign #",
    "emoji 😀 👩‍👩‍👧 and ünïcödé",
    "<b>&amp;</b> *stars* _lines_ `ticks` [link](to) ~~struck~~",
    "x" * 500,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder in an empty folder, which both are to stay so."""
    folder = tmp_path / "parent" / "output"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def refusal(
    template: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Bake with answers that will not do, and return the sentence about them."""

    def refusal(**answers: str) -> str:
        with pytest.raises(FailedHookException):
            bake_in(folder, template, **answers)
        assert list(folder.iterdir()) == []
        [sentence] = [line for line in capfd.readouterr().err.splitlines() if line]
        return sentence

    return refusal


def bake_in(folder: Path, template: Path, **answers: str) -> None:
    """Bake without a question."""
    cookiecutter(
        str(template),
        no_input=True,
        extra_context=answers,
        output_dir=str(folder),
        default_config=True,
    )


@pytest.mark.parametrize("slug", SLUGS, ids=ascii)
def test_bad_slug_is_refused(
    folder: Path, refusal: Callable[..., str], slug: str
) -> None:
    sentence = refusal(project_slug=slug)
    separator = ":" if SLUGS[slug] == SHAPE else ","
    assert sentence == f"project_slug is {slug!r}{separator} {SLUGS[slug]}"
    assert list(folder.parent.iterdir()) == [folder]


def test_empty_slug_is_refused(template: Path, folder: Path) -> None:
    # Cookiecutter itself does, before any hook: the folder to make is there already.
    with pytest.raises(OutputDirExistsException):
        bake_in(folder, template, project_slug="")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028"])
@pytest.mark.parametrize(
    "name", ["project_name", "description", "author_name", "author_email"]
)
def test_control_character_is_refused(
    refusal: Callable[..., str], name: str, character: str
) -> None:
    answers = {"project_slug": "notes", name: f"a{character}b"}
    sentence = refusal(**answers)
    assert sentence == f"{name} {CONTROL}"


@pytest.mark.parametrize("name", ["project_name", "description", "author_name"])
def test_too_long_a_text_is_refused(refusal: Callable[..., str], name: str) -> None:
    answers = {"project_slug": "notes", name: "x" * 501}
    sentence = refusal(**answers)
    assert sentence == f"{name} has 501 characters: use at most 500."


@pytest.mark.parametrize("name", ["project_name", "author_name"])
def test_empty_text_is_refused(refusal: Callable[..., str], name: str) -> None:
    sentence = refusal(**{"project_slug": "notes", name: " "})
    assert sentence == f"{name} is empty: use at least one character."


@pytest.mark.parametrize("email", ["", "me", "me@", 'a"b@c', "a@b c", "a@b\\"])
def test_bad_email_is_refused(refusal: Callable[..., str], email: str) -> None:
    sentence = refusal(author_email=email)
    message = f"author_email is {email!r}: use an address such as you@example.com."
    assert sentence == message


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:12]))
def test_odd_text_is_shown_unharmed(template: Path, tmp_path: Path, text: str) -> None:
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


def prompt(name: str) -> str:
    """Return what is asked, as a reader sees it."""
    wording = QUESTIONS["__prompts__"][name]
    return str(wording["__prompt__"] if isinstance(wording, dict) else wording)


def shown(markdown: str) -> list[str]:
    """Return the text of each heading and paragraph, as a reader sees it."""
    inline = [token for token in MarkdownIt().parse(markdown) if token.type == "inline"]
    return ["".join(part.content for part in token.children or ()) for token in inline]
