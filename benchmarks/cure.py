"""Phase 1 `contractive` over cells, widths, layers and random seeds: which setting matters.

    python benchmarks/cure.py --out runs/cure --json cure.json

Each training is judged by the doctor on held-out ids, in processes of one thread; those that are
finished are kept in `--out`. With `--ablate` the settings that the preset decides are taken back
one at a time, at 256 and two and four layers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from new_llm import trials
from new_llm.console import Console
from new_llm.laboratory import Laboratory

COLUMNS = ("settled_share", "one_end_share", "effective_rank", "cosine", "factor_p99", "iterations")
# cell, layers; with one layer the two seed cells are the same
SHAPES = (
    ("sequential", 1), ("sequential", 2), ("sequential", 3), ("sequential", 4),
    ("layerwise", 2), ("layerwise", 3), ("layerwise", 4), ("convex", 1),
)  # fmt: skip
# random seeds of a width: a wide cell takes minutes
SEEDS = {64: 3, 128: 3, 256: 3, 512: 1}
ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "preset": ({}, {}),
    "N(0, 0.02)": ({"initialisation": "normal"}, {}),
    "PyTorch's weights": ({"initialisation": "torch"}, {}),
    "constant learning rate": ({}, {"final_learning_rate": 1.0}),
    "8 iterations visited": ({}, {"visited_iterations": 8}),
    "learning rate 1e-3": ({}, {"learning_rate": 1e-3}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and judge many cells."""

    out: Path | None = None
    """Folder that keeps what is finished."""
    json: Path | None = None
    """File for the rows."""
    ablate: bool = False
    """Take back one setting at a time instead."""
    workers: int | None = None
    """Processes of one thread; none is one a core."""
    widths: tuple[int, ...] = tuple(SEEDS)
    """Widths of context, embedding and hidden layers."""
    seeds: int | None = None
    """Random seeds of each shape; none is 3, and 1 at a width of 512."""


def trainings(options: Options) -> list[tuple[str, dict[str, Any]]]:
    """Return a label and the arguments of each training."""
    if options.ablate:
        return [
            (name, {"cell": cell, "width": 256, "layers": layers, "seed": 0,
                    "model": model, "phase1": phase1})
            for cell in ("sequential", "layerwise")
            for layers in (2, 4)
            for name, (model, phase1) in ABLATIONS.items()
        ]  # fmt: skip
    return [
        ("preset", {"cell": cell, "width": width, "layers": layers, "seed": seed,
                    "model": {}, "phase1": {}})
        for width in options.widths
        for cell, layers in SHAPES
        for seed in range(options.seeds or SEEDS.get(width, 1))
    ]  # fmt: skip


def main(options: Options) -> None:
    """Run the trainings and print their table."""
    console = Console()
    asked = trainings(options)
    with Laboratory(console=console, out=options.out, num_workers=options.workers) as laboratory:
        found = laboratory.run(
            "cure",
            trials.cured,
            [arguments for _, arguments in asked],
            cost=lambda given: given["width"] ** 2 / 4096 * (1 + given["layers"]),
        )
    rows = [
        {"setting": name, **{k: given[k] for k in ("cell", "width", "layers", "seed")}, **numbers}
        for (name, given), numbers in zip(asked, found, strict=True)
    ]
    shown = ("setting", "cell", "width", "layers", "seed", "verdict", *COLUMNS, "seconds")
    console.table("cure", shown, [[row.get(name) for name in shown] for row in rows])
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
