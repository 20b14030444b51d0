"""Batched `residual` against the literal loop: wall time to the literal loop's held-out loss.

    python benchmarks/residual.py --data train.jsonl --cell sequential --json out.json

The literal loop visits every position of the dialogues, three times over, token by token, as the
founding documents' does; the batched form trains on all distinct ids at once. Both start from the
same weights, leave the same ids out, and are judged on those by one measure: the mean squared
change at which the documents' stop rule ends, weights frozen. With `--positions` the literal loop
is cut short and its whole time is scaled from the slice; its loss is then that of the slice. With
`--by-hand` (layerwise) the full loop runs with derivatives by hand, twice as fast, after a slice of
the plain one, from which its whole time is scaled and with which it is compared.
"""

import copy
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from literal import train_literal_by_hand

from new_llm.cell import LayerwiseCell
from new_llm.config import DataConfig, Phase1Config, preset
from new_llm.console import Console
from new_llm.data import TokenStore, held_out_ids, temporary_store
from new_llm.evaluate import token_verdict
from new_llm.model import NewLLM
from new_llm.phase1 import (
    SEED_SOLVER,
    LiteralEpoch,
    measure_convergence,
    train_residual,
    train_residual_literal,
)
from new_llm.tokenizer import ChatTokenizer

# a loss below this is as good as any: the documents' threshold is 0.01
LOWEST_TARGET = 1e-4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the two forms of one objective on one cell."""

    data: str
    """Dialogues."""
    cell: Literal["sequential", "layerwise"] = "sequential"
    """Cell to train."""
    positions: int | None = None
    """Positions of a pass of the literal loop; none is all."""
    by_hand: bool = False
    """Run the full loop with derivatives by hand, the plain one on `positions` only."""
    epochs: int = 3
    """Passes of the literal loop."""
    threads: int = 1
    """Threads of torch, for both."""
    repeats: int = 3
    """Runs of the batched form, of which the median time counts."""
    batched: Phase1Config = Phase1Config(  # noqa: RUF009 - frozen
        objective="residual", epochs=1, threshold=1e-5, max_iterations=20, max_steps=None
    )
    """Settings of the batched form."""
    json: Path | None = None
    """Also write the figures here."""


def held_out_loss(model: NewLLM, ids: torch.Tensor) -> dict[str, float | None]:
    """Return the summary on held-out ids by the documents' stop rule."""
    return measure_convergence(model, ids, SEED_SOLVER).summary()


def compare(options: Options, store: TokenStore, console: Console) -> dict[str, Any]:
    torch.manual_seed(0)
    config = preset(f"seed-{options.cell}")
    # the figures of the founding documents were made without dropout
    vocab_size = 50_259  # GPT-2 and two role tokens
    literal = NewLLM(replace(config.model, dropout=0.0), vocab_size, SEED_SOLVER)
    start = copy.deepcopy(literal)
    held_out = held_out_ids(vocab_size, config.model.context_width)
    seen = np.flatnonzero(store.token_counts(vocab_size))
    train_ids = torch.from_numpy(np.setdiff1d(seen, held_out))
    held_ids = torch.from_numpy(np.intersect1d(seen, held_out))
    positions = np.asarray(store.tokens)
    positions = positions[~np.isin(positions, held_out)]
    total = len(positions)
    chosen = positions[: options.positions]

    batched_seconds, batched = [], start
    for _ in range(options.repeats):
        batched = copy.deepcopy(start)
        begun = time.perf_counter()
        x = batched.search(train_ids).inputs[0]
        train_residual(
            batched.cells()[0], x, options.batched, seed=0, log=lambda row: None,
            advance=lambda amount=1, note="": None,
        )  # fmt: skip
        batched_seconds.append(time.perf_counter() - begun)
    with console.track("token by token", options.epochs * len(chosen)) as advance:
        begun = time.perf_counter()
        epochs = train_residual_literal(
            literal.cells()[0],
            lambda ids: literal.search(ids).inputs[0],
            [chosen],
            replace(config.phase1, epochs=options.epochs),
            advance=advance,
        )
        literal_seconds = time.perf_counter() - begun
    scaled = literal_seconds * total / len(chosen)
    slice_epochs, by_hand_seconds = epochs, None
    if options.by_hand:
        literal, by_hand_seconds, epochs = full_by_hand(start, positions, options, console)
        twin = full_by_hand(start, chosen, options, console)[2]
        difference = abs(twin[-1].mean_loss / slice_epochs[-1].mean_loss - 1.0)
        if difference > 0.05:
            raise SystemExit(f"by hand and by autograd differ by {difference:.1%} in loss")
    seconds = statistics.median(batched_seconds)
    found = {
        "start": held_out_loss(start, held_ids),
        "literal": held_out_loss(literal, held_ids),
        "batched": held_out_loss(batched, held_ids),
    }
    target = max(found["literal"]["mean_change"] or 0.0, LOWEST_TARGET)
    return {
        "cell": options.cell,
        "threads": options.threads,
        "torch": torch.__version__,
        "positions": total,
        "distinct_ids": len(train_ids),
        "held_out_ids": len(held_ids),
        "literal_positions": len(chosen),
        "literal_epochs": [
            [epoch.mean_loss, epoch.mean_iterations, epoch.convergence_rate] for epoch in epochs
        ],
        "literal_seconds": literal_seconds,
        "by_hand_seconds": by_hand_seconds,
        "by_hand_ratio": None if by_hand_seconds is None else by_hand_seconds / seconds,
        "literal_seconds_all": scaled,
        "batched_seconds": batched_seconds,
        "ratio": scaled / seconds,
        "target": target,
        "reached": (found["batched"]["mean_change"] or 0.0) <= target,
        "held_out": found,
        "verdicts": {"literal": token_verdict(literal).verdicts,
                     "batched": token_verdict(batched).verdicts},
    }  # fmt: skip


def full_by_hand(
    start: NewLLM, positions: np.ndarray, options: Options, console: Console
) -> tuple[NewLLM, float, list[LiteralEpoch]]:
    """Return the model, the seconds and the epochs of the loop with derivatives by hand."""
    model = copy.deepcopy(start)
    cell = model.cells()[0]
    if not isinstance(cell, LayerwiseCell):
        raise SystemExit("--by-hand is written for the layerwise cell")
    config = replace(preset("seed-layerwise").phase1, epochs=options.epochs)
    ids = torch.from_numpy(positions.astype(np.int64))
    with console.track("by hand", options.epochs * len(ids)) as advance:
        begun = time.perf_counter()
        epochs = train_literal_by_hand(
            cell, lambda part: model.search(part).inputs[0], ids, config, advance
        )
        return model, time.perf_counter() - begun, epochs


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    console = Console()
    tokenizer = ChatTokenizer.from_name("gpt2", iter(()), DataConfig().vocab_size)
    with temporary_store(options.data, "train", tokenizer) as store:
        result = compare(options, store, console)
    for name, value in result.items():
        console.show(f"{name}: {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
