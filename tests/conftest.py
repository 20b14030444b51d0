"""A hostile room: one thread, fixed seed, uninitialised memory is NaN, no hub."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from helpers import QUICK, write_dialogues
from new_llm import cli

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# a shell's background job is born deaf to Ctrl-C, and so would be all that is started here
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ultrachat() -> Path:
    """Folder of real UltraChat dialogues; the test is skipped where there is none."""
    folder = os.environ.get("NEW_LLM_ULTRACHAT", "")
    if not folder or not Path(folder, "train.jsonl").is_file():
        pytest.skip("NEW_LLM_ULTRACHAT names no folder with train.jsonl")
    return Path(folder)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of real chats."""
    return write_dialogues(tmp_path_factory.mktemp("data") / "chats.jsonl", 24)


@pytest.fixture(scope="session")
def finished(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; a test that changes it takes a copy."""
    out = tmp_path_factory.mktemp("runs") / "a"
    assert cli.main(["run", "--data", str(chats), "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """A real browser; the tests that need it are skipped where there is none."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("NEW_LLM_BROWSER"):
            pytest.fail("NEW_LLM_BROWSER asks for the tests in a browser, but there is no chromium")
        pytest.skip("no chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
