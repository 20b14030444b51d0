"""lm-evaluation-harness says of a checkpoint what we say of it: by transformers, and by ours."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import saved, write_dialogues
from new_llm import cli
from new_llm.checkpoint import load_checkpoint
from new_llm.config import SampleConfig
from new_llm.generate import generate

TASKS = Path(__file__).parents[1] / "src" / "new_llm" / "harness_tasks"
WAYS = {
    "transformers": ["-m", "lm_eval", "--model", "hf", "--include_path", str(TASKS)],
    "ours": ["-m", "new_llm.harness", "--model", "new_llm"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("harness") / "small")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("chats") / "chats.jsonl", 12)


def chosen(folder: Path, chats: Path) -> float:
    """Return how often the likeliest of four answers was given, read one text after another."""
    sys.path.insert(0, str(TASKS))
    try:
        import dialogues  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(TASKS))
    loaded = load_checkpoint(folder)
    rows = dialogues.with_choices(dialogues.load(str(chats))["test"])
    assert len(rows) >= 10 and {len(row["choices"]) for row in rows} == {4}
    right = 0
    for row in rows:
        told = []
        for choice in row["choices"]:
            before = loaded.tokenizer.encode_marked(row["before"])
            ids = torch.tensor([loaded.tokenizer.encode_marked(row["before"] + choice)])
            with torch.no_grad():
                shares = loaded.model.logits(loaded.model(ids).features[0]).log_softmax(dim=-1)
            said = shares[:-1].gather(1, ids[0, 1:, None])[len(before) - 1 :]
            told.append(said.sum().item())
        right += told.index(max(told)) == row["answer"]
    return right / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_harness_agrees_with_us(way: str, folder: Path, chats: Path, tmp_path: Path) -> None:
    about = {"data": str(chats), "tokenizer": str(folder)}
    asked = [f"pretrained={folder},trust_remote_code=True", "--tasks", "dialogues,answers",
             "--metadata", json.dumps(about), "--output_path", str(tmp_path / "out"),
             "--batch_size", "4", "--device", "cpu"]  # fmt: skip
    run = subprocess.run(
        [sys.executable, *WAYS[way], "--model_args", *asked], capture_output=True, text=True,
        cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found: dict[str, Any] = json.loads(written.read_text())["results"]
    ours = tmp_path / "evaluation.json"
    arguments = ["evaluate", str(folder), "--data", str(chats), "--json", str(ours), "--quiet"]
    assert cli.main(arguments) == 0
    expected = json.loads(ours.read_text())
    for name in ("loss", "bits_per_byte"):
        assert found["dialogues"][f"{name},none"] == pytest.approx(expected[name], abs=1e-4)
    assert found["answers"]["acc,none"] == pytest.approx(chosen(folder, chats))


def test_our_model_in_the_harness_continues_and_scores(folder: Path) -> None:
    from new_llm.harness import HarnessLM

    model, loaded = HarnessLM(str(folder), batch_size=2), load_checkpoint(folder)

    class Asked:
        def __init__(self, *args: Any) -> None:
            self.args = args

    stop = {"until": ["e"], "max_gen_toks": 20}
    told = model.generate_until([Asked("hello", stop), Asked("how are", {"max_gen_toks": 9})], True)
    config = SampleConfig(max_new_tokens=20, temperature=0.0)
    assert told[0] == generate(loaded, "hello", config).partition("e")[0]
    texts = ["hello there", "hi", "how are you? " * 200]
    found = model.loglikelihood_rolling([Asked(text) for text in texts], True)
    for text, value in zip(texts, found, strict=True):
        ids = torch.tensor([[loaded.tokenizer.im_end_id, *loaded.tokenizer.encode(text)]])
        with torch.no_grad():
            shares = loaded.model.logits(loaded.model(ids).features[0]).log_softmax(dim=-1)
        expected = shares[:-1].gather(1, ids[0, 1:, None]).sum().item()
        assert math.isclose(value, expected, rel_tol=1e-5)
    # a continuation of likeliest tokens is said to be one
    begun = loaded.tokenizer.encode("hello")
    with torch.no_grad():
        logits = loaded.model.logits(loaded.model(torch.tensor([begun])).features[0, -1])
    best, worst = int(logits.argmax()), int(logits.argmin())
    ((_, is_best), (_, is_worst)) = model._loglikelihood_tokens(
        [((), begun, [best]), ((), begun, [worst])], disable_tqdm=True
    )
    assert is_best and not is_worst


@pytest.mark.parametrize("lack", ["checkpoint", "package"])
def test_what_the_harness_lacks_is_said_in_one_line(lack: str, tmp_path: Path) -> None:
    hidden = "sys.modules['lm_eval'] = None; " if lack == "package" else ""
    code = f"import runpy, sys; {hidden}runpy.run_module('new_llm.harness', run_name='__main__')"
    asked = ["--model", "new_llm", "--model_args", "pretrained=nowhere", "--tasks", "dialogues",
             "--metadata", json.dumps({"data": str(tmp_path / "none")})]  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    says = {"checkpoint": "new-llm: a run's folder or its checkpoint expected",
            "package": 'pip install "new-llm[evaluation]"'}  # fmt: skip
    assert run.returncode == 2 and says[lack] in run.stderr
    assert "Traceback" not in run.stderr
