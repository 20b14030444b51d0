"""The page to talk at, clicked through in a real browser, as a user opens it."""

import html
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers import saved, served
from new_llm import cli
from new_llm.checkpoint import load_checkpoint
from new_llm.config import SampleConfig
from new_llm.console import printable
from new_llm.generate import Conversation
from new_llm.view import distance

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as BrowserPage

SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
SETTLED = "document.querySelector('#settled')"
APART = f"{SETTLED}?.innerText.includes('apart')"
HEADINGS = ["Where the context went", "How each token settled", "How long its gates remember",
            "Had it forgotten"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("ui") / "small")


@pytest.fixture(scope="module")
def url(folder: Path, browser: "Browser") -> Iterator[str]:
    with served("ui", str(folder), "--max-new-tokens", "12", "--temperature", "0") as place:
        yield place


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: "Browser", url: str) -> "Iterator[BrowserPage]":
    opened = browser.new_page(viewport=SIZES[request.param])  # pyright: ignore[reportArgumentType]
    asked, wrong = [], []
    opened.on("request", lambda found: asked.append(found.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(url)
    opened.wait_for_selector("#say textarea")
    yield opened
    assert not wrong
    # it asks nothing of any other machine
    assert not [place for place in asked if not place.startswith((url, "data:", "blob:", "ws:"))]
    opened.close()


def say(page: "BrowserPage", text: str) -> None:
    page.fill("#say textarea", text)
    page.keyboard.press("Enter")


def answers(page: "BrowserPage", talk: str) -> list[str]:
    return [
        found.inner_text().strip() for found in page.query_selector_all(f"#{talk} .bot.message")
    ]


def test_a_reader_talks_forks_and_resets(page: "BrowserPage", folder: Path) -> None:
    ours = Conversation(load_checkpoint(folder), SampleConfig(max_new_tokens=12, temperature=0.0))
    first = "".join(ours.reply("hello there")).strip()
    say(page, "hello there")
    page.wait_for_selector("#settled")
    assert answers(page, "A") == [first]
    seen = page.inner_text("#seen")
    assert all(heading in seen for heading in HEADINGS)
    assert f"{len(ours.recent)} tokens, settled in" in seen
    assert page.locator("#seen svg").count() == 3
    assert not page.is_visible("#B")
    # both go on from the same memory, and part
    page.click("#fork")
    page.wait_for_selector("#B")
    page.wait_for_function(APART)
    assert "A and B are 0% apart" in page.inner_text("#settled")
    other = ours.fork()
    second = "".join(other.reply("and you?")).strip()
    say(page, "and you?")
    page.wait_for_function(
        f"{APART} && !document.querySelector('#settled').innerText.includes(' 0%')"
    )
    assert answers(page, "B") == [first, second] and answers(page, "A") == [first]
    assert ours.context is not None and other.context is not None
    apart = f"A and B are {distance(ours.context, other.context):.0%} apart"
    assert apart in page.inner_text("#settled")
    table = page.inner_text("#seen table")
    assert table.count("not at all") == 2 and "16 back" in table
    # one message to both
    page.click("#whom label:has-text('both')")
    third = "".join(ours.reply("fine")).strip()
    "".join(other.reply("fine"))
    say(page, "fine")
    page.wait_for_function(f"{SETTLED}.innerText.startsWith('{len(other.recent)} tokens')")
    page.wait_for_function("document.querySelectorAll('#B .bot.message').length == 3")
    page.wait_for_function("document.querySelectorAll('#A .bot.message').length == 2")
    assert answers(page, "A") == [first, third]
    page.click("#reset")
    page.wait_for_function("document.querySelectorAll('#A .bot.message').length == 0")
    page.wait_for_selector("#B", state="hidden")
    assert "once something was said" in page.inner_text("#seen")
    # nothing is wider than the screen
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_what_is_said_is_never_part_of_the_page(page: "BrowserPage") -> None:
    say(page, "<img src=x onerror=alert(1)> <b>bold</b>")
    page.wait_for_selector("#settled")
    assert page.locator("#A img[src=x]").count() == 0
    assert "<b>bold</b>" in page.inner_text("#A .user.message")


def test_an_empty_message_is_no_turn(page: "BrowserPage") -> None:
    say(page, "   ")
    page.wait_for_timeout(500)
    assert answers(page, "A") == [] and "once something was said" in page.inner_text("#seen")


def test_what_is_drawn_is_what_the_command_asks_for(folder: Path) -> None:
    from new_llm.ui import Page

    config = SampleConfig(max_new_tokens=12, temperature=1.0, top_k=7, seed=5)
    page = Page(load_checkpoint(folder), config, "small")
    *_, last = page._say(None, "hello there", "A", config.temperature, config.max_new_tokens)
    expected = "".join(Conversation(load_checkpoint(folder), config).reply("hello there"))
    assert html.unescape(last[1].talks[0].said[-1]["content"]) == printable(expected)


def test_the_page_takes_what_the_command_asks_for(folder: Path) -> None:
    # apart from the tests: Gradio leaves an event loop open
    code = """
import sys, gradio
from new_llm.checkpoint import load_checkpoint
from new_llm.config import SampleConfig
from new_llm.ui import Page
config = SampleConfig(max_new_tokens=500, temperature=3.0)
blocks = Page(load_checkpoint(sys.argv[1]), config, "small").blocks()
sliders = [one for one in blocks.blocks.values() if isinstance(one, gradio.Slider)]
# one that is beyond its end refuses every message
print(sorted(one.preprocess(one.value) for one in sliders))
"""
    command = [sys.executable, "-c", code, str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[3.0, 500]"


def test_two_readers_have_their_own_talks(
    page: "BrowserPage", browser: "Browser", url: str
) -> None:
    say(page, "hello")
    page.wait_for_selector("#settled")
    other: Any = browser.new_page()
    other.goto(url)
    other.wait_for_selector("#say textarea")
    assert answers(other, "A") == []
    other.close()


def test_an_address_that_cannot_be_used_is_said_in_one_line(
    folder: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = url.rpartition(":")[2]
    assert cli.main(["ui", str(folder), "--port", port]) == 2
    assert f"127.0.0.1 port {port} cannot be used" in capsys.readouterr().err
