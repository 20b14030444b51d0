"""Experiments by name: run once, kept, shown as tables."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import fingerprint
from .console import Console
from .dialogues import ReadReport, read_dialogues
from .errors import ConfigError
from .experiments import EXPERIMENTS, experiment_key
from .files import read_json, write_json


def run_lab(
    name: str, *, data: str | None, out: Path | None, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Run one experiment or all, print their tables and return their rows.

    Args:
        name: of the experiment, or `all`.
        data: dialogues, for experiments on real text; the ones here use listed ids only.
        out: folder that keeps finished experiments; they are not run again.
        console: for progress and tables.

    Raises:
        ConfigError: there is no such experiment.
        DataError: the dialogues cannot be read.
    """
    if name != "all" and name not in EXPERIMENTS:
        raise ConfigError(f"an experiment is one of {', '.join(EXPERIMENTS)} or all; got {name!r}")
    if data is not None:
        # read before hours of work, so that a wrong name is known at once
        rows = read_dialogues(
            data, split="test_sft", on_bad_row="skip", max_dialogues=1, report=ReadReport()
        )
        next(rows)
    chosen = list(EXPERIMENTS) if name == "all" else [name]
    results: dict[str, list[dict[str, Any]]] = {}
    key = fingerprint([experiment_key(), data])
    for experiment in chosen:
        kept = None if out is None else out / f"{experiment}.json"
        if kept is not None and kept.exists():
            record = read_json(kept, "the result of an experiment")
            if record["key"] == key:
                results[experiment] = record["rows"]
        if experiment not in results:
            results[experiment] = [asdict(row) for row in EXPERIMENTS[experiment](console)]
            if kept is not None:
                write_json(kept, {"key": key, "rows": results[experiment]})
        _show(experiment, results[experiment], console)
    return results


def _show(name: str, rows: list[dict[str, Any]], console: Console) -> None:
    columns = ["quantity", "documents", "ours", "spread", "agrees", "verdict", "why"]
    console.table(name, columns, [list(row.values()) for row in rows])
