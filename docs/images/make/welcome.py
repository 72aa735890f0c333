"""Rate the welcome page with Lighthouse, and draw docs/images/start.png.

The script needs Chromium and npx, which downloads Lighthouse. It prints the scores.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

TEMPLATE = Path(__file__).parents[3]
sys.path[:0] = [str(TEMPLATE), str(TEMPLATE / "bench")]

from reload import PROGRAMS, remove_databases  # noqa: E402

from tests.support.serving import Site  # noqa: E402

CATEGORIES = ("accessibility", "best-practices")
FORMS = {"phone": [], "desktop": ["--preset=desktop"]}
SCHEMES = {"dark": 0, "light": 1}  # as Chromium counts them
LOCK = """
import psycopg2, sys
cursor = psycopg2.connect(sys.argv[1]).cursor()
cursor.execute("LOCK notes")
print("locked", flush=True)
sys.stdin.read()
"""
PICTURE = """
<style>
  body {{ margin: 0; width: 1340px; }}
  img {{ display: block; border-radius: 14px; box-shadow: 0 2px 14px #0004; }}
  img + img {{ position: absolute; right: 16px; top: 130px; border-radius: 26px; }}
  img:first-child {{ margin: 16px; }}
</style>
<img src="data:image/png;base64,{}"><img src="data:image/png;base64,{}">
"""


def scores(url: str, form: str, scheme: str) -> dict[str, int]:
    """Return the scores of Lighthouse by category, at most 100."""
    dark = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    done = subprocess.run(
        ["npx", "--yes", "lighthouse@12", url, *FORMS[form], "--quiet"]
        + [f"--only-categories={','.join(CATEGORIES)}", "--output=json"]
        + [f"--chrome-flags=--headless=new --no-sandbox {dark}"],
        stdout=subprocess.PIPE,
        check=True,
    )
    categories = json.loads(done.stdout)["categories"]
    return {name: round(100 * categories[name]["score"]) for name in CATEGORIES}


@contextmanager
def requests_in_course(site: Site, count: int) -> Iterator[None]:
    """Keep requests waiting for a lock until the end of the block."""
    services = site.folder / "instance" / "postgres" / "pg_service.conf"
    with subprocess.Popen(
        [site.command[0].with_name("python"), "-c", LOCK, "service=dev"],
        env=os.environ | {"PGSERVICEFILE": str(services)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as locker:
        assert locker.stdout and locker.stdout.readline()
        for _ in range(count):
            threading.Thread(target=site.page, args=["notes"]).start()
        yield
        locker.communicate()


def picture(browser: Browser, site: Site, scheme: str, width: int, height: int) -> str:
    """Return a picture of the page in base64, with three connections in use."""
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
    page = browser.new_page(**options)
    page.goto(site.url)
    with requests_in_course(site, 3):
        expect(page.locator("dd[data-figure='pool.in_use']")).to_have_text("3")
        page.wait_for_timeout(500)  # A transition takes this long.
        return b64encode(page.screenshot()).decode()


def draw(browser: Browser, site: Site) -> None:
    """Draw the page on a desktop, and in dark mode on a phone in front of it."""
    large = picture(browser, site, "light", 1060, 790)
    small = picture(browser, site, "dark", 330, 690)
    page = browser.new_page(viewport={"width": 1340, "height": 850})
    page.set_content(PICTURE.format(large, small))
    file = TEMPLATE / "docs" / "images" / "start.png"
    page.screenshot(path=file, omit_background=True, full_page=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = ["project_name=Shopping Lists", "description=Who brings what."]
        answers = [*names, "worker=thread"]
        cookiecutter = [PROGRAMS / "cookiecutter", TEMPLATE, "--no-input", *answers]
        subprocess.run(cookiecutter, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        site = Site(Path(folder) / "shopping_lists")
        with site.serve(), sync_playwright() as playwright:
            (site.folder / "shopping_lists" / "notes.py").touch()
            for form in FORMS:
                for scheme in SCHEMES:
                    print(form, scheme, scores(site.url, form, scheme))
            chromium = shutil.which("chromium")
            draw(playwright.chromium.launch(executable_path=chromium), site)
        remove_databases(Path(folder))


if __name__ == "__main__":
    main()
