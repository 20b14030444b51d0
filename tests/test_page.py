"""The report in a real browser: every figure drawn, nothing asked for, legible everywhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers import QUICK
from new_llm import cli
from new_llm.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# text that the Web Content Accessibility Guidelines call legible
CONTRAST = 4.5
# what a reader's eye compares: a text's colour and the first opaque colour behind it
LEAST_CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
      v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const c = parse(getComputedStyle(node).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let worst = [99, ''];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !node.getClientRects().length || node.closest('style, defs')) continue;
    const style = getComputedStyle(node);
    const colour = parse(node.closest('svg') ? style.fill : style.color);
    const pair = [light(colour), light(behind(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.textContent.trim().slice(0, 40)];
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def page_file(
    finished: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The page of one run, and that of two side by side."""
    folder = tmp_path_factory.mktemp("page")
    seeds = folder / "seed-layerwise"
    brief = ["--phase1.literal-dialogues", "1", "--phase1.max-steps", "4", "--phase1.epochs", "1"]
    arguments = ["run", "seed-layerwise", "--data", str(chats), "--out", str(seeds), *QUICK]
    assert cli.main([*arguments, *brief, "--data.tokenizer", "bpe"]) == 0
    both = folder / "both.html"
    write_report([finished, seeds], both)
    return finished / "report.html", both


def opened(browser: "Browser", path: Path, **options: Any) -> "tuple[Page, list[str], list[str]]":
    page = browser.new_page(**options)
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    return page, errors, requests


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_drawn_and_legible(
    browser: "Browser", page_file: tuple[Path, Path], which: int, viewport: Any, scheme: Any
) -> None:
    path = page_file[which]
    page, errors, requests = opened(browser, path, viewport=viewport, color_scheme=scheme)
    assert errors == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    figures = page.locator("figure svg")
    assert figures.count() >= 10
    for number in range(figures.count()):
        figure = figures.nth(number)
        box = figure.bounding_box()
        assert box is not None and box["width"] > 200 and box["height"] > 100
        # a line, a bar or a picture that takes room inside the axes
        marks = figure.evaluate(
            "svg => [...svg.querySelectorAll('path, use, image')]"
            ".filter(mark => mark.getBoundingClientRect().width > 2).length"
        )
        assert marks > 4, page.locator("figure h3").nth(number).inner_text()
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "the page is wider than the screen"
    ratio, text = page.evaluate(LEAST_CONTRAST)
    assert ratio >= CONTRAST, text
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_prints_dark_on_white(
    browser: "Browser", page_file: tuple[Path, Path], scheme: Any, tmp_path: Path
) -> None:
    page, errors, _ = opened(browser, page_file[1], color_scheme=scheme)
    page.emulate_media(media="print", color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ratio, text = page.evaluate(LEAST_CONTRAST)
    assert ratio >= CONTRAST, text
    # no figure is cut in two by the end of a sheet
    breaks = page.evaluate("[...document.querySelectorAll('figure')]"
                           ".map(f => getComputedStyle(f).breakInside)")  # fmt: skip
    assert set(breaks) == {"avoid"}
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 50_000
    assert errors == []
    page.close()


def test_the_verdict_leads(browser: "Browser", page_file: tuple[Path, Path]) -> None:
    page, _, _ = opened(browser, page_file[0], viewport=PHONE)
    headline = page.locator(".headline").first
    box = headline.bounding_box()
    assert box is not None and box["y"] < PHONE["height"] / 2
    assert "ealthy" in headline.inner_text()
    page.close()
