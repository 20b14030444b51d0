"""Experiments by name: what `lab` does."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .claims import NEEDED, decide
from .console import Console, format_cell
from .errors import ConfigError
from .experiments import EXPERIMENTS, Row
from .files import held
from .laboratory import Laboratory

CLAIMS = "claims"


def run_lab(
    name: str,
    *,
    data: str | None,
    out: Path | None,
    console: Console,
    num_workers: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run one experiment or all, print their tables and return their rows.

    Args:
        name: of the experiment, `claims`, or `all`.
        data: dialogues, for experiments on real text; None is the default package.
        out: folder that keeps finished trials; they are not run again.
        console: for progress and tables.
        num_workers: processes; None takes one a core.

    Raises:
        ConfigError: there is no such experiment.
        DataError: the dialogues cannot be read.
    """
    if name not in (*EXPERIMENTS, CLAIMS, "all"):
        known = ", ".join([*EXPERIMENTS, CLAIMS])
        raise ConfigError(f"an experiment is one of {known} or all; got {name!r}")
    shown = [*EXPERIMENTS, CLAIMS] if name == "all" else [name]
    needed = NEEDED if CLAIMS in shown else ()
    results: dict[str, list[Row]] = {}
    with (
        held(out),
        Laboratory(data=data, out=out, console=console, num_workers=num_workers) as laboratory,
    ):
        if data is not None:
            # before hours of work, so that a wrong name is known at once
            console.say(f"dialogues: {laboratory.text.source}")
        for experiment, function in EXPERIMENTS.items():
            if experiment in shown or experiment in needed:
                results[experiment] = function(laboratory)
                if experiment in shown:
                    _show(experiment, results[experiment], console)
    if CLAIMS in shown:
        results[CLAIMS] = decide(results)
        _show(CLAIMS, results[CLAIMS], console)
    return {experiment: [asdict(row) for row in results[experiment]] for experiment in shown}


def _show(name: str, rows: list[Row], console: Console) -> None:
    columns = ["quantity", "documents", "ours", "agrees", "verdict"]
    console.table(name, columns, [_cells(row) for row in rows])


def _cells(row: Row) -> list[object]:
    ours = format_cell(row.ours_mean)
    if row.ours_std is not None:
        ours += f" ± {format_cell(row.ours_std)}"
    # beneath, since a sentence in a column of its own leaves no room for any
    quantity = f"{row.quantity}\n  {row.why}" if row.why else row.quantity
    return [quantity, row.seed_value, ours, row.agrees, row.verdict]
