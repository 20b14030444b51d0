"""The screenshots of these pages: `python docs/screenshots.py runs/demo`, of a finished run.

Opens the report, and `new-llm ui` after a short talk, in Chromium at the size of a desk and of a
phone, and writes `docs/figures/{report,page}-{desktop,phone}.png`.
"""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

FIGURES = Path(__file__).with_name("figures")
SIZES = {"desktop": (1280, 1000), "phone": (390, 844)}
# how much of a long page is shown, in screens
SCREENS = {"desktop": 1.8, "phone": 3.0}
APART = "document.querySelector('#settled')?.innerText.includes('apart')"


def opened(browser: Browser, size: str) -> Page:
    """Return an empty tab of a size."""
    width, height = SIZES[size]
    return browser.new_page(viewport={"width": width, "height": height})


def taken(page: Page, name: str, size: str) -> None:
    """Write what a tab shows, from its top on."""
    width, height = SIZES[size]
    whole = page.evaluate("document.documentElement.scrollHeight")
    shown = {"x": 0, "y": 0, "width": width, "height": min(whole, int(height * SCREENS[size]))}
    picture = page.screenshot(full_page=True, clip=shown)  # pyright: ignore[reportArgumentType]
    # a palette is enough for a page, and a third of the size
    few = Image.open(io.BytesIO(picture)).convert("RGB").quantize(128)
    few.save(FIGURES / f"{name}-{size}.png", optimize=True)
    page.close()


def talk(page: Page, url: str) -> None:
    """Hold a short talk, fork it, and go on in the fork."""
    page.goto(url)
    page.wait_for_selector("#say textarea")
    page.fill("#say textarea", "hello, how are you?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#settled")
    page.click("#fork")
    page.wait_for_function(APART)
    page.fill("#say textarea", "what do you like to do?")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{APART} && !document.querySelector('#settled').innerText.match(/ 0%/)")


def main(run: Path) -> None:
    """Take all of them."""
    FIGURES.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "new_llm", "ui", str(run), "--max-new-tokens", "30"]
    with (
        sync_playwright() as playwright,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served,
    ):
        assert served.stdout is not None
        found = re.search(r"http://\S+", served.stdout.readline())
        assert found, "new-llm ui did not say its address"
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for size in SIZES:
            page = opened(browser, size)
            page.goto((run / "report.html").resolve().as_uri())
            taken(page, "report", size)
            page = opened(browser, size)
            talk(page, found[0])
            taken(page, "page", size)
        browser.close()
        served.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
