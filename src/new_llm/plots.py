"""Figures of a report, as inline SVG that takes its colours from the page."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
# a stack's blocks, in order
_BLOCK_STYLES = ("-", "--", ":", "-.")
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
    drawn = [(drawing, _overlaid(runs, drawing)) for drawing in _DRAWINGS]
    overlaid = [
        Plot(title=drawing.title, caption=drawing.caption, svg=svg)
        for drawing, svg in drawn
        if svg is not None
    ]
    return overlaid + list(_panels(runs))


def _overlaid(runs: Sequence[RunRecord], drawing: _Drawing) -> str | None:
    with inline_axes(drawing.title.replace(" ", "")) as (axes, svg):
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
        return svg()


@contextmanager
def inline_axes(prefix: str) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield empty axes, and what turns them into a part of a page; `prefix` is theirs alone."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 10}):
        figure = Figure(figsize=_FIGURE_INCHES, layout="constrained")

        def svg() -> str:
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            return _inlined(buffer.getvalue(), prefix)

        yield figure.add_subplot(), svg


def alone(draw: Callable[[Any], None], *, inches: tuple[float, float]) -> str:
    """Return an SVG for a file of its own, of what `draw(figure)` draws; black on white."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "new-llm", "font.size": 10}):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _inlined(svg: str, prefix: str) -> str:
    """Return the SVG as a part of a page: ids of its own, the page's ink and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # black follows the reader's light or dark scheme
    svg = svg.replace("#000000", "currentColor")
    svg = re.sub(r"<text\b", '<text fill="currentColor"', svg)
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


def _portraits(run: RunRecord, scope: str) -> list[dict[str, Any]]:
    """Return the portraits of the final model, a block each."""
    return run.stages["evaluate"].get("portraits", {}).get(scope, [])


def _draw_blocks(
    run: RunRecord, scope: str, draw: Callable[[dict[str, Any], dict[str, Any]], None]
) -> bool:
    """Draw every block's portrait in a line style of its own."""
    portraits = _portraits(run, scope)
    for k, portrait in enumerate(portraits):
        draw(portrait, {"ls": _BLOCK_STYLES[k % len(_BLOCK_STYLES)], "lw": 1.5})
    return bool(portraits)


def _draw_sweeps(axes: Any, run: RunRecord, place: tuple[int, int], colour: str) -> bool:
    def draw(portrait: dict[str, Any], style: dict[str, Any]) -> None:
        curve = np.maximum(np.array(portrait["residual"]), _SMALLEST)
        sweeps = np.arange(1, len(curve) + 1)
        axes.fill_between(sweeps, curve[:, 0], curve[:, 2], color=colour, alpha=0.15, lw=0)
        axes.plot(sweeps, curve[:, 1], color=colour, **style)

    return _draw_blocks(run, "sequence", draw)


def _draw_factors(axes: Any, run: RunRecord, place: tuple[int, int], colour: str) -> bool:
    def draw(portrait: dict[str, Any], style: dict[str, Any]) -> None:
        axes.hist(
            portrait["factors"], bins=25, density=True, histtype="step", color=colour, **style
        )

    axes.axvline(1.0, color="#888888", lw=0.8)
    return _draw_blocks(run, "token", draw)


def _draw_spectrum(axes: Any, run: RunRecord, place: tuple[int, int], colour: str) -> bool:
    def draw(portrait: dict[str, Any], style: dict[str, Any]) -> None:
        values = np.maximum(np.array(portrait["spectrum"]), _SMALLEST)
        axes.plot(*_thinned(np.arange(1, len(values) + 1), values), color=colour, **style)

    return _draw_blocks(run, "token", draw)


def _draw_time_scales(axes: Any, run: RunRecord, place: tuple[int, int], colour: str) -> bool:
    def draw(portrait: dict[str, Any], style: dict[str, Any]) -> None:
        scales = np.array(portrait["time_scales"])
        axes.plot(np.linspace(0, 1, len(scales)), scales, color=colour, **style)

    return _draw_blocks(run, "token", draw)


def _panels(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    """Yield a map and a cosine matrix for each block of each run: these cannot share axes."""
    for index, run in enumerate(runs):
        portraits = _portraits(run, "token")
        for k, portrait in enumerate(portraits):
            where = [run.name] if len(runs) > 1 else []
            where += [f"block {k + 1}"] if len(portraits) > 1 else []
            name = ", ".join(where)
            for kind, caption, draw in (
                ("Map of contexts", _MAP_CAPTION, _draw_map),
                ("Cosines", _COSINES_CAPTION, _draw_cosines),
            ):
                with inline_axes(f"{kind.split()[0]}{index}-{k}") as (axes, svg):
                    draw(axes, portrait)
                    title = f"{kind}: {name}" if name else kind
                    yield Plot(title=title, caption=caption, svg=svg())


_MAP_CAPTION = (
    "Fixed points of held-out tokens on their two widest directions; the brighter, the more "
    "frequent in the training dialogues."
)
_COSINES_CAPTION = (
    "Cosine between fixed points of different tokens; the diagonal is a token with itself."
)


def _draw_map(axes: Any, portrait: dict[str, Any]) -> None:
    places = np.array(portrait["places"])
    order = np.argsort(portrait["counts"])
    # 1 is added: most ids of a large vocabulary do not occur
    shade = np.log10(np.array(portrait["counts"]) + 1.0)[order]
    dots = axes.scatter(*places[order].T, c=shade, s=9, cmap="viridis", linewidths=0)
    axes.figure.colorbar(dots, ax=axes, label="log10(occurrences + 1)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_cosines(axes: Any, portrait: dict[str, Any]) -> None:
    picture = axes.imshow(portrait["cosines"], vmin=-1, vmax=1, cmap="RdBu_r")
    axes.figure.colorbar(picture, ax=axes, label="cosine")
    axes.set_xlabel("token")
    axes.set_ylabel("token")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step = max(1, len(x) // _MOST_POINTS)
    return x[::step], y[::step]


_DRAWINGS = (
    _Drawing(
        title="Convergence",
        caption="After Phase 1: change of a token's context after each iteration, median and 10 "
        "to 90 %.",
        x_name="iteration",
        y_name="change",
        draw=_draw_curve,
        log_y=True,
    ),
    _Drawing(
        title="Iterations",
        caption="After Phase 1: share of token ids that took so many iterations.",
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
    _Drawing(
        title="Sweeps",
        caption="Held-out dialogues, final model: change of a position's context after each sweep "
        "over the whole text, median and 10 to 90 %; a line style a block.",
        x_name="sweep",
        y_name="residual",
        draw=_draw_sweeps,
        log_y=True,
    ),
    _Drawing(
        title="Contraction factors",
        caption="Held-out tokens, final model: how much one update shrinks the distance of two "
        "contexts. Left of 1 they come closer.",
        x_name="factor",
        y_name="density",
        draw=_draw_factors,
    ),
    _Drawing(
        title="Singular values",
        caption="Held-out tokens, final model: how widely the fixed points are spread, direction "
        "by direction, relative to the widest.",
        x_name="direction",
        y_name="singular value",
        draw=_draw_spectrum,
        log_y=True,
    ),
    _Drawing(
        title="Gate time-scales",
        caption="Final model: tokens after which a share 1/e of what a coordinate holds is left, "
        "coordinates and tokens sorted.",
        x_name="share of gates",
        y_name="tokens",
        draw=_draw_time_scales,
        log_y=True,
    ),
)
