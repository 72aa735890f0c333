"""Pages of a baked project in Chromium show each saved change without a reload."""

import re
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Literal

import pytest
from playwright.sync_api import ConsoleMessage, Locator, Page, expect

from ..support.commands import DEADLINE
from ..support.machine import open_browser
from ..support.projects import Bake
from ..support.serving import Site

expect.set_options(timeout=1000 * DEADLINE)

NAME = """Tom's & "<b>Ann</b>'s" {{ 7 * 7 }} 😀"""
DESCRIPTION = """{# A comment #} &amp; <script>alert(1)</script> \\\\"""
HIDE = "Object.defineProperty(document, 'hidden', { value: true })"


@pytest.fixture
def browser_page() -> Iterator[Page]:
    """A new page of an installed browser."""
    with open_browser() as browser:
        page = browser.new_page()
        page.set_default_timeout(1000 * DEADLINE)
        yield page


@pytest.fixture
def site(bake: Bake) -> Site:
    """A default project, not yet served."""
    return Site(bake(project_slug="app"))


def test_page_reloads_on_save_and_after_an_outage(
    site: Site, browser_page: Page
) -> None:
    complaints = complaints_of(browser_page)
    template = site.folder / "app" / "templates" / "notes.html"
    module = site.folder / "app" / "notes.py"
    good = module.read_text()
    heading = browser_page.locator("h1")
    notice = browser_page.get_by_role("alert")

    with site.serve():
        browser_page.goto(site.url + "notes")
        browser_page.get_by_label("Note").fill("Buy milk")
        browser_page.get_by_role("button").click()
        expect(browser_page.get_by_text("Buy milk")).to_be_visible()
        for version in range(5):
            retitle(template, f"Version {version}")
            expect(heading).to_have_text(f"Version {version}")
        assert complaints == []

        browser_page.get_by_label("Note").fill(" ")
        browser_page.get_by_role("button").click()  # The response is a 400.
        retitle(template, "Version 5")
        expect(notice).to_have_text(re.compile("There is a new version"))
        browser_page.goto(site.url + "notes")
        expect(heading).to_have_text("Version 5")

        module.write_text(good + "\ndef broken(:\n")
        expect(browser_page).to_have_title(re.compile("SyntaxError|notes.py"))
        module.write_text(good)
        expect(heading).to_have_text("Version 5")
        expect(notice).to_be_hidden()
        browser_page.wait_for_load_state()  # With it come the scripts.

    expect(notice).to_have_text(re.compile("The server does not respond"))
    retitle(template, "Back")
    with site.serve():
        expect(heading).to_have_text("Back")
        expect(notice).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_readable_on_a_phone(
    site: Site, browser_page: Page, scheme: Literal["light", "dark"]
) -> None:
    browser_page.set_viewport_size({"width": 320, "height": 640})
    browser_page.emulate_media(color_scheme=scheme)
    with site.serve():
        for path in ("notes", "none"):
            browser_page.goto(site.url + path)
            expect(browser_page.locator("h1")).to_be_visible()
            assert browser_page.evaluate("document.body.scrollWidth") <= 320
            ratios = browser_page.evaluate(CONTRASTS)
            assert len(ratios) > 2
            assert min(ratios.values()) >= 4.5, ratios


# The contrast ratio (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio) between each
# element with text or a placeholder and the nearest background that is not transparent.
CONTRASTS = """() => {
  const settings = { willReadFrequently: true };
  const canvas = document.createElement("canvas").getContext("2d", settings);
  const luminance = color => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(value => {
      value /= 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    const color = getComputedStyle(element).backgroundColor;
    return /, 0\\)$/.test(color) ? background(element.parentElement) : color;
  };
  const ratios = {};
  for (const element of document.querySelectorAll("main *")) {
    const pseudo = element.placeholder ? "::placeholder" : null;
    const text = [...element.childNodes].filter(node => node.nodeType === 3);
    if (!pseudo && !text.some(node => node.data.trim())) continue;
    const [low, high] = [getComputedStyle(element, pseudo).color, background(element)]
      .map(luminance).sort((a, b) => a - b);
    ratios[element.tagName] = (high + 0.05) / (low + 0.05);
  }
  return ratios;
}"""

ROUTE = """

@bp.get("/sleep")
def sleep() -> str:
    from .tasks import sleep

    sleep.delay()
    sleep.delay()
    with get_db().cursor() as cursor:
        cursor.execute("SELECT pg_sleep(3)")
    return "slept"
"""
FIRST_PAGE = """

def first_page() -> str:
    return "<h1>Mine</h1>"


bp.record_once(lambda state: state.app.add_url_rule("/", view_func=first_page))
"""
TASK = """

@task
def sleep() -> None:
    with get_db().cursor() as cursor:
        cursor.execute("SELECT pg_sleep(3)")
"""


def test_welcome_page_updates_its_figures(bake: Bake, browser_page: Page) -> None:
    names = {"project_name": answer(NAME), "description": answer(DESCRIPTION)}
    site = Site(bake(project_slug="app", worker="thread", **names))
    complaints = complaints_of(browser_page)

    with site.serve():
        browser_page.goto(site.url)
        expect(browser_page.locator("h1")).to_have_text("app")
        expect(browser_page.locator("header p")).to_have_text(DESCRIPTION)
        expect(browser_page).to_have_title("app")
        expect(figure(browser_page, "process.reload")).to_have_count(0)  # none so far

        browser_page.get_by_role("link", name="/notes", exact=True).click()
        browser_page.get_by_label("Note").fill("Buy milk")
        browser_page.get_by_role("button").click()
        expect(browser_page.get_by_text("Buy milk")).to_be_visible()
        browser_page.goto(site.url)

        append(site.folder / "app" / "tasks.py", TASK)
        append(site.folder / "app" / "notes.py", ROUTE)
        expect(browser_page.get_by_role("link", name="/notes/sleep")).to_be_visible()
        reload = figure(browser_page, "process.reload")
        expect(reload).to_have_text(re.compile(r"^\d\.\d\d s$"))

        Thread(target=site.page, args=["notes/sleep"], daemon=True).start()
        busy = {"pool.in_use": "2", "worker.running": "1", "worker.waiting": "1"}
        for name, value in busy.items():
            expect(figure(browser_page, name)).to_have_text(value)
        for name in busy:
            expect(figure(browser_page, name)).to_have_text("0")
        assert complaints == []

        append(site.folder / "app" / "notes.py", FIRST_PAGE)
        expect(browser_page.locator("h1")).to_have_text("Mine")
    assert "_flask_dev" not in site.log.read_text()


def test_welcome_page_polls_only_while_visible(site: Site, browser_page: Page) -> None:
    asked: list[str] = []
    browser_page.on("request", lambda request: asked.append(request.url))
    browser_page.clock.install()
    with site.serve():
        browser_page.goto(site.url)
        with browser_page.expect_request("**/status"):
            browser_page.clock.run_for(1500)
        browser_page.evaluate(HIDE)
        before = len(asked)
        browser_page.clock.run_for(10_000)
        assert len(asked) == before


def test_welcome_page_works_without_scripts(site: Site, browser_page: Page) -> None:
    browser = browser_page.context.browser
    assert browser
    page = browser.new_context(java_script_enabled=False).new_page()
    with site.serve():
        page.goto(site.url)
        expect(figure(page, "pool.size")).to_have_text("8")
        page.get_by_role("link", name="/notes", exact=True).click()
        expect(page.locator("h1")).to_have_text("Notes")


def complaints_of(page: Page) -> list[str]:
    """Return a list that grows by each uncaught error and console message of the page.

    Remarks of the browser's own do not count: Chromium makes one when a test fills in
    a field before `autofocus` reaches it.
    """
    complaints: list[str] = []

    def add(message: ConsoleMessage) -> None:
        if message.type not in ("info", "debug"):
            complaints.append(message.text)

    page.on("console", add)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return complaints


def answer(text: str) -> str:
    """Return an answer to a question that Cookiecutter renders as the text."""
    return "{% raw %}" + text + "{% endraw %}"


def figure(page: Page, name: str) -> Locator:
    """Return the locator of a figure on the welcome page."""
    return page.locator(f"dd[data-figure='{name}']")


def append(file: Path, text: str) -> None:
    """Append `text` to `file`."""
    file.write_text(file.read_text() + text)


def retitle(template: Path, title: str) -> None:
    """Change the title in `template`, which the heading repeats."""
    pattern = r"{% block title %}.*?{%"
    replace(template, pattern, f"{{% block title %}}{title}{{%")


def replace(file: Path, pattern: str, text: str) -> None:
    """Replace the matches of the pattern in `file` with `text`."""
    file.write_text(re.sub(pattern, text, file.read_text()))
