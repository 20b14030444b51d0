"""The documentation: its examples run, its commands exist, its site builds."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import real_dialogues, register_cells, saved, write_dialogues
from new_llm import __all__ as public
from new_llm import cli, errors

ROOT = Path(__file__).parents[1]
# what was measured, as it was measured: no examples
RECORDS = {"LOG.md", "results.md"}
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    + [path for folder in ("", "how-to") for path in (ROOT / "docs" / folder).glob("*.md")
       if path.name not in RECORDS]
)  # fmt: skip
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
# seconds that a server may take to import everything and to listen
_PATIENCE = 120


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of a language, each with the line that it begins on."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def with_python() -> list[str]:
    return [name for name in NAMES if blocks(name, "python")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: runs, dialogues, a book."""
    folder = tmp_path_factory.mktemp("reader")
    for run in ("a", "demo"):
        saved(folder / "runs" / run / "checkpoint")
    write_dialogues(folder / "chats.jsonl", 12)
    write_dialogues(folder / "held_out.jsonl", 6)
    book = [message["content"] for messages in real_dialogues(20) for message in messages]
    (folder / "book.txt").write_text("\n".join(book) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def served(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The endpoint of docs/how-to/serve.md, where its environment says."""
    command = [sys.executable, "-m", "new_llm", "serve", "runs/a", "--port", "0"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        found = re.search(r"http://\S+/v1", run.stdout.readline())
        assert found
        monkeypatch.setenv("OPENAI_BASE_URL", found[0])
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        yield
        run.terminate()
        run.wait(_PATIENCE)


@pytest.mark.parametrize("page", with_python())
def test_python_blocks_run(
    page: str, place: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.endswith("serve.md"):
        request.getfixturevalue("served")
    monkeypatch.chdir(place)
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, block in blocks(page, "python"):
        # so that a traceback names the page and its line
        code = compile("\n" * (line - 1) + block, str(ROOT / page), "exec")
        exec(code, namespace)


def commands(page: str) -> Iterator[list[str]]:
    """Yield the lines of our own command, as a shell would part them."""
    for _, block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["new-llm"]:
                yield words[1:]


@pytest.mark.parametrize("page", [name for name in NAMES if blocks(name, "bash")])
def test_command_lines_are_understood(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the name that docs/how-to/own-cell.md registers
    register_cells(tmp_path, "mycell", {"mycell": "MyCell"})
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, *arguments in commands(page):
        if name not in ("--help", "--version"):
            assert cli.parse(name, arguments) is not None


def test_the_pages_name_every_command() -> None:
    named = {words[0] for page in NAMES for words in commands(page)}
    # the stages of a run are shown by its help
    assert set(cli.COMMANDS) - named <= {"phase1", "cache", "phase2"}


def test_json_blocks_are_dialogues_that_we_read() -> None:
    from new_llm.dialogues import check_dialogue

    for page in NAMES:
        for line, block in blocks(page, "json"):
            assert check_dialogue(json.loads(block), f"{page}, line {line}")


def test_the_reference_has_every_public_name_and_error() -> None:
    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE))
    last = {name.rpartition(".")[2] for name in named}
    assert set(public) - {"__version__"} <= last
    # a whole module: its classes come with it
    assert "new_llm.errors" in named and errors.NewLLMError.__module__ == "new_llm.errors"


def test_every_figure_is_shown_and_every_shown_one_is_there() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    shown = set(re.findall(r"\((?:\.\./)?figures/([\w.-]+)\)", pages))
    assert shown == {path.name for path in (ROOT / "docs/figures").iterdir()}
    drawn = re.findall(r'yield "([\w-]+)"', (ROOT / "docs/figures.py").read_text())
    taken = {f"{name}-{size}.png" for name in ("page", "report") for size in ("desktop", "phone")}
    assert shown == {f"{name}.svg" for name in drawn} | taken


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.relative_to(tmp_path).parent.as_posix() for path in tmp_path.rglob("index.html")}
    assert {"first-hour", "ideas", "reference", "LOG", "how-to/own-cell"} <= pages
    assert not (tmp_path / "results" / "trials").exists()
    fetched = re.compile(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//|'
                         r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//|'
                         r"url\([\"']?(?:https?:)?//")  # fmt: skip
    for path in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        assert not fetched.search(path.read_text(encoding="utf-8")), path
