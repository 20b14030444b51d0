"""What the phases, the coupling and the recipe are worth: one thing changed at a time."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .config import PeerConfig, RunConfig, from_dict, preset, to_dict
from .console import Console
from .model import num_parameters
from .quality import (
    Corpus,
    build,
    filled,
    matched,
    mixed_loss,
    num_steps,
    opened,
    places_of,
    trained,
)
from .runner import Numbers

LIMITS = (0.0, 0.25, 0.5, 1.0, 2.0)
# no weights of this size ever come near it
_NO_LIMIT = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """The default, or a peer of as many parameters, with some settings changed."""

    table: str
    name: str
    kind: str | None = None
    """Of a peer, whose recurrence is then in place of ours and which has no Phase 1."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changed fields of the model."""
    phase1: dict[str, Any] | None = field(default_factory=dict)
    """Changed fields of Phase 1; None goes without it."""
    phase2: dict[str, Any] = field(default_factory=dict)
    """Changed fields of Phase 2."""
    filled: bool = False
    """Whether the MLPs get as many weights as the coupling leaves idle."""

    def arguments(self, config: RunConfig, steps: int, seed: int, vocab_size: int) -> Numbers:
        """Return what `trained` is given."""
        model = to_dict(replace(config.model, **({} if self.kind else self.model)))
        if self.filled:
            model = filled(model, vocab_size)
        if self.kind is not None:
            with torch.device("meta"):
                wanted = num_parameters(build(model, vocab_size))
            widths = {"embedding_width": config.model.embedding_width,
                      "width": config.model.context_width}  # fmt: skip
            peer = from_dict(PeerConfig, {"kind": self.kind} | widths | self.model)
            model = matched(to_dict(peer), wanted, vocab_size)
        # as in the comparison with peers, and on every CPU the same
        training = {"max_steps": steps, "min_steps": steps, "muon_precision": "float32"}
        first = (
            None if self.phase1 is None or self.kind is not None
            else replace(config.phase1, **self.phase1)
        )  # fmt: skip
        return {
            "model": model,
            "phase1": None if first is None else to_dict(first),
            "phase2": to_dict(replace(config.phase2, **training | self.phase2)),
            "sequence_length": config.data.sequence_length,
            "seed": seed,
        }


def ablations() -> Iterator[Ablation]:
    """Yield all rows of all tables."""
    yield Ablation(table="phases", name="default")
    yield Ablation(table="phases", name="no Phase 1", phase1=None)
    kept = {"contractive": 0.02, "contractive_every": 4}
    yield Ablation(table="phases", name="0.02 of Phase 1 kept in Phase 2", phase2=kept)
    yield Ablation(
        table="phases", name="no Phase 1, 0.02 of it in Phase 2", phase1=None, phase2=kept
    )
    yield Ablation(table="phases", name="Phase 1 by `residual`", phase1={"objective": "residual"})
    # a shared embedding would move under the contexts
    frozen = {"freeze_context": True}
    apart = {"tied_readout": False}
    yield Ablation(table="phases", name="own read-out matrix", model=apart)
    yield Ablation(table="phases", name="frozen after Phase 1", model=apart, phase2=frozen)
    yield Ablation(table="phases", name="frozen at random", model=apart, phase1=None, phase2=frozen)
    one = {"num_blocks": 1}
    yield Ablation(table="phases", name="one block", model=one)
    yield Ablation(table="phases", name="one block, token scope", model=one | {"scope": "token"})
    for limit in (*LIMITS, _NO_LIMIT):
        name = "none" if limit == _NO_LIMIT else f"{limit:g}"
        yield Ablation(table="coupling", name=name, model={"coupling_limit": limit})
    yield Ablation(
        table="coupling", name="0, its idle weights given to the MLPs",
        model={"coupling_limit": 0.0}, filled=True,
    )  # fmt: skip
    # what a certificate leaves of the coupling hangs on how near phi is to its steepest
    for activation in ("silu", "tanh"):
        yield Ablation(table="activation", name=activation, model={"activation": activation})
    # Phase 1 moves the coupling too
    for limit in (*LIMITS[2:], _NO_LIMIT):
        name = "none" if limit == _NO_LIMIT else f"{limit:g}"
        yield Ablation(
            table="coupling without Phase 1", name=name, model={"coupling_limit": limit},
            phase1=None,
        )  # fmt: skip
    # what a usual comparison with an LSTM would have shown, and how much of it is the recurrence
    adamw = {"optimiser": "adamw", "learning_rate": 4e-3}
    yield Ablation(table="recipe", name="default, AdamW", phase2=adamw)
    # as wide as the comparison found best: at full width there is no room for an MLP
    lstm = {"width": 192}
    usual = lstm | {"longest_timescale": None}
    yield Ablation(table="recipe", name="LSTM", kind="lstm", model=lstm)
    yield Ablation(table="recipe", name="LSTM, AdamW", kind="lstm", model=lstm, phase2=adamw)
    yield Ablation(
        table="recipe", name="LSTM, its gates begun as usual, AdamW", kind="lstm", model=usual,
        phase2=adamw,
    )  # fmt: skip
    yield Ablation(table="recipe", name="minGRU", kind="mingru")


@dataclass(frozen=True, kw_only=True)
class Ablations:
    """All rows, on the corpus of the comparison with peers, and where trials are kept."""

    console: Console
    out: Path
    data: Path | None = None
    """Folder with `train.jsonl` and `valid.jsonl`, beside the default chats."""
    tokens: int = 1_000_000
    num_seeds: int = 3
    num_workers: int | None = None
    device: str = "cpu"
    """Where models are trained and scored."""

    def run(self) -> list[Numbers]:
        """Train what is not kept yet; return the rows."""
        config, steps, asked = preset("convex"), num_steps(self.tokens), [*ablations()]
        with opened(self.out, self.data, console=self.console, num_workers=self.num_workers) as (
            corpus,
            runner,
        ):
            found = iter(
                runner.run(
                    "ablations",
                    trained,
                    [one.arguments(config, steps, seed, corpus.vocab_size)
                     for one in asked for seed in range(self.num_seeds)],
                    places={"folder": str(corpus.folder), "device": self.device},
                    unfinished=self.out / "unfinished",
                )
            )  # fmt: skip
            return [
                _row(one, [next(found) for _ in range(self.num_seeds)], corpus) for one in asked
            ]


def _row(one: Ablation, found: list[Numbers], corpus: Corpus) -> Numbers:
    mixed = [mixed_loss(numbers["scores"]) for numbers in found]
    # a peer has none
    judgements = [numbers["doctor"] for numbers in found if numbers["doctor"] is not None]

    def median(name: str) -> float:
        return statistics.median(numbers[name] for numbers in found)

    def measured(name: str) -> float | None:
        """Return the median over seeds of the larger block's; a norm is the mean over contexts."""
        each = [
            [value for key, value in judged["measurements"].items()
             if key.rpartition(": ")[2] == name and value is not None]
            for judged in judgements
        ]  # fmt: skip
        return statistics.median(map(max, each)) if each and all(each) else None

    row: Numbers = {
        "table": one.table,
        "model": one.name,
        "parameters": found[0]["parameters"],
        "tokens": found[0]["tokens_seen"],
        "mix": statistics.fmean(mixed),
        "spread": statistics.stdev(mixed) if len(mixed) > 1 else None,
    }
    for part in corpus.held_out:
        row[part] = statistics.fmean(numbers["scores"][part]["loss"] for numbers in found)
    # a cell in token scope has no verdict in sequence scope
    verdicts = [f"{judged['token']} / {judged['sequence'] or '-'}" for judged in judgements]
    has_phase1 = one.kind is None and one.phase1 is not None
    has_cache = one.phase2.get("freeze_context", False) or one.model.get("scope") == "token"
    return row | {
        "verdicts": ", ".join(dict.fromkeys(verdicts)) or None,
        "sweeps": measured("sweeps"),
        "jacobian norm": measured("jacobian_norm"),
        "context length": measured("effective_context_length"),
        "decay length": measured("decay_length"),
        "Phase 1, s": median("seconds_phase1") if has_phase1 else None,
        "cache, s": median("seconds_cache") if has_cache else None,
        "tokens/s": statistics.median(n["tokens_seen"] / n["seconds"] for n in found),
        "trained on": places_of(found),
    }
