"""`new-llm doctor` as a user runs it: large vocabularies, and what it cannot read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helpers import small_model
from new_llm import cli
from new_llm.checkpoint import save_checkpoint
from new_llm.model import NewLLM
from new_llm.tokenizer import ChatTokenizer


def _large_vocabulary(folder: Path, **shape: Any) -> Path:
    """A checkpoint with random weights over 100,000 token ids."""
    words = [*pre_tokenizers.ByteLevel.alphabet(), *(f"word{n}" for n in range(100_000))]
    words = words[: 100_000 - 2]
    backend = Tokenizer(models.BPE(dict(zip(words, range(len(words)), strict=True)), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = ChatTokenizer(backend)
    assert tokenizer.vocab_size == 100_000
    model = NewLLM(small_model("sequential", **shape), tokenizer.vocab_size)
    save_checkpoint(folder, model, tokenizer)
    return folder


def test_a_large_vocabulary_is_judged_by_a_sample_that_is_stated(
    chats: Path, tmp_path: Path
) -> None:
    checkpoint = _large_vocabulary(tmp_path / "c")
    out = tmp_path / "d.json"
    command = ["doctor", str(checkpoint), "--data", str(chats), "--json", str(out), "--quiet"]
    assert cli.main(command) == 0
    measured = json.loads(out.read_text())["measurements"]
    assert measured["tokens"]["value"] == 4 * 16
    assert measured["tokens_drawn_from"]["value"] == 10_000


@pytest.mark.parametrize("fault", ["no checkpoint", "other vocabulary", "no data", "a pickle"])
def test_what_the_doctor_cannot_read_gets_one_error(
    fault: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data, out = tmp_path / "c", tmp_path / "data.jsonl", tmp_path / "d.json"
    shutil.copytree(finished / "checkpoint", folder)
    data.write_text("")
    wanted = {
        "no checkpoint": "holds no model.safetensors",
        "other vocabulary": "tokenizer.json must match its checksum",
        "no data": "is empty",
        "a pickle": "safetensors",
    }[fault]
    if fault == "no checkpoint":
        shutil.rmtree(folder)
        folder.mkdir()
    elif fault == "other vocabulary":
        ChatTokenizer.train(iter(["some other text"]), 300).save(folder)
    elif fault == "a pickle":
        torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert cli.main(["doctor", str(folder), "--data", str(data), "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert wanted in error and len(error.splitlines()) <= 2
    assert "Traceback" not in error and not out.exists()
