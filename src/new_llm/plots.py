"""Figures of a report, as inline SVG that takes its colours from the page."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .records import RunRecord

# one a run, in order; legible on white and on black
COLOURS = ("#2f7fb8", "#d0692a", "#2f9468", "#9168bb", "#a98a20", "#c04f84", "#3494a6", "#7a8291")
# narrow, so that text is still legible where a phone shrinks the figure
_FIGURE_INCHES = (4.7, 3.2)
# points of a training curve: more would only make the page heavy
_MOST_POINTS = 400
# a token that rests exactly has no place on a logarithmic axis
_SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """How one figure is made; `draw(axes, run, place, colour)` says whether it drew anything."""

    title: str
    caption: str
    x_name: str
    y_name: str
    draw: Callable[[Any, RunRecord, tuple[int, int], str], bool]
    log_y: bool = False


def plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Return the figures of several runs, one colour a run; one with nothing to show is left out.

    >>> plots([])
    []
    """
    drawn = [(drawing, _svg(runs, drawing)) for drawing in _DRAWINGS]
    return [
        Plot(title=drawing.title, caption=drawing.caption, svg=svg)
        for drawing, svg in drawn
        if svg is not None
    ]


def _svg(runs: Sequence[RunRecord], drawing: _Drawing) -> str | None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    prefix = drawing.title.replace(" ", "")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 10}):
        figure = Figure(figsize=_FIGURE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        drew = [
            drawing.draw(axes, run, (place, len(runs)), COLOURS[place % len(COLOURS)])
            for place, run in enumerate(runs)
        ]
        if not any(drew):
            return None
        if drawing.log_y:
            axes.set_yscale("log")
        axes.set_xlabel(drawing.x_name)
        axes.set_ylabel(drawing.y_name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(buffer.getvalue(), prefix)


def _inlined(svg: str, prefix: str) -> str:
    """Return the SVG as a part of a page: ids of its own, the page's ink and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # black follows the reader's light or dark scheme
    svg = svg.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    return re.sub(r'font-family:[^;"]*|font: ([\d.]+px) [^;"]*', _font, svg)


def _font(match: re.Match[str]) -> str:
    return f"font: {match[1]} system-ui, sans-serif" if match[1] else "font-family: inherit"


def _draw_curve(axes: Any, run: RunRecord, place: tuple[int, int], colour: str) -> bool:
    curve = np.array(run.stages["phase1"].get("curve", []))
    if curve.size == 0:
        return False
    curve = np.maximum(curve, _SMALLEST)
    iterations = np.arange(1, len(curve) + 1)
    axes.fill_between(iterations, curve[:, 0], curve[:, 2], color=colour, alpha=0.2, lw=0)
    axes.plot(iterations, curve[:, 1], color=colour, marker="o", ms=3)
    return True


def _draw_iterations(axes: Any, run: RunRecord, place: tuple[int, int], colour: str) -> bool:
    counts = np.array(run.stages["phase1"].get("iterations", []), dtype=float)
    if counts.sum() == 0:
        return False
    # bars of several runs stand side by side
    index, number = place
    width = 0.9 / number
    shift = (index - (number - 1) / 2) * width
    found = np.flatnonzero(counts)
    axes.bar(found + shift, counts[found] / counts.sum(), width=width, color=colour)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return True


def _draw_phase1(axes: Any, run: RunRecord, place: tuple[int, int], colour: str) -> bool:
    values = np.array([row["loss"] for row in run.rows("phase1")])
    if values.size == 0:
        return False
    axes.plot(*_thinned(np.arange(1, len(values) + 1), values), color=colour)
    return True


def _draw_phase2(axes: Any, run: RunRecord, place: tuple[int, int], colour: str) -> bool:
    rows = run.rows("phase2")
    if not rows:
        return False
    tokens = np.array([row["tokens"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    window = min(len(losses), max(5, len(losses) // 50))
    # the last steps of a pass hold few tokens, and weigh as much
    weights = np.diff(tokens, prepend=0)
    sums = [np.convolve(v, np.ones(window), mode="valid") for v in (losses * weights, weights)]
    smooth = sums[0] / sums[1]
    axes.plot(*_thinned(tokens[window - 1 :], smooth), color=colour)
    points = [(row["tokens"], row["loss"]) for row in run.rows("validation")]
    points.append((run.result["tokens_seen"], run.result["evaluation"]["loss"]))
    axes.plot(*zip(*points, strict=True), color=colour, ls="none", marker="o", ms=5)
    axes.axhline(run.result["bigram_loss"], color=colour, ls="--", lw=1)
    return True


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step = max(1, len(x) // _MOST_POINTS)
    return x[::step], y[::step]


_DRAWINGS = (
    _Drawing(
        title="Convergence",
        caption="Change of a token's context after each iteration: median, 10 to 90 %.",
        x_name="iteration",
        y_name="change",
        draw=_draw_curve,
        log_y=True,
    ),
    _Drawing(
        title="Iterations",
        caption="Share of token ids that took so many iterations.",
        x_name="iterations",
        y_name="share of ids",
        draw=_draw_iterations,
    ),
    _Drawing(
        title="Phase 1",
        caption="Loss of Phase 1, block after block.",
        x_name="step",
        y_name="loss",
        draw=_draw_phase1,
        log_y=True,
    ),
    _Drawing(
        title="Phase 2",
        caption="Training loss, smoothed; dots: a part of the held-out dialogues, the last all "
        "of them; dashes: Kneser-Ney bigram.",
        x_name="tokens",
        y_name="nats a token",
        draw=_draw_phase2,
    ),
)
