"""A hostile room: one thread, fixed seed, uninitialised memory is NaN, no hub."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

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
