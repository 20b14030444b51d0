"""The laboratory's units of work: train or search once, return plain numbers.

Each trial is a function of JSON values only, draws all that is random from its own seed, and can
therefore run in any process and be kept on disk. The models are the seeds' own, dropout 0 where
nothing else is said.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import load_weights, save_weights
from .config import RunConfig, SolverConfig, preset
from .console import Console
from .data import held_out_ids
from .doctor import Diagnosis
from .evaluate import token_verdict
from .measurements import effective_rank, mean_cosine
from .model import NewLLM
from .phase1 import SEED_SOLVER, train, train_repetition, train_residual_literal
from .runner import Numbers
from .scan import scan
from .specimens import examine

# GPT-2's vocabulary and two role tokens: what the documents' token ids speak of
SEED_VOCAB_SIZE = 50_259
# held-out ids of a trial's verdict: enough to name a collapse, and quick
_VERDICT_IDS = 256

Rule = dict[str, Any]
"""A stop rule: fields of `SolverConfig`."""

SEED_RULE: Rule = asdict(SEED_SOLVER)


def seed_config(
    cell: str, model: Numbers | None = None, phase1: Numbers | None = None
) -> RunConfig:
    """Return a seed preset with dropout 0, fields of its model and of Phase 1 changed."""
    config = preset(f"seed-{cell}")
    return replace(
        config,
        model=replace(config.model, **{"dropout": 0.0, **(model or {})}),
        phase1=replace(config.phase1, **(phase1 or {})),
    )


def random_model(config: RunConfig, seed: int) -> NewLLM:
    """Return a model with the random weights of a seed, in evaluation mode."""
    torch.manual_seed(seed)
    return NewLLM(config.model, SEED_VOCAB_SIZE, SEED_SOLVER).eval()


def literal(
    *,
    cell: str,
    dialogues: Sequence[Sequence[int]],
    seed: int,
    model: Numbers | None = None,
    phase1: Numbers | None = None,
    rules: Sequence[Rule] = (SEED_RULE,),
    held_out: Sequence[Sequence[int]] = (),
    judged: bool = False,
) -> Numbers:
    """Train by the literal loop, then search with frozen weights by each stop rule.

    Args:
        cell: `sequential` or `layerwise`.
        dialogues: token ids that are trained on, position by position.
        seed: of the random weights.
        model: changed fields of the model's config.
        phase1: changed fields of Phase 1's config.
        rules: stop rules of the searches from zero.
        held_out: dialogues that are searched only.
        judged: whether the doctor is asked, on ids that were not trained on.
    """
    config = seed_config(cell, model, phase1)
    trained = random_model(config, seed)
    begun = time.perf_counter()
    epochs = train_residual_literal(
        trained.cells()[0],
        lambda ids: trained.search(ids).inputs[0],
        [np.array(ids) for ids in dialogues],
        config.phase1,
    )
    seconds = time.perf_counter() - begun
    trained.eval()
    return {
        "epochs": [asdict(epoch) for epoch in epochs],
        "seconds": seconds,
        "searches": [_searched(trained, dialogues, rule) for rule in rules],
        "held_out": _searched(trained, held_out, rules[0]) if held_out else None,
        "doctor": _judged(trained, dialogues) if judged else None,
    }


def frozen(
    *,
    cell: str,
    groups: Sequence[Sequence[int]],
    seed: int,
    rules: Sequence[Rule],
    model: Numbers | None = None,
    judged: bool = False,
) -> Numbers:
    """Search with random weights: each stop rule on each group of token ids.

    One trajectory of each token serves all rules. `turn` is the cosine of the last two moves: 1 is
    a crawl along one line, -1 an oscillation.
    """
    searched = random_model(seed_config(cell, model), seed)
    ids = torch.tensor(sorted({token for group in groups for token in group}))
    steps = max(rule["max_iterations"] for rule in rules)
    path, moves, turns = trajectory(searched, ids, steps)
    width = path.shape[-1]
    found = []
    for rule in rules:
        change = {
            "l2": moves,
            "mse": moves.square() / width,
            "residual": moves / path[1:].norm(dim=-1).clamp(min=1e-30),
        }[rule["metric"]][: rule["max_iterations"]]
        met = change < rule["tolerance"]
        met[: rule["warmup"]] = False
        converged = met.any(dim=0)
        taken = torch.where(converged, met.int().argmax(dim=0) + 1, rule["max_iterations"])
        found.append([_of_group(ids, group, converged, taken) for group in groups])
    return {
        "searches": found,
        "norm": path[-1].norm(dim=-1).mean().item(),
        "last_move": moves[-1].mean().item(),
        "turn": turns[-1].mean().item(),
        "largest_value": path[-1].abs().max().item(),
        "doctor": _judged(searched, ()) if judged else None,
    }


@torch.no_grad()
def trajectory(model: NewLLM, ids: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return contexts `[steps + 1, N, C]` from zero, lengths of moves and cosines of turns."""
    cell = model.cells()[0]
    projected, weights = cell.project(model.search(ids).inputs[0]), cell.weights()
    path = torch.zeros(steps + 1, len(ids), cell.context_width)
    for step in range(steps):
        path[step + 1] = cell.search_map(path[step], projected, weights)
    moves = path.diff(dim=0)
    turns = F.cosine_similarity(moves[:-1], moves[1:], dim=-1)
    return path, moves.norm(dim=-1), turns


def _of_group(ids: Tensor, group: Sequence[int], converged: Tensor, taken: Tensor) -> Numbers:
    place = {token: row for row, token in enumerate(ids.tolist())}
    rows = torch.tensor([place[token] for token in group])
    return {
        "convergence_rate": converged[rows].double().mean().item(),
        "mean_iterations": taken[rows].double().mean().item(),
    }


def clipped(*, cell: str, ids: Sequence[int], seed: int, clip: float, rule: Rule) -> Numbers:
    """Search the same random weights with contexts clamped and free."""
    ends = [
        random_model(seed_config(cell, {"clip": limit}), seed)
        .search(torch.tensor(ids), SolverConfig(**rule))
        .blocks[0]
        for limit in (None, clip)
    ]
    return {
        "rate_difference": ends[0].convergence_rate - ends[1].convergence_rate,
        "largest_difference": (ends[0].context - ends[1].context).abs().max().item(),
    }


def repetition(
    *,
    cell: str,
    seed: int,
    cycles: int,
    phrases: int,
    phase1: Numbers,
    groups: Sequence[Sequence[int]] = (),
    rules: Sequence[Rule] = (),
    judged: bool = False,
) -> Numbers:
    """Train by `repetition`; read held-out phrases again and again; search single tokens.

    The phrases are of ids that were not trained on. `change` is the mean squared change of the
    context between a cycle and the one before, for each of `cycles`; `cosine` and `rank` are of the
    last contexts of different phrases. Before the single tokens are searched the weights are
    written to a checkpoint and read back, as the documents ask.
    """
    config = seed_config(cell, phase1={"objective": "repetition", **phase1})
    model = random_model(config, seed)
    held_out = held_out_ids(SEED_VOCAB_SIZE, model.config.context_width)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.from_numpy(held_out)[
        torch.randint(len(held_out), (phrases, config.phase1.cycle_length), generator=generator)
    ]
    before = _repeated(model, chosen, cycles)
    ids = torch.ones(SEED_VOCAB_SIZE, dtype=torch.bool)
    ids[torch.from_numpy(held_out)] = False
    begun = time.perf_counter()
    losses: list[float] = []
    train_repetition(
        model.cells()[0],
        model.search(ids.nonzero()[:, 0], SolverConfig(max_iterations=1)).inputs[0],
        config.phase1,
        seed=seed,
        log=lambda row: losses.append(row["loss"]),
        advance=lambda amount=1, note="": None,
    )
    seconds = time.perf_counter() - begun
    model = _through_checkpoint(model, config)
    return {
        "before": before,
        "after": _repeated(model, chosen, cycles),
        "loss": losses[-1],
        "seconds": seconds,
        "searches": [[_searched(model, [group], rule) for group in groups] for rule in rules],
        "doctor": _judged(model, ()) if judged else None,
    }


def residual_checkpoint(
    *,
    cell: str,
    ids: Sequence[int],
    seed: int,
    groups: Sequence[Sequence[int]],
    rules: Sequence[Rule],
    judged: bool = False,
) -> Numbers:
    """Train by `residual`, write and read a checkpoint, search single tokens by each rule."""
    config = seed_config(cell)
    model = random_model(config, seed)
    train_residual_literal(
        model.cells()[0],
        lambda ids: model.search(ids).inputs[0],
        [np.array(ids)],
        config.phase1,
    )
    model = _through_checkpoint(model, config)
    return {
        "searches": [[_searched(model, [group], rule) for group in groups] for rule in rules],
        "doctor": _judged(model, [ids]) if judged else None,
    }


def cured(
    *, cell: str, width: int, layers: int, seed: int, model: Numbers, phase1: Numbers
) -> Numbers:
    """Train Phase 1 as our own presets do, in token scope; ask the doctor about held-out ids."""
    own = preset("convex" if cell == "convex" else "layerwise")
    shape = {"cell": cell, "scope": "token", "num_blocks": 1, "num_layers": layers, "mlp_width": 0}
    widths = dict.fromkeys(("context_width", "embedding_width", "hidden_width"), width)
    config = replace(own.phase1, **phase1)
    torch.manual_seed(seed)
    trained = NewLLM(replace(own.model, **{**shape, **widths, **model}), own.data.vocab_size)
    held_out = held_out_ids(trained.vocab_size, width)
    ids = torch.from_numpy(np.setdiff1d(np.arange(trained.vocab_size), held_out))
    begun = time.perf_counter()
    train(trained, ids, [], config, seed=seed, console=Console(quiet=True), log=lambda row: None)
    seconds = time.perf_counter() - begun
    diagnosis = token_verdict(trained)
    return {
        "verdict": diagnosis.verdict,
        "seconds": seconds,
        **{name: row["value"] for name, row in diagnosis.to_dict()["measurements"].items()},
    }


def specimen(*, kind: str, seed: int) -> Numbers:
    """Ask the doctor about a model whose verdict is known."""
    return {"verdict": examine(kind, seed)}


def _through_checkpoint(model: NewLLM, config: RunConfig) -> NewLLM:
    """Return a model of other random weights that were overwritten by a checkpoint's."""
    with tempfile.TemporaryDirectory(prefix="new-llm-") as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(path, model)
        loaded = NewLLM(config.model, SEED_VOCAB_SIZE, SEED_SOLVER)
        load_weights(path, loaded)
    return loaded.eval()


@torch.no_grad()
def _repeated(model: NewLLM, phrases: Tensor, cycles: int) -> Numbers:
    """Carry the context through each phrase `[N, cycle]`, repeated."""
    cell, length = model.cells()[0], phrases.shape[1]
    distinct, place = phrases.unique(return_inverse=True)
    x = model.search(distinct, SolverConfig(max_iterations=1)).inputs[0][place]
    start = x.new_zeros(len(phrases), cell.context_width)
    contexts = scan(cell, x.repeat(1, cycles, 1), start)
    change = (contexts[:, length:] - contexts[:, :-length]).square().mean(dim=-1)
    by_cycle = change.view(len(phrases), cycles - 1, length)
    last = contexts[:, -1]
    units = F.normalize(last.double(), dim=-1)
    cosines = (units @ units.T)[~torch.eye(len(units), dtype=torch.bool)]
    return {
        "change": by_cycle.mean(dim=(0, 2)).tolist(),
        "rate": (by_cycle[:, -1] < SEED_SOLVER.tolerance).double().mean().item(),
        "norm": last.norm(dim=-1).mean().item(),
        "cosine": cosines.mean().item(),
        "cosine_spread": cosines.std().item(),
        "orthogonal_spread": 1.0 / math.sqrt(last.shape[-1]),
        "rank": effective_rank(last),
    }


def _searched(model: NewLLM, dialogues: Sequence[Sequence[int]], rule: Rule) -> Numbers:
    """Search the tokens of dialogues from zero; every position counts once."""
    positions = torch.tensor([token for ids in dialogues for token in ids])
    distinct, counts = positions.unique(return_counts=True)
    found = model.search(distinct, SolverConfig(**rule)).blocks[0]
    share = counts.double() / counts.sum()
    contexts = found.context
    several = len(distinct) > 1
    converged = (share * found.converged).sum().item()
    iterations = share * found.num_iterations
    return {
        # a sum of shares may miss 1 by rounding
        "convergence_rate": 1.0 if found.converged.all() else converged,
        "mean_iterations": iterations.sum().item(),
        "mean_change": (share * found.change).sum().item(),
        "norm": contexts.norm(dim=-1).mean().item(),
        "cosine": mean_cosine(contexts) if several else 1.0,
        "rank": effective_rank(contexts) if several else 1.0,
    }


def _judged(model: NewLLM, trained: Sequence[Sequence[int]]) -> Numbers:
    """Return the doctor's verdict and numbers on ids that were not trained on."""
    seen = [token for ids in trained for token in ids]
    ids = held_out_ids(SEED_VOCAB_SIZE, model.config.context_width)
    held_out = torch.from_numpy(ids[~np.isin(ids, seen)])
    every = max(1, len(held_out) // _VERDICT_IDS)
    diagnosis: Diagnosis = token_verdict(model, held_out[::every][:_VERDICT_IDS])
    return {
        "verdict": diagnosis.verdict,
        **{name: row["value"] for name, row in diagnosis.to_dict()["measurements"].items()},
    }
