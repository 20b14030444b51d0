"""Draw the figures of docs/ideas.md: `python docs/figures.py --checkpoint runs/demo`.

Two of them train small cells, in about a minute on one core. The others look at a trained model:
without `--checkpoint` they are left as they are.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from new_llm.cell import ContextCell
from new_llm.checkpoint import Checkpoint, load_checkpoint
from new_llm.config import ModelConfig, Phase1Config, SampleConfig, SolverConfig
from new_llm.data import held_out_ids
from new_llm.dialogues import ReadReport, read_dialogues
from new_llm.doctor import THRESHOLDS, Diagnosis
from new_llm.evaluate import token_verdict
from new_llm.fixed_point import measure
from new_llm.generate import Conversation
from new_llm.measurements import time_scales
from new_llm.model import NewLLM, build_cell
from new_llm.phase1 import train_contractive, train_residual_literal
from new_llm.plots import COLOURS, alone
from new_llm.recurrence import sweep
from new_llm.view import planar, view

FOLDER = Path(__file__).with_name("figures")
# small enough for a minute: what they show is the same at 256
WIDTH, VOCABULARY, TRAINED_IDS = 128, 2048, 512
ITERATIONS = 60
SEED_RULE = SolverConfig(metric="mse", tolerance=0.01, max_iterations=50)
# the first dialogue of the default chats that the demo has not read, and how much of it
UNREAD, LENGTH = 1700, 192
JACOBI_SWEEPS = 192
SHARED = ("hello, how are you?", "do you like music?", "me too! where do you live?")
BRANCHES = (
    ("what is your favorite band?", "i love to sing", "what do you listen to?"),
    ("i have to work tomorrow", "i am a nurse", "do you like your job?"),
)
_SPEAKERS = {"user": COLOURS[0], "assistant": COLOURS[1], "markup": "#b9bfc6"}
_SMALLEST = 1e-14


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A Sequential cell in token scope, and how it came about."""

    name: str
    colour: str
    model: NewLLM
    diagnosis: Diagnosis

    def value(self, name: str) -> float:
        """Return what the doctor measured."""
        value = self.diagnosis.measurements[name].value
        assert value is not None
        return value


def subjects() -> list[Subject]:
    """Return three cells of one shape: random weights, the founding recipe, and ours."""
    made = {
        "untrained": _model("normal"),
        "trained by residual": _by_residual(),
        "trained by contractive": _by_contraction(),
    }
    return [
        Subject(name=name, colour=colour, model=model, diagnosis=token_verdict(model))
        for (name, model), colour in zip(
            made.items(), (COLOURS[7], COLOURS[1], COLOURS[0]), strict=True
        )
    ]


def _model(initialisation: Any) -> NewLLM:
    torch.manual_seed(0)
    config = ModelConfig(
        cell="sequential", scope="token", num_blocks=1, num_layers=2, mlp_width=0,
        context_width=WIDTH, embedding_width=WIDTH, hidden_width=WIDTH,
        initialisation=initialisation,
    )  # fmt: skip
    return NewLLM(config, VOCABULARY, SEED_RULE).eval()


def _by_residual() -> NewLLM:
    model = _model("normal")
    train_residual_literal(
        model.cells()[0],
        lambda ids: _inputs(model, ids),
        [_trainable()[:TRAINED_IDS]],
        Phase1Config(objective="residual"),
    )
    return model.eval()


def _by_contraction() -> NewLLM:
    model = _model("orthogonal")
    train_contractive(
        model.cells()[0],
        _inputs(model, torch.from_numpy(_trainable())),
        Phase1Config(),
        seed=0,
        log=lambda row: None,
        advance=lambda amount=1, note="": None,
    )
    return model.eval()


def _trainable() -> np.ndarray:
    """Return the ids that no verdict looks at."""
    return np.setdiff1d(np.arange(VOCABULARY), held_out_ids(VOCABULARY, WIDTH))


def _inputs(model: NewLLM, ids: Tensor) -> Tensor:
    """Return what the only cell reads of token ids, `[N, E]`."""
    return model.stages()[0].norm(model.embed(ids)).detach()


@torch.no_grad()
def changes(subject: Subject) -> dict[str, list[float]]:
    """Return how much the median held-out token changes in each iteration, by both metrics."""
    model, cell = subject.model, subject.model.cells()[0]
    x = _inputs(model, torch.from_numpy(held_out_ids(VOCABULARY, WIDTH)))
    projected, weights = cell.project(x), cell.weights()
    context = x.new_zeros(len(x), WIDTH)
    found: dict[str, list[float]] = {"mse": [], "residual": []}
    for _ in range(ITERATIONS):
        updated = cell.search_map(context, projected, weights)
        for metric, values in found.items():
            change = measure(updated, context, metric)  # pyright: ignore[reportArgumentType]
            values.append(max(change.median().item(), _SMALLEST))
        context = updated
    return found


def draw_iterations(subjects: Sequence[Subject]) -> str:
    """Draw the change of a token's context in each iteration, by the usual metric and by ours."""
    found = [changes(subject) for subject in subjects]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for axes, metric, title, limit in (
            (left, "mse", "the usual metric: mean square", 0.01),
            (right, "residual", "relative change", THRESHOLDS.residual),
        ):
            for subject, values in zip(subjects, found, strict=True):
                axes.plot(range(1, ITERATIONS + 1), values[metric], color=subject.colour, lw=1.8,
                          label=subject.name)  # fmt: skip
            axes.axhline(limit, color="#444444", ls="--", lw=1)
            axes.annotate(f"{limit:g}", (ITERATIONS, limit), (0, 3), ha="right",
                          textcoords="offset points")  # fmt: skip
            axes.set_title(title)
            axes.set_yscale("log")
            axes.set_xlabel("iteration")
            _plain(axes)
        left.set_ylabel("change, median token")
        for subject, values in zip(subjects, found, strict=True):
            delivered = next(n for n, value in enumerate(values["mse"]) if value < 0.01)
            left.plot(delivered + 1, values["mse"][delivered], "o", color=subject.colour)
        handles, names = right.get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=3)

    return alone(draw, inches=(9.0, 3.8))


def draw_trap(subjects: Sequence[Subject]) -> str:
    """Draw what the usual metric says of three cells, and what the doctor measures of them."""
    rules = THRESHOLDS
    delivered = [_met_by_usual_metric(subject.model) for subject in subjects]
    panels: list[tuple[str, list[float], float]] = [
        ("mean square change\nunder 0.01, share", delivered, 0.95),
        ("size of the delivered\ncontexts, RMS", _values(subjects, "rms"), rules.zero_rms),
        ("settles to 1e-4,\nshare", _values(subjects, "settled_share"), rules.residual_share),
        ("one end from\nany start, share", _values(subjects, "one_end_share"),
         rules.same_end_share),
        ("effective rank,\nshare of the width",
         [value / WIDTH for value in _values(subjects, "effective_rank")], rules.rank_share),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, values, limit) in zip(all_axes, panels, strict=True):
            axes.bar(range(len(values)), values, color=[one.colour for one in subjects], width=0.7)
            axes.axhline(limit, color="#444444", ls="--", lw=1)
            for place, value in enumerate(values):
                axes.annotate(f"{value:.2g}", (place, value), (0, 3), ha="center",
                              textcoords="offset points")  # fmt: skip
            axes.set_title(title, fontsize=10)
            axes.set_xticks([])
            axes.set_ylim(0, 1.15)
            _plain(axes)
        all_axes[0].set_facecolor("#f3f3f3")
        handles = all_axes[0].containers[0]
        names = [f"{one.name}: {one.diagnosis.verdict}" for one in subjects]
        figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=3)

    return alone(draw, inches=(9.6, 3.4))


def _values(subjects: Sequence[Subject], name: str) -> list[float]:
    return [subject.value(name) for subject in subjects]


def _met_by_usual_metric(model: NewLLM) -> float:
    """Return the share of held-out ids that the founding stop rule calls converged."""
    ids = torch.from_numpy(held_out_ids(VOCABULARY, WIDTH))
    return model.search(ids).blocks[0].convergence_rate


@torch.no_grad()
def draw_sweeps(checkpoint: Checkpoint) -> str:
    """Draw which tokens of a text still move in each sweep, and the slowest of them."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    rows = read_dialogues("chitchat-dataset", split="", on_bad_row="error",
                          max_dialogues=UNREAD + 1, report=ReadReport())  # fmt: skip
    *_, messages = rows
    ids = torch.tensor([tokenizer.encode_prompt(messages)[:LENGTH]])
    zero = model.initial_context(1)
    inputs, _ = model.stream_contexts(ids, zero)

    def residuals(cell: ContextCell, k: int, *, gate_exact: bool, sweeps: int) -> Tensor:
        found = sweep(cell, inputs[k], zero[:, k], tolerance=1e-6, max_sweeps=sweeps,
                      gate_exact=gate_exact)  # fmt: skip
        return found.history[:, 0].clamp(min=_SMALLEST)

    by_gate = [residuals(cell, k, gate_exact=True, sweeps=32)
               for k, cell in enumerate(model.cells())]  # fmt: skip
    by_jacobi = [residuals(cell, k, gate_exact=False, sweeps=JACOBI_SWEEPS)
                 for k, cell in enumerate(model.cells())]  # fmt: skip

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        shown = by_gate[-1].log10()
        picture = left.imshow(
            shown, aspect="auto", cmap="viridis", vmin=-6, vmax=0, interpolation="nearest",
            extent=(0.5, shown.shape[1] + 0.5, len(shown) + 0.5, 0.5),
        )  # fmt: skip
        figure.colorbar(picture, ax=left, label="log10(residual)")
        left.set_title(f"gate-scan, block {len(by_gate)}: every token, sweep by sweep")
        left.set_xlabel("token of the text")
        left.set_ylabel("sweep")
        for name, found, colour in (
            ("gate-scan", by_gate, COLOURS[0]), ("Jacobi", by_jacobi, COLOURS[1])
        ):  # fmt: skip
            for history, style in zip(found, ("-", "--"), strict=False):
                worst = history.amax(dim=1)
                right.plot(range(1, len(worst) + 1), worst, color=colour, ls=style, lw=1.8,
                           label=name if style == "-" else None)  # fmt: skip
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_title("the slowest token; dashed: block 2")
        right.set_xlabel("sweep")
        right.set_ylabel("residual")
        right.legend(frameon=False)
        _plain(right)

    return alone(draw, inches=(9.6, 3.4))


@torch.no_grad()
def draw_time_scales(checkpoint: Checkpoint) -> str:
    """Draw how long the gates of a trained model keep what they hold, and those it began with."""
    model = checkpoint.model
    ids = torch.arange(model.vocab_size)
    inputs = model.search(ids).inputs
    torch.manual_seed(0)
    fresh = build_cell(model.config).eval()

    def sorted_scales(cell: ContextCell, x: Tensor) -> np.ndarray:
        context = x.new_zeros(len(x), cell.context_width)
        forget = cell.forget_gates(context, cell.project(x), cell.weights())
        scales = time_scales(forget).flatten().sort().values
        return scales[:: max(1, len(scales) // 400)].numpy()

    curves = [("at the start", sorted_scales(fresh, inputs[0]), COLOURS[7])]
    curves += [
        (f"trained, block {k + 1}", sorted_scales(cell, inputs[k]), COLOURS[k])
        for k, cell in enumerate(model.cells())
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, scales, colour in curves:
            axes.plot(np.linspace(0, 1, len(scales)), scales, color=colour, lw=1.8, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("share of gates, over all tokens")
        axes.set_ylabel("time-scale, tokens")
        axes.legend(frameon=False)
        _plain(axes)

    return alone(draw, inches=(6.0, 3.4))


def draw_talk(checkpoint: Checkpoint) -> str:
    """Draw the contexts of a talk and of a branch of it: after all tokens, and after messages."""
    talk = Conversation(checkpoint, SampleConfig(max_new_tokens=24, seed=1))
    for text in SHARED:
        _ = "".join(talk.reply(text))
    shared = len(talk.recent)
    contexts, said, ways = [], [], []
    for texts in BRANCHES:
        branch = talk.fork()
        for text in texts:
            _ = "".join(branch.reply(text))
        seen = view(branch)
        assert seen is not None
        # what both share is drawn once
        begin = shared if contexts else 0
        contexts.append(seen.contexts[begin:].flatten(1))
        said += _speakers(seen.tokens)[begin:]
        # the last token of a message is the same in all of them, so that what differs is the past
        closed = [row for row, token in enumerate(seen.tokens[:-1]) if token == "<|im_end|>"]
        ends = torch.tensor(closed) + 1
        ways.append((seen.contexts[ends].flatten(1), int((ends < shared).sum())))
    tokens = planar(torch.cat(contexts))
    messages = planar(torch.cat([way for way, _ in ways])).split([len(way) for way, _ in ways])

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for who, colour in _SPEAKERS.items():
            rows = [row for row, speaker in enumerate(said) if speaker == who]
            left.scatter(*tokens[rows].T, s=14, color=colour, alpha=0.8, lw=0, label=who)
        left.set_title("after each token")
        for way, (_, fork), texts, colour in zip(
            messages, ways, BRANCHES, (COLOURS[0], COLOURS[1]), strict=True
        ):
            right.plot(*way[fork - 1 :].T, color=colour, marker="o", ms=5, label=texts[0])
        way, fork = messages[0], ways[0][1]
        right.plot(*way[:fork].T, color=COLOURS[7], marker="o", ms=5, label="what both share")
        for number, place in enumerate(way[:fork].tolist(), 1):
            right.annotate(str(number), place, (5, 4), textcoords="offset points")
        right.scatter(*way[fork - 1], s=110, facecolors="none", edgecolors="#c02020", lw=1.6,
                      zorder=3, label="the fork")  # fmt: skip
        right.set_title("after each message")
        for axes, columns in ((left, 3), (right, 2)):
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14),
                        ncols=columns)  # fmt: skip
            axes.set_aspect("equal", adjustable="datalim")
            axes.set_xlabel("first direction")
            _plain(axes)
        left.set_ylabel("second direction")

    return alone(draw, inches=(9.6, 4.9))


def _speakers(tokens: Sequence[str]) -> list[str]:
    """Return who says each token; the markup between messages is nobody's."""
    found, role, in_header = [], "", False
    for token in tokens:
        if token == "<|im_start|>":
            role, in_header = "", True
        elif token == "<|im_end|>":
            role = ""
        found.append(role if role and not in_header else "markup")
        if in_header and token == "\n":
            in_header = False
        elif in_header and token != "<|im_start|>":
            role += token
    return found


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def figures(checkpoint: Path | None) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each figure, and what draws it."""
    made = subjects()
    yield "iterations", lambda: draw_iterations(made)
    yield "trap", lambda: draw_trap(made)
    if checkpoint is not None:
        loaded = load_checkpoint(checkpoint)
        yield "sweeps", lambda: draw_sweeps(loaded)
        yield "time-scales", lambda: draw_time_scales(loaded)
        yield "talk", lambda: draw_talk(loaded)


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a finished run of the preset demo")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the figures")
    options = parser.parse_args()
    # sums of several threads differ in their last digits
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in figures(options.checkpoint):
        path = options.out / f"{name}.svg"
        path.write_text(draw())
        print(path)


if __name__ == "__main__":
    main()
