"""Every sentence of the founding documents that claims something measurable, and what decides it.

A claim names the rows of the experiments that it rests on, so that it is decided again whenever
they are. `contradicted` is a claim that the documents themselves deny elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .experiments import Row

Word = Literal["true", "false", "contradicted"]
Values = Mapping[str, float]

_SCALING = "token_scaling_experiment.md"
_COMPARISON = "phase1_training_comparison.md"
_FIXED = "phase1_convergence_fixed.md"
_ANALYSIS = "analysis_sequential_failure.md"
_SPECIFICATION = "phase1_training_spec.md"
_L2 = "l2 < 0.01, warm-up 100"
_MSE = "mse < 0.01, warm-up 0"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence, the rows it rests on, and how they decide it."""

    document: str
    sentence: str
    experiment: str
    rows: tuple[str, ...]
    """Quantities of the experiment; the first is shown as ours."""
    holds: Callable[..., bool]
    """Of the rows' means, in their order."""
    seed_value: float | None = None
    contradicted: bool = False
    """Whether the documents deny it elsewhere."""
    why: str


def _claims() -> tuple[Claim, ...]:
    def trained(cell: str, count: int, what: str) -> str:
        return f"{cell}, {count:,} token{'s' if count > 1 else ''}: {what}"

    def random(cell: str, count: int, what: str, rule: str = _L2, layers: int = 2) -> str:
        tokens = f"{count} token{'s' if count > 1 else ''}"
        return f"{cell}, {layers} layers, {tokens}, {rule}: {what}"

    converged = "converged, MSE < 0.01"
    deeper = [f"{cell}, 4 layers, 1 dialogue of 512 tokens: {converged}"
              for cell in ("sequential", "layerwise")]  # fmt: skip
    return (
        # token_scaling_experiment.md
        Claim(
            document=_SCALING,
            sentence="Even with a single token, Sequential fails to converge",
            experiment="untrained",
            rows=(random("sequential", 1, "converged"),),
            seed_value=0.0,
            holds=lambda rate: rate < 0.5,
            why="by L2 < 0.01",
        ),
        Claim(
            document=_SCALING,
            sentence="1 token, Layer-wise: converged at iteration 156",
            experiment="untrained",
            rows=(random("layerwise", 1, "converged"), random("layerwise", 1, "iterations")),
            seed_value=1.0,
            holds=lambda rate, taken: rate > 0.99 and abs(taken - 156) <= 30,
            why="one token is one draw of random weights: others do not converge",
        ),
        Claim(
            document=_SCALING,
            sentence="Context norm 15.9997",
            experiment="untrained",
            rows=(
                "sequential, 2 layers, after 200 iterations: norm",
                "layerwise, 2 layers, after 200 iterations: norm",
            ),
            seed_value=15.9997,
            holds=lambda a, b: abs(a - 15.9997) + abs(b - 15.9997) < 0.02,
            why="a layer norm of width 256 gives 16 to every vector",
        ),
        Claim(
            document=_SCALING,
            sentence="Sequential oscillates without converging",
            experiment="untrained",
            rows=("sequential, 2 layers, after 200 iterations: cosine of the last two moves",),
            holds=lambda turn: turn < 0.0,
            why="it crawls along one line: the cosine is near 1",
        ),
        Claim(
            document=_SCALING,
            sentence="10 tokens, Sequential: 0/10",
            experiment="untrained",
            rows=(random("sequential", 10, "converged"),),
            seed_value=0.0,
            holds=lambda rate: rate < 0.05,
            why="by L2 < 0.01",
        ),
        Claim(
            document=_SCALING,
            sentence="10 tokens, Layer-wise: 9/10, 138.9 iterations",
            experiment="untrained",
            rows=(random("layerwise", 10, "converged"), random("layerwise", 10, "iterations")),
            seed_value=0.9,
            holds=lambda rate, taken: rate > 0.75 and abs(taken - 138.9) <= 20,
            why="ours converge less often and later; other random weights",
        ),
        Claim(
            document=_SCALING,
            sentence="512 tokens, Sequential: 0/512",
            experiment="untrained",
            rows=(random("sequential", 512, "converged"),),
            seed_value=0.0,
            holds=lambda rate: rate < 0.01,
            why="by L2 < 0.01",
        ),
        Claim(
            document=_SCALING,
            sentence="512 tokens, Layer-wise: 388/512 (75.8 %), 147.7",
            experiment="untrained",
            rows=(random("layerwise", 512, "converged"), random("layerwise", 512, "iterations")),
            seed_value=0.758,
            holds=lambda rate, taken: abs(rate - 0.758) < 0.15 and abs(taken - 147.7) < 30,
            why="by L2 < 0.01, within the spread of random weights",
        ),
        Claim(
            document=_SCALING,
            sentence="Sequential is fundamentally incompatible with fixed-point convergence",
            experiment="scaling",
            rows=(trained("sequential", 100, converged),),
            holds=lambda rate: rate < 0.95,
            contradicted=True,
            why="two of the other documents take it back; training reaches 100 %",
        ),
        Claim(
            document=_SCALING,
            sentence="Layer-wise degrades as the number of tokens grows (100, 90, 75.8 %)",
            experiment="untrained",
            rows=(
                random("layerwise", 512, "converged"),
                random("layerwise", 10, "converged"),
                random("layerwise", 100, "converged"),
            ),
            holds=lambda many, few, some: many < some < few and few - many > 0.1,
            why="a context that starts at zero for each token cannot know how many there are; "
            "small counts scatter",
        ),
        Claim(
            document=_SCALING,
            sentence="Clipping has no effect on convergence",
            experiment="clipping",
            rows=(
                "layerwise, 512 tokens, with and without: difference of convergence",
                "layerwise, 512 tokens, with and without: largest difference of values",
            ),
            seed_value=0.0,
            holds=lambda rate, values: abs(rate) < 0.02,
            why="the rate stays; a few contexts grow one value beyond 10 and do change",
        ),
        Claim(
            document=_SCALING,
            sentence="Deep composition gives k > 1: Sequential expands",
            experiment="untrained",
            rows=("sequential, 2 layers: factor, 99th percentile",),
            holds=lambda factor: factor > 1.0,
            why="99th percentile of the ratios of pairs",
        ),
        Claim(
            document=_SCALING,
            sentence="Multiple small steps make Layer-wise a contraction",
            experiment="untrained",
            rows=("layerwise, 2 layers: factor, 99th percentile",),
            holds=lambda factor: factor < 1.0,
            why="99th percentile of the ratios of pairs",
        ),
        Claim(
            document=_SCALING,
            sentence="Longer warm-up (150) may help",
            experiment="untrained",
            rows=(
                random("layerwise", 512, "converged", "l2 < 0.01, warm-up 150"),
                random("layerwise", 512, "converged"),
            ),
            holds=lambda longer, shorter: longer > shorter + 0.02,
            why="a warm-up only delays the look: the rate stays, the iterations grow",
        ),
        Claim(
            document=_SCALING,
            sentence="A relaxed threshold (5e-2) may help",
            experiment="untrained",
            rows=(
                random("layerwise", 512, "converged", "l2 < 0.05, warm-up 100"),
                random("layerwise", 512, "converged"),
            ),
            holds=lambda relaxed, strict: relaxed > strict + 0.02,
            why="the same weights, an easier question",
        ),
        Claim(
            document=_SCALING,
            sentence="Do more layers (3) improve convergence?",
            experiment="untrained",
            rows=(
                random("layerwise", 512, "converged", layers=3),
                random("layerwise", 512, "converged"),
            ),
            holds=lambda three, two: three > two + 0.02,
            why="by L2 < 0.01, random weights",
        ),
        Claim(
            document=_SCALING,
            sentence="Goal: 95 % at 512 tokens, and with 4 layers",
            experiment="dialogue-512",
            rows=tuple(deeper),
            seed_value=0.95,
            holds=lambda *rates: min(rates) >= 0.95,
            why="reached by MSE < 0.01; the verdicts say what it is worth",
        ),
        # phase1_training_comparison.md
        Claim(
            document=_COMPARISON,
            sentence="1 token: Sequential 3 iterations",
            experiment="trained-small",
            rows=(trained("sequential", 1, "iterations"),),
            seed_value=3.0,
            holds=lambda taken: abs(taken - 3.0) <= 0.5,
            why="mean over seeds",
        ),
        Claim(
            document=_COMPARISON,
            sentence="1 token: Layer-wise 1 iteration",
            experiment="trained-small",
            rows=(trained("layerwise", 1, "iterations"),),
            seed_value=1.0,
            holds=lambda taken: abs(taken - 1.0) <= 0.3,
            contradicted=True,
            why="its own log says 2",
        ),
        Claim(
            document=_COMPARISON,
            sentence="10 tokens: both converge, 10/10",
            experiment="trained-small",
            rows=(trained("sequential", 10, converged), trained("layerwise", 10, converged)),
            seed_value=1.0,
            holds=lambda *rates: min(rates) == 1.0,
            why="by MSE < 0.01",
        ),
        Claim(
            document=_COMPARISON,
            sentence="10 tokens: final loss 0.0113 and 0.0199 at 100 %",
            experiment="trained-small",
            rows=(trained("sequential", 10, "final loss"), trained("layerwise", 10, "final loss")),
            seed_value=0.011289,
            holds=lambda *losses: min(losses) >= 0.01,
            contradicted=True,
            why="a mean cannot be over a threshold that every token is under",
        ),
        Claim(
            document=_COMPARISON,
            sentence="Sequential has lower final loss",
            experiment="trained-small",
            rows=(trained("sequential", 10, "final loss"), trained("layerwise", 10, "final loss")),
            holds=lambda ours, other: ours < other,
            why="at 10 tokens",
        ),
        Claim(
            document=_COMPARISON,
            sentence="Layer-wise converges faster (1 against 3)",
            experiment="scaling",
            rows=(
                trained("layerwise", 100, "iterations"),
                trained("sequential", 100, "iterations"),
            ),
            holds=lambda layerwise, sequential: layerwise < sequential,
            contradicted=True,
            why="true at 10 tokens, false from 50 on, by the documents' own table",
        ),
        Claim(
            document=_COMPARISON,
            sentence="Training is essential for Sequential: 0 % to 100 %",
            experiment="metrics",
            rows=(
                "sequential, untrained: converged by mse < 0.01",
                "sequential, trained: converged by l2 < 0.01",
            ),
            seed_value=0.0,
            holds=lambda untrained, trained: untrained < 0.5,
            why="0 % is L2, 100 % is MSE: by MSE random weights have 100 % already",
        ),
        Claim(
            document=_COMPARISON,
            sentence="Layer-wise works without training (75.8 %)",
            experiment="metrics",
            rows=("layerwise, untrained: converged by mse < 0.01",),
            holds=lambda rate: rate > 0.5,
            contradicted=True,
            why="true by both metrics, as for Sequential by MSE; another document gives 0 %",
        ),
        Claim(
            document=_COMPARISON,
            sentence="No warm-up is needed with trained weights",
            experiment="warmup",
            rows=(
                "sequential, 100 tokens, warm-up 100: norm of contexts",
                "sequential, 100 tokens, warm-up 0: norm of contexts",
            ),
            holds=lambda late, early: abs(late - early) < 0.1 * late,
            why="both converge by MSE, at different places: without it the search stops "
            "next to zero",
        ),
        Claim(
            document=_COMPARISON,
            sentence="Expected for 512 tokens: both 95 % and more",
            experiment="dialogue-512",
            rows=(
                f"sequential, 2 layers, 1 dialogue of 512 tokens: {converged}",
                f"layerwise, 2 layers, 1 dialogue of 512 tokens: {converged}",
            ),
            seed_value=0.95,
            holds=lambda *rates: min(rates) >= 0.95,
            why="by MSE < 0.01; the verdicts say what it is worth",
        ),
        Claim(
            document=_COMPARISON,
            sentence="10 samples, 3 epochs: 95 % and more",
            experiment="multi-sample",
            rows=(
                "sequential, 2 layers, 10 dialogues of 512 tokens: converged on held-out dialogues",
                "layerwise, 2 layers, 10 dialogues of 512 tokens: converged on held-out dialogues",
            ),
            seed_value=0.95,
            holds=lambda *rates: min(rates) >= 0.95,
            why="on dialogues that were not trained on; the verdicts say what it is worth",
        ),
        Claim(
            document=_COMPARISON,
            sentence="Training makes Sequential a contraction (k < 1)",
            experiment="trained-search",
            rows=("sequential trained by residual, 512 tokens, l2 < 0.01, warm-up 0: converged",),
            holds=lambda rate: rate > 0.95,
            why="by L2 < 0.01 its tokens still do not settle within 200 iterations",
        ),
        Claim(
            document=_COMPARISON,
            sentence="Max iterations 50 to 20 changes nothing",
            experiment="sweep",
            rows=(
                "sequential, 100 tokens, max iterations 20: iterations",
                "sequential, 100 tokens, as reported: iterations",
            ),
            holds=lambda ours, other: abs(ours - other) < 0.01,
            why="training takes a few iterations a token",
        ),
        Claim(
            document=_COMPARISON,
            sentence="A threshold of 0.005 gives tighter convergence",
            experiment="sweep",
            rows=(
                "layerwise, 100 tokens, threshold 0.005: final training loss",
                "layerwise, 100 tokens, as reported: final training loss",
            ),
            holds=lambda ours, other: ours < other,
            why="mean loss of the last epoch; the collapse stays",
        ),
        Claim(
            document=_COMPARISON,
            sentence="A learning rate of 5e-4 trains faster",
            experiment="sweep",
            rows=(
                "sequential, 100 tokens, learning rate 5e-4: final training loss",
                "sequential, 100 tokens, as reported: final training loss",
            ),
            holds=lambda ours, other: ours < other,
            why="it reaches the collapse sooner",
        ),
        # phase1_convergence_fixed.md
        Claim(
            document=_FIXED,
            sentence="100 % for both cells from 10 to 100 tokens",
            experiment="scaling",
            rows=tuple(
                trained(cell, count, converged)
                for cell in ("sequential", "layerwise")
                for count in (10, 50, 100)
            ),
            seed_value=1.0,
            holds=lambda *rates: min(rates) == 1.0,
            why="by MSE < 0.01",
        ),
        Claim(
            document=_FIXED,
            sentence="Sequential takes 3.0 iterations at 10, 1.0 at 100 tokens",
            experiment="scaling",
            rows=(
                trained("sequential", 100, "iterations"),
                trained("sequential", 10, "iterations"),
            ),
            seed_value=1.0,
            holds=lambda many, few: abs(many - 1.0) < 0.3 and abs(few - 3.0) < 0.3,
            why="it falls because the contexts shrink to zero, where a search begins",
        ),
        Claim(
            document=_FIXED,
            sentence="Layer-wise takes 2.0 iterations at 20 to 100 tokens",
            experiment="scaling",
            rows=(trained("layerwise", 100, "iterations"), trained("layerwise", 20, "iterations")),
            seed_value=2.0,
            holds=lambda *taken: max(abs(one - 2.0) for one in taken) < 0.3,
            why="the first step leaves zero, the second hardly moves",
        ),
        Claim(
            document=_FIXED,
            sentence="Layer-wise takes 1.0 iterations at 10 tokens",
            experiment="scaling",
            rows=(trained("layerwise", 10, "iterations"),),
            seed_value=1.0,
            holds=lambda taken: abs(taken - 1.0) < 0.3,
            contradicted=True,
            why="2.0 in the text of the same document",
        ),
        Claim(
            document=_FIXED,
            sentence="An L2 threshold of 0.01 is 256 times too strict",
            experiment="metrics",
            rows=("L2 of an MSE of 0.01 in 256 dimensions, over the L2 threshold 0.01",),
            seed_value=256.0,
            holds=lambda times: abs(times - 256.0) < 1.0,
            why="1.6 / 0.01 = 160 in distance, 25,600 in its square",
        ),
        Claim(
            document=_FIXED,
            sentence="If MSE = 0.01 then L2 = 1.6",
            experiment="metrics",
            rows=("L2 of an MSE of 0.01 in 256 dimensions, over the L2 threshold 0.01",),
            seed_value=160.0,
            holds=lambda times: abs(times - 160.0) < 1.0,
            why="arithmetic",
        ),
        Claim(
            document=_FIXED,
            sentence="Before the fix Layer-wise had 0 % too",
            experiment="untrained",
            rows=(random("layerwise", 10, "converged"),),
            seed_value=0.0,
            holds=lambda rate: rate < 0.05,
            contradicted=True,
            why="100, 90 and 75.8 % in another document",
        ),
        Claim(
            document=_FIXED,
            sentence="Layer-wise converges faster (2 against 1 to 3)",
            experiment="scaling",
            rows=(trained("layerwise", 50, "iterations"), trained("sequential", 50, "iterations")),
            holds=lambda layerwise, sequential: layerwise < sequential,
            contradicted=True,
            why="its own table says 1.2 and 1.0 for Sequential from 50 tokens on",
        ),
        Claim(
            document=_FIXED,
            sentence="Trained models do not degrade with length",
            experiment="scaling",
            rows=(
                trained("layerwise", 2000, "cosine of contexts"),
                trained("layerwise", 10, "cosine of contexts"),
            ),
            holds=lambda many, few: many < 0.9 or many <= few + 0.05,
            why="the rate stays at 100 %, but tokens become one vector",
        ),
        Claim(
            document=_FIXED,
            sentence="Stability without training: 0 % against 75.8 %",
            experiment="untrained",
            rows=(
                random("sequential", 512, "converged", _MSE),
                random("layerwise", 512, "converged", _MSE),
            ),
            holds=lambda sequential, layerwise: layerwise > sequential + 0.5,
            why="by the MSE of the same document both have 100 %",
        ),
        Claim(
            document=_FIXED,
            sentence="UltraChat, 512 tokens: both 95 % and more",
            experiment="dialogue-512",
            rows=(
                "sequential, 2 layers, 1 dialogue of 512 tokens: converged on held-out dialogues",
                "layerwise, 2 layers, 1 dialogue of 512 tokens: converged on held-out dialogues",
            ),
            seed_value=0.95,
            holds=lambda *rates: min(rates) >= 0.95,
            why="on dialogues that were not trained on",
        ),
        # analysis_sequential_failure.md
        Claim(
            document=_ANALYSIS,
            sentence="Repetition training makes Sequential converge",
            experiment="repetition",
            rows=(
                "sequential, phrases of 4 tokens, after training: settled after 64 cycles, "
                "MSE < 0.01",
                "sequential, phrases of 4 tokens, before training: settled after 64 cycles, "
                "MSE < 0.01",
            ),
            seed_value=1.0,
            holds=lambda after, before: after > 0.95 and before < 0.95,
            why="it settles, but random weights settle too by this measure",
        ),
        Claim(
            document=_ANALYSIS,
            sentence="Contexts of different phrases become orthogonal",
            experiment="repetition",
            rows=("sequential, phrases of 4 tokens, after training: cosine of different phrases",),
            seed_value=0.0,
            holds=lambda cosine: abs(cosine) < 0.1,
            why="mean cosine of 128 held-out phrases",
        ),
        Claim(
            document=_ANALYSIS,
            sentence="Sequential trained by repetition converges in a frozen search",
            experiment="trained-search",
            rows=(
                "sequential trained by repetition, 512 tokens, l2 < 0.01, warm-up 100: converged",
            ),
            holds=lambda rate: rate > 0.95,
            why="the documents' search, L2 < 0.01, cap 200",
        ),
        Claim(
            document=_ANALYSIS,
            sentence="Trained Layer-wise converges more often than 75.8 %",
            experiment="trained-search",
            rows=("layerwise trained by residual, 512 tokens, l2 < 0.01, warm-up 100: converged",),
            seed_value=0.758,
            holds=lambda rate: rate > 0.758,
            why="the documents' search, L2 < 0.01, cap 200",
        ),
        Claim(
            document=_ANALYSIS,
            sentence="Random forget gates are around 0.5",
            experiment="untrained",
            rows=("layerwise, 2 layers: mean forget gate",),
            seed_value=0.5,
            holds=lambda mean: abs(mean - 0.5) < 0.05,
            why="at the contexts",
        ),
        Claim(
            document=_ANALYSIS,
            sentence="Layer-wise is a contraction with random weights",
            experiment="untrained",
            rows=("layerwise, 2 layers: factor, 99th percentile",),
            holds=lambda factor: factor < 1.0,
            why="the two gates are no convex combination, and the layer norm stretches: some "
            "distances grow",
        ),
        Claim(
            document=_ANALYSIS,
            sentence="Random weights: Layer-wise 100, 90, 75.8 %",
            experiment="untrained",
            rows=(random("layerwise", 512, "converged"), random("layerwise", 1, "converged")),
            seed_value=0.758,
            holds=lambda many, one: many > 0.5 and one > 0.95,
            contradicted=True,
            why="0 % in phase1_convergence_fixed.md",
        ),
        # phase1_training_spec.md
        Claim(
            document=_SPECIFICATION,
            sentence="Success is a convergence rate of 95 %",
            experiment="untrained",
            rows=(
                random("sequential", 512, "converged", _MSE),
                random("layerwise", 512, "converged", _MSE),
            ),
            seed_value=0.95,
            holds=lambda *rates: max(rates) < 0.95,
            why="random weights have it: it tells nothing",
        ),
        Claim(
            document=_SPECIFICATION,
            sentence="Different tokens get different fixed points",
            experiment="scaling",
            rows=(
                trained("layerwise", 2000, "cosine of contexts"),
                trained("sequential", 2000, "norm of contexts"),
            ),
            holds=lambda cosine, norm: cosine < 0.5 and norm > 1.6,
            why="the loss is least where all of them are one, and zero is one",
        ),
        Claim(
            document=_SPECIFICATION,
            sentence="Untrained iteration of Sequential diverges",
            experiment="untrained",
            rows=(
                "sequential, 2 layers, after 200 iterations: L2 of the last move",
                "sequential, 2 layers, after 200 iterations: norm",
            ),
            holds=lambda move, norm: move > 0.1 * norm,
            why="the norm stays at 16 and the moves shrink to a crawl",
        ),
        Claim(
            document=_SPECIFICATION,
            sentence="5 epochs, 200 iterations, warm-up 10 reach convergence",
            experiment="sweep",
            rows=tuple(
                f"{cell}, 100 tokens, specification: 5 epochs, 200, warm-up 10: {converged}"
                for cell in ("sequential", "layerwise")
            ),
            seed_value=1.0,
            holds=lambda *rates: min(rates) >= 0.95,
            why="by MSE < 0.01",
        ),
        Claim(
            document=_SPECIFICATION,
            sentence="One loss after the inner iterations trains fixed points",
            experiment="sweep",
            rows=tuple(
                f"{cell}, 100 tokens, specification, loss once after 200 iterations: {converged}"
                for cell in ("sequential", "layerwise")
            ),
            seed_value=1.0,
            holds=lambda *rates: min(rates) >= 0.95,
            why="by MSE < 0.01",
        ),
        Claim(
            document=_SPECIFICATION,
            sentence="Sequential should improve significantly",
            experiment="trained-search",
            rows=("sequential trained by residual, 512 tokens, l2 < 0.01, warm-up 100: converged",),
            seed_value=0.0,
            holds=lambda rate: rate > 0.5,
            why="by the metric that gave the 0 %",
        ),
    )


CLAIMS = _claims()


def decide(results: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return a row a claim: our value, whether the claim holds, and why.

    Args:
        results: rows of every experiment that a claim rests on.
    """
    rows = []
    for claim in CLAIMS:
        found = {row.quantity: row for row in results[claim.experiment]}
        chosen = [found[quantity] for quantity in claim.rows]
        means = [row.ours_mean for row in chosen]
        holds = claim.holds(*means)
        word: Word = "contradicted" if claim.contradicted else "true" if holds else "false"
        rows.append(
            Row(
                quantity=f"{claim.document}: {claim.sentence}",
                seed_value=claim.seed_value,
                ours_mean=chosen[0].ours_mean,
                ours_std=chosen[0].ours_std,
                agrees=holds,
                verdict=word,
                why=f"{claim.why} [{claim.experiment}: {claim.rows[0]}]",
            )
        )
    return rows


NEEDED = tuple(dict.fromkeys(claim.experiment for claim in CLAIMS))
