"""Run records to one HTML page that needs nothing but itself. Never touches a model."""

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .console import format_cell
from .errors import CheckpointError
from .files import read_json, write_text

_COLOURS = ("#2f7fb8", "#c8662a", "#3a9a68", "#8a63b8", "#b8a02f", "#777777")
_FIGURE_INCHES = (6.2, 3.6)
# points of a training curve: more would only make the page heavy
_MOST_POINTS = 400

_WORDS = {
    "healthy": "Every token settles, from any start, at a place of its own.",
    "non_finite": "The contexts hold NaN or infinity.",
    "zero_collapse": "The contexts that were delivered are all but zero: the seeds' measure is met "
    "by answering nothing.",
    "identity_map": "The update returns what it is given; it settles because it does nothing.",
    "global_attractor": "All tokens settle at nearly the same point, which says nothing of them.",
    "expanding": "Small differences of contexts grow.",
    "multi_stable": "Where a token settles depends on where it started.",
    "not_converged": "The contexts still move when the iteration ends.",
    "low_rank": "The contexts use few of their directions.",
    "decoupled": "The context hardly reads itself: a linear recurrence in disguise.",
    "amnesic": "The prediction uses one token only: a bigram model.",
}


@dataclass
class _RunRecord:
    """What the page shows of one run."""

    name: str
    result: dict[str, Any]
    record: dict[str, Any]
    phase1: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a history; a last line that was cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_report(
    folders: Sequence[Path], out: Path, *, result: dict[str, Any] | None = None
) -> None:
    """Write one page of one or several runs.

    Args:
        folders: of finished runs.
        out: the page.
        result: of the only folder, where its `result.json` is not written yet.

    Raises:
        CheckpointError: a folder holds no finished run.
    """
    import jinja2

    if not folders:
        raise CheckpointError("at least one folder of a finished run expected, got none")
    runs = [_read_run(folder, result) for folder in folders]
    template = resources.files("new_llm").joinpath("report.html.jinja").read_text("utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(template).render(
        runs=[_describe(run) for run in runs], plots=_plots(runs)
    )
    write_text(out, text)


def _read_run(folder: Path, result: dict[str, Any] | None) -> _RunRecord:
    if result is None:
        if not (folder / "result.json").is_file():
            raise CheckpointError(
                f"the folder of a finished run expected, {folder} has no result.json; "
                "finish it by the command that began it"
            )
        result = read_json(folder / "result.json", "a run's result")
    assert result is not None
    return _RunRecord(
        name=folder.name,
        result=result,
        record=read_json(folder / "config.json", "a run's config"),
        phase1=read_json(folder / "stages" / "phase1.json", "the result of Phase 1"),
        history=read_history(folder / "history.jsonl"),
    )


def _describe(run: _RunRecord) -> dict[str, Any]:
    """Return the words, key figures and tables of one run."""
    config, result = run.record["config"], run.result
    verdicts = []
    for when, key in (("final model", "verdict_final"), ("after Phase 1", "verdict_phase1")):
        for scope, diagnosis in result[key].items():
            if diagnosis is not None:
                verdicts.append(
                    {
                        "verdict": diagnosis["verdict"],
                        "where": f"{when}, {scope} scope",
                        "words": _WORDS[diagnosis["verdict"]],
                        "advice": diagnosis["advice"][0],
                    }
                )
    return {
        "name": run.name,
        "cell": config["model"]["cell"],
        "preset": config["preset"],
        "fingerprint": result["fingerprint"],
        "verdicts": verdicts,
        "figures": _figures(result),
        "tables": _tables(run),
        "samples": result["samples"],
        "config": json.dumps(run.record, indent=2),
    }


def _figures(result: dict[str, Any]) -> list[dict[str, str]]:
    evaluation = result["evaluation"]
    below = result["bigram_loss"] - evaluation["loss"]
    rows = [
        ("validation loss, nats a token", f"{evaluation['loss']:.3f}"),
        ("below a Kneser-Ney bigram", f"{below:+.3f}"),
        ("perplexity", f"{evaluation['perplexity']:.1f}"),
        ("bits per byte", f"{evaluation['bits_per_byte']:.3f}"),
        ("accuracy", f"{evaluation['accuracy']:.1%}"),
    ]
    if evaluation["loss_assistant"] is not None:
        rows.append(("loss on assistant tokens", f"{evaluation['loss_assistant']:.3f}"))
    rows.append(("tokens seen", f"{result['tokens_seen']:,}"))
    rows.append(("seconds in all", f"{sum(result['seconds'].values()):,.0f}"))
    return [{"name": name, "value": value} for name, value in rows]


def _tables(run: _RunRecord) -> list[dict[str, Any]]:
    columns = ["", "converged", "mean iterations", "of the converged", "mean change"]
    convergence = [_convergence_row(name, row) for name, row in run.phase1["convergence"].items()]
    dialogues = [
        _convergence_row(f"dialogue {number}", row)
        for number, row in enumerate(run.phase1["dialogues"], start=1)
    ]
    tables = [
        {"title": "all tokens, by metric", "columns": columns, "rows": convergence},
        {"title": "held-out dialogues, mse < 0.01", "columns": columns, "rows": dialogues},
    ]
    for scope, diagnosis in run.result["verdict_final"].items():
        if diagnosis is not None:
            rows = [
                [name, *map(format_cell, (row["value"], row["threshold"], row["passed"]))]
                for name, row in diagnosis["measurements"].items()
            ]
            title = f"final model, {scope} scope: {', '.join(diagnosis['verdicts'])}"
            names = ["measurement", "value", "wanted", "passed"]
            tables.append({"title": title, "columns": names, "rows": rows})
    return tables


def _convergence_row(name: str, row: dict[str, Any]) -> list[str]:
    values = (row["mean_iterations"], row["mean_iterations_converged"], row["mean_change"])
    return [name, f"{row['convergence_rate']:.1%}", *map(format_cell, values)]


def _plots(runs: list[_RunRecord]) -> list[dict[str, str]]:
    """Return the figures of the page; one with nothing to show is left out."""
    drawn = [
        ("Convergence", "Change of a token's context after each iteration: median, 10 to 90 %.",
         "iteration", "change", _draw_curve, True),
        ("Iterations", "Share of token ids that converged after so many iterations.",
         "iterations", "share of ids", _draw_iterations, False),
        ("Phase 1", "Loss of Phase 1, block after block.", "step", "loss", _draw_phase1, True),
        ("Phase 2", "Training loss, smoothed; dots: held-out dialogues; dashes: the bigram.",
         "tokens", "nats a token", _draw_phase2, False),
    ]  # fmt: skip
    plots = []
    for title, caption, x_name, y_name, draw, log_y in drawn:
        svg = _figure(runs, x_name, y_name, draw, log_y=log_y, prefix=title.replace(" ", ""))
        if svg is not None:
            plots.append({"title": title, "caption": caption, "svg": svg})
    return plots


def _figure(
    runs: list[_RunRecord],
    x_name: str,
    y_name: str,
    draw: Callable[[Any, _RunRecord, str], bool],
    *,
    log_y: bool,
    prefix: str,
) -> str | None:
    """Draw one figure as inline SVG in the page's own colours."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 10}):
        figure = Figure(figsize=_FIGURE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        anything = [draw(axes, run, _COLOURS[i % len(_COLOURS)]) for i, run in enumerate(runs)]
        if not any(anything):
            return None
        if log_y:
            axes.set_yscale("log")
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        if len(runs) > 1:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # ids are unique in a page; black follows the reader's light or dark scheme
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    return re.sub(r'font-family:[^;"]*|font: ([\d.]+px) [^;"]*', _font, svg)


def _font(match: re.Match[str]) -> str:
    return f"font: {match[1]} system-ui, sans-serif" if match[1] else "font-family: inherit"


def _draw_curve(axes: Any, run: _RunRecord, colour: str) -> bool:
    curve = np.array(run.phase1["curve"])
    if curve.size == 0:
        return False
    # a token that rests exactly has no place on a logarithmic axis
    curve = np.maximum(curve, 1e-12)
    iterations = np.arange(1, len(curve) + 1)
    axes.fill_between(iterations, curve[:, 0], curve[:, 2], color=colour, alpha=0.2, lw=0)
    axes.plot(iterations, curve[:, 1], color=colour, label=run.name, marker="o", ms=3)
    return True


def _draw_iterations(axes: Any, run: _RunRecord, colour: str) -> bool:
    counts = np.array(run.phase1["iterations"], dtype=float)
    if counts.sum() == 0:
        return False
    axes.bar(np.arange(len(counts)), counts / counts.sum(), color=colour, alpha=0.6, label=run.name)
    axes.set_xlim(left=max(0, int(np.flatnonzero(counts)[0]) - 1))
    return True


def _draw_phase1(axes: Any, run: _RunRecord, colour: str) -> bool:
    rows = [row for row in run.history if row["stage"] == "phase1"]
    if not rows:
        return False
    values = np.array([row["loss"] for row in rows])
    axes.plot(*_thinned(np.arange(1, len(values) + 1), values), color=colour, label=run.name)
    return True


def _draw_phase2(axes: Any, run: _RunRecord, colour: str) -> bool:
    rows = [row for row in run.history if row["stage"] == "phase2"]
    if not rows:
        return False
    tokens = np.array([row["tokens"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    window = max(1, len(losses) // 50)
    kernel = np.ones(window) / window
    smooth = np.convolve(losses, kernel, mode="valid")
    axes.plot(*_thinned(tokens[window - 1 :], smooth), color=colour, label=run.name)
    checked = [row for row in run.history if row["stage"] == "validation"]
    points = [(row["tokens"], row["loss"]) for row in checked]
    points.append((run.result["tokens_seen"], run.result["evaluation"]["loss"]))
    axes.plot(*zip(*points, strict=True), color=colour, ls="none", marker="o", ms=5)
    axes.axhline(run.result["bigram_loss"], color=colour, ls="--", lw=1)
    return True


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step = max(1, len(x) // _MOST_POINTS)
    return x[::step], y[::step]
