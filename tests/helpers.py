"""Small models and dialogues for tests; real dialogues come from the default package."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from new_llm.checkpoint import save_checkpoint
from new_llm.config import ModelConfig, RunConfig, preset
from new_llm.data import TokenStore
from new_llm.dialogues import Messages, ReadReport, read_dialogues
from new_llm.files import write_sealed
from new_llm.model import NewLLM
from new_llm.tokenizer import ChatTokenizer

QUICK = (
    "--data.vocab-size 500 --data.sequence-length 32 --data.valid-fraction 0.2 "
    "--model.context-width 32 --model.embedding-width 32 --model.hidden-width 32 "
    "--phase2.max-steps 8 --phase2.batch-size 4 --phase2.evaluations 1 --quiet"
).split()
"""Options of a run of seconds."""


def real_dialogues(count: int) -> list[Messages]:
    """Return the first real chats of the default package."""
    rows = read_dialogues(
        "chitchat-dataset", split="", on_bad_row="error", max_dialogues=count, report=ReadReport()
    )
    return list(rows)


def write_dialogues(path: Path, count: int) -> Path:
    """Write real chats as JSONL."""
    rows = [json.dumps({"messages": messages}) + "\n" for messages in real_dialogues(count)]
    path.write_text("".join(rows))
    return path


def reseal(path: Path, **changes: Any) -> None:
    """Change a record as somebody does who knows how its checksum is made."""
    record = json.loads(path.read_text()) | changes
    version = record.pop("format_version")
    write_sealed(path, record, version=version)


def small_model(cell: str = "convex", **changes: Any) -> ModelConfig:
    """Return the shape of a model of one or two small blocks."""
    widths = {"context_width": 16, "embedding_width": 16, "hidden_width": 24, "mlp_width": 16}
    layers = {} if cell == "convex" else {"num_layers": 2, "num_blocks": 1}
    return ModelConfig(**{"cell": cell, **widths, **layers, **changes})  # pyright: ignore


def saved(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a small checkpoint with weights that make its answers differ."""
    contents = (message["content"] for messages in real_dialogues(8) for message in messages)
    tokenizer = ChatTokenizer.train(contents, 400)
    torch.manual_seed(seed)
    model = NewLLM(small_model(**changes), tokenizer.vocab_size)
    with torch.no_grad():
        model.embedding.weight.normal_(std=0.5)
    save_checkpoint(folder, model.eval(), tokenizer)
    return folder


def small_run(path: Path, name: str = "convex", **phase2: Any) -> RunConfig:
    """Return a preset cut down to seconds, on the dialogues of a file."""
    config = preset(name)
    narrow = {"context_width": 32, "embedding_width": 32, "hidden_width": 32}
    return replace(
        config,
        model=replace(config.model, **narrow),
        data=replace(
            config.data, source=str(path), vocab_size=600, sequence_length=32, valid_fraction=0.2
        ),
        phase1=replace(config.phase1, max_steps=60, literal_dialogues=0, epochs=1),
        phase2=replace(
            config.phase2, **{"max_steps": 12, "batch_size": 4, "evaluations": 2, **phase2}
        ),
    )


def register_cells(folder: Path, distribution: str, names: dict[str, str]) -> None:
    """Write what an installer writes of a package that registers cells of its module `mycell`."""
    info = folder / f"{distribution}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1\n")
    lines = [f"{name} = mycell:{value}\n" for name, value in names.items()]
    (info / "entry_points.txt").write_text("[new_llm.cells]\n" + "".join(lines))


def store_of(dialogues: list[list[int]]) -> TokenStore:
    """Return a store of given token ids; every other token is the assistant's."""
    flat = np.array([token for ids in dialogues for token in ids], dtype=np.int32)
    lengths = [len(ids) for ids in dialogues]
    return TokenStore(
        tokens=flat,
        assistant=np.arange(len(flat)) % 2 == 1,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_content_bytes=np.array(lengths, dtype=np.int64) * 3,
        fingerprint=str(hash(flat.tobytes())),
    )


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Run a command that serves until Ctrl-C, as a user does; yield the address that it says."""
    command = [sys.executable, "-m", "new_llm", *arguments]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        line = run.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + run.stderr.read()
        try:
            yield found[0]
            run.send_signal(signal.SIGINT)
            assert run.wait(20) == 130
            assert "Traceback" not in run.stderr.read()
        finally:
            run.kill()
