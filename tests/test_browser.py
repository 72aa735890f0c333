"""A page of a baked project in Chromium: it shows what is saved, and comes back."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from .conftest import Bake
from .serving import Site


@pytest.fixture
def browser_page() -> Iterator[Page]:
    """A page of the Chromium that the machine has."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "The tests need Chromium: install the package chromium."
    with sync_playwright() as playwright:
        options = ["--no-sandbox"]  # which root cannot do without
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield browser.new_page()
        browser.close()


@pytest.fixture
def site(bake: Bake) -> Site:
    """A project with the defaults, to be served."""
    return Site(bake(project_slug="app"))


def test_page_shows_what_is_saved_and_comes_back(
    site: Site, browser_page: Page
) -> None:
    console: list[str] = []
    browser_page.on("console", lambda message: console.append(message.text))
    template = site.folder / "app" / "templates" / "notes.html"
    module = site.folder / "app" / "notes.py"
    good = module.read_text()
    heading = browser_page.locator("h1")
    notice = browser_page.get_by_role("alert")

    with site.serve():
        browser_page.goto(site.url)
        browser_page.get_by_label("Note").fill("Buy milk")
        browser_page.get_by_role("button").click()
        expect(browser_page.get_by_text("Buy milk")).to_be_visible()
        for version in range(5):
            replace(template, r"<h1>.*</h1>", f"<h1>Version {version}</h1>")
            expect(heading).to_have_text(f"Version {version}")
        assert console == []

        browser_page.get_by_label("Note").fill(" ")
        browser_page.get_by_role("button").click()  # which is answered 400
        replace(template, r"<h1>.*</h1>", "<h1>Version 5</h1>")
        expect(notice).to_have_text(re.compile("There is a new version"))
        browser_page.goto(site.url)
        expect(heading).to_have_text("Version 5")

        module.write_text(good + "\ndef broken(:\n")
        expect(browser_page).to_have_title(re.compile("SyntaxError|notes.py"))
        module.write_text(good)
        expect(heading).to_have_text("Version 5")
        expect(notice).to_be_hidden()

    expect(notice).to_have_text(re.compile("The server does not answer"))
    replace(template, r"<h1>.*</h1>", "<h1>Back</h1>")
    with site.serve():
        expect(heading).to_have_text("Back")
        expect(notice).to_be_hidden()


def replace(file: Path, pattern: str, text: str) -> None:
    """Save `file` with `text` in place of what the pattern matches."""
    file.write_text(re.sub(pattern, text, file.read_text()))
