"""Run records to one HTML page that needs nothing but itself. Never touches a model."""

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from .config import flat
from .errors import CheckpointError
from .files import understood, write_text
from .plots import COLOURS, plots
from .records import RunRecord, read_record

_BLANK = "\N{EN DASH}"

_WORDS = {
    "healthy": "Every context settles, at a place of its own, and reads itself on the way.",
    "non_finite": "The contexts hold NaN or infinity.",
    "zero_collapse": "The contexts are all but zero: the seeds' measure is met by saying nothing.",
    "identity_map": "The update returns what it is given; it settles because it does nothing.",
    "global_attractor": "All tokens settle at nearly the same point, which says nothing of them.",
    "expanding": "Small differences of contexts grow.",
    "multi_stable": "Where a context settles depends on where it started.",
    "not_converged": "The contexts still move when the iteration ends.",
    "low_rank": "The contexts use few of their directions.",
    "decoupled": "The context hardly reads itself: a linear recurrence in disguise.",
    "amnesic": "The prediction uses one token only: a bigram model.",
}
# there are no fixed points to speak of, rather than weak ones
_SEVERE = {
    "non_finite",
    "zero_collapse",
    "identity_map",
    "global_attractor",
    "expanding",
    "multi_stable",
}

Cell = tuple[str, str]
"""Text of a table's cell and its CSS class."""


def write_report(
    folders: Sequence[Path], out: Path, *, result: dict[str, Any] | None = None
) -> None:
    """Write one page of one or several runs, side by side.

    Args:
        folders: of finished runs.
        out: the page.
        result: of the only folder, where its `result.json` is not written yet.

    Raises:
        CheckpointError: a folder holds no finished run.
    """
    if not folders:
        raise CheckpointError("a finished run's folder expected, got none; name at least one")
    if result is not None and len(folders) != 1:
        raise ValueError(f"a result belongs to one folder, got {len(folders)}; leave it out")
    names = _names(folders)
    runs = [read_record(*pair, result) for pair in zip(folders, names, strict=True)]
    with understood(Path(", ".join(map(str, folders))), "records of finished runs"):
        page = _page(names, runs)
    write_text(out, page)


def _page(names: list[str], runs: list[RunRecord]) -> str:
    import jinja2

    source = resources.files("new_llm").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source).render(
        names=names,
        runs=[_describe(run) for run in runs],
        numbers=_side_by_side([_key_figures(run) for run in runs]),
        seconds=_side_by_side([_seconds(run) for run in runs]),
        plots=plots(runs),
        convergence=_convergence(runs),
        measurements=list(_measurements(runs)),
        samples=_samples(runs),
        differences=_differences(runs),
        origins=_side_by_side([_origin(run) for run in runs]),
        colours=COLOURS,
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many parts as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            return names
    raise AssertionError("whole paths differ where paths do")


def _describe(run: RunRecord) -> dict[str, Any]:
    """Return what a run is and its verdicts in words, the final model's first."""
    model = run.record["config"]["model"]
    blocks = "1 block" if model["num_blocks"] == 1 else f"{model['num_blocks']} blocks"
    kind = [f"{model['cell']} cell", f"{model['scope']} scope", blocks]
    verdicts = [
        {
            "where": f"{when}, {scope} scope",
            "level": _level(diagnosis["verdicts"]),
            "names": diagnosis["verdicts"],
            "words": [_WORDS.get(name, "") for name in diagnosis["verdicts"]],
            "advice": [] if diagnosis["verdict"] == "healthy" else diagnosis["advice"],
        }
        for when, scope, diagnosis in _diagnoses(run)
    ]
    final = [name for when, _, one in _diagnoses(run) if when != _FIRST for name in one["verdicts"]]
    ailing = list(dict.fromkeys(name for name in final if name != "healthy"))
    return {
        "name": run.name,
        # the preset last: a run is often named after it, and stands before this
        "kind": ", ".join([*kind, f"preset {run.record['config']['preset']}"]),
        "level": _level(final),
        "headline": f"Not healthy: {', '.join(ailing)}" if ailing else "Healthy",
        "verdicts": verdicts,
        "warnings": [row["text"] for row in run.rows("warning")],
        "config": json.dumps(run.record["config"], indent=2, ensure_ascii=False),
    }


_FIRST = "After Phase 1"


def _diagnoses(run: RunRecord) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield when, scope and diagnosis, where there is one."""
    for when, key in (("Final model", "verdict_final"), (_FIRST, "verdict_phase1")):
        for scope, diagnosis in (run.result.get(key) or {}).items():
            if diagnosis is not None:
                yield when, scope, diagnosis


def _level(verdicts: Sequence[str]) -> str:
    if _SEVERE.intersection(verdicts):
        return "bad"
    return "good" if set(verdicts) <= {"healthy"} else "weak"


def _key_figures(run: RunRecord) -> dict[str, Cell]:
    evaluation, bigram = run.result["evaluation"], run.result["bigram_loss"]
    difference = evaluation["loss"] - bigram
    assistant = evaluation["loss_assistant"]
    cells = {
        "validation loss, nats a token": (f"{evaluation['loss']:.3f}", ""),
        "loss of a Kneser-Ney bigram": (f"{bigram:.3f}", ""),
        "difference to the bigram": (f"{difference:+.3f}", "yes" if difference < 0 else "no"),
        "perplexity": (f"{evaluation['perplexity']:,.1f}", ""),
        "bits per byte": (f"{evaluation['bits_per_byte']:.3f}", ""),
        "accuracy": (f"{evaluation['accuracy']:.1%}", ""),
        "tokens seen": (f"{run.result['tokens_seen']:,}", ""),
    }
    if assistant is not None:
        cells["loss on assistant tokens"] = (f"{assistant:.3f}", "")
    return cells


def _seconds(run: RunRecord) -> dict[str, Cell]:
    seconds = run.result["seconds"]
    rows = {**seconds, "in all": sum(seconds.values())}
    return {name: (f"{value:,.1f}", "") for name, value in rows.items()}


def _origin(run: RunRecord) -> dict[str, Cell]:
    """Return fingerprints and versions: what another run must share to be the same."""
    prepared = run.stages["prepare"]
    prints = {
        "config": run.result["fingerprint"],
        "training tokens": prepared.get("train_fingerprint"),
        "held-out tokens": prepared.get("valid_fingerprint"),
        "tokenizer": prepared.get("tokenizer_fingerprint"),
        "weights after Phase 1": run.stages["phase1"].get("weights"),
        "weights, final": run.stages["phase2"].get("weights"),
    }
    rows = {name: (value, "code") for name, value in prints.items() if value is not None}
    return rows | {name: (value, "") for name, value in run.record["versions"].items()}


def _side_by_side(columns: Sequence[dict[str, Cell]]) -> list[tuple[str, list[Cell]]]:
    """Return the rows of all runs, each with one cell a run."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, (_BLANK, "")) for column in columns]) for name in names]


def _convergence(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the tables by metric and by dialogue; rows of the same thing stand together."""
    metrics: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    dialogues: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        found = run.stages["phase1"]
        for name, row in found.get("convergence", {}).items():
            metrics.setdefault(name, []).append((run.name, row))
        for number, row in enumerate(found.get("dialogues", []), start=1):
            dialogues.setdefault(f"dialogue {number}", []).append((run.name, row))
    tables = []
    for title, named in (
        ("All tokens, by metric", metrics),
        ("Held-out dialogues, mse < 0.01", dialogues),
    ):
        rows = [
            [
                label,
                name,
                f"{row['convergence_rate']:.1%}",
                *(
                    _number(row[key])
                    for key in ("mean_iterations", "mean_iterations_converged", "mean_change")
                ),
            ]
            for label, found in named.items()
            for name, row in found
        ]
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def _measurements(runs: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """Yield a table a verdict: each measurement, what is wanted, and every run's value."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for when, scope, diagnosis in _diagnoses(run):
            place = found.setdefault(f"{when}, {scope} scope", {})
            place[run.name] = diagnosis["measurements"]
    for title, by_run in found.items():
        rows = []
        for name in dict.fromkeys(name for rows in by_run.values() for name in rows):
            measured = [by_run.get(run.name, {}).get(name) for run in runs]
            wanted = dict.fromkeys(one["threshold"] for one in measured if one is not None)
            shown = " or ".join(text for text in wanted if text is not None)
            rows.append((name, shown, [_judged(one) for one in measured]))
        yield {"title": title, "rows": rows, "open": not title.startswith(_FIRST)}


def _judged(measurement: dict[str, Any] | None) -> tuple[str, str]:
    """Return value and outcome, `yes`, `no` or nothing."""
    if measurement is None:
        return _BLANK, ""
    outcome = {True: "yes", False: "no", None: ""}[measurement["passed"]]
    return _number(measurement["value"]), outcome


def _number(value: float | None) -> str:
    if value is None:
        return _BLANK
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4g}"


def _samples(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return what users said once, with the answers of every run that heard just that."""
    answers: dict[tuple[str, ...], list[tuple[int, list[str]]]] = {}
    for place, run in enumerate(runs):
        for turns in run.result.get("samples", []):
            said = tuple(turn["user"] for turn in turns)
            answers.setdefault(said, []).append((place, [turn["assistant"] for turn in turns]))
    return [{"said": said, "answers": found} for said, found in answers.items()]


def _differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Cell]]]:
    """Return the settings that are not the same in all runs."""
    columns = [
        {name: (str(value), "") for name, value in flat(run.record["config"])} for run in runs
    ]
    return [
        (name, cells) for name, cells in _side_by_side(columns) if any(c != cells[0] for c in cells)
    ]
