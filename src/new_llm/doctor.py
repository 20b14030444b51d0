"""The doctor: are the fixed points real? Verdicts, of callables and matrices.

Knows no model class. Every threshold stands in `Thresholds`. Axes: `N` tokens, `C` context width.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .fixed_point import FixedPoint, measure
from .measurements import (
    Map,
    Portrait,
    draw,
    effective_rank,
    largest_singular_value,
    mean_cosine,
    pair_ratios,
    participation_ratio,
    relative_spread,
    spectral_radius,
    time_scales,
    upper_factor,
)
from .recurrence import Swept

_TINY = 1e-30
# rows whose Jacobians are taken: their mean moves in the third digit with more
_JACOBIANS = 256


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the verdicts rest on; changed here only, with the evidence in docs/LOG.md."""

    zero_rms: float = 0.1
    """`zero_collapse` below this root mean square of a delivered context, median of tokens."""
    identity_move: float = 0.10
    """`identity_map`: the second step from a random start moves less than this share ..."""
    identity_swap: float = 0.01
    """... and another token changes the result by less than this share."""
    attractor_cosine: float = 0.9
    """`global_attractor` above this mean cosine of contexts of different tokens."""
    attractor_spread: float = 0.05
    """`global_attractor` below this spread relative to the contexts' size."""
    factor: float = 1.0
    """`expanding` from this 99th percentile of the contraction factor on."""
    same_end: float = 0.01
    """Ends of different starts are the same within this relative distance."""
    same_end_share: float = 0.99
    """`multi_stable` where fewer tokens have one end."""
    residual: float = 1e-4
    """A context has settled at this relative change."""
    residual_share: float = 0.99
    """`not_converged` where fewer contexts have settled."""
    max_iterations: int = 1000
    """Iterations to settle in."""
    rank_share: float = 0.25
    """`low_rank` below this effective rank, as a share of C."""
    cosine: float = 0.5
    """`low_rank` above this mean cosine."""
    coupling: float = 0.1
    """`decoupled` below this mean largest singular value of d delta / d context."""
    amnesia_nats: float = 0.01
    """`amnesic` where forgetting all but the last token costs less."""
    gate_scan_sweeps: int = 32
    """Sweeps in which gate-scan must settle at 512 positions."""
    jacobi_sweeps: int = 128
    """Sweeps in which Jacobi must settle at 512 positions."""
    gate_metric_mse: float = 0.01
    """The seeds' own metric and threshold ..."""
    gate_rate: float = 0.95
    """... and the share of tokens that must meet it."""


THRESHOLDS = Thresholds()

ORDER = (
    "non_finite",
    "zero_collapse",
    "identity_map",
    "global_attractor",
    "expanding",
    "multi_stable",
    "not_converged",
    "low_rank",
    "decoupled",
    "amnesic",
)

ADVICE = {
    "non_finite": "lower the learning rates; the weights hold NaN or infinity",
    "zero_collapse": "every token settles at zero, which the seeds' loss rewards: "
    "train with --phase1.objective contractive, whose variance terms forbid it",
    "identity_map": "the cell returns what it is given: train with "
    "--phase1.objective contractive, whose hinge forbids it",
    "global_attractor": "all tokens settle near one point: train with --phase1.objective "
    "contractive, a seed cell from --model.initialisation orthogonal; where Phase 2 drew them "
    "together, raise --phase2.contractive or --phase2.min-steps",
    "expanding": "differences grow: lower --phase1.contraction-target, or use the convex cell",
    "multi_stable": "the end depends on the start: lower --phase1.contraction-target "
    "or --phase1.final-learning-rate, or raise --phase1.max-steps",
    "not_converged": "contexts still move: raise --phase1.visited-iterations or "
    "--phase1.max-steps, or lower --phase1.final-learning-rate",
    "low_rank": "contexts share few directions: use --model.initialisation orthogonal in a seed "
    "cell, or raise --model.hidden-width or --phase1.covariance-weight; where Phase 2 drew them "
    "together, raise --phase2.contractive",
    "decoupled": "the context hardly reads itself, so this is a linear recurrence: "
    "raise --model.coupling-limit",
    "amnesic": "the prediction uses one token only, so this is a bigram model: "
    "use --model.scope sequence, train longer",
    "healthy": "nothing to cure",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One number, what it is held against, and whether it passed (None: only reported)."""

    value: float | None
    """None where it could not be taken."""
    threshold: str | None = None
    """What is wanted, in words: `< 0`."""
    passed: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The doctor's answer for one scope."""

    scope: str
    """`token` or `sequence`."""
    verdict: str
    """`healthy`, or the worst of what is wrong."""
    verdicts: tuple[str, ...]
    """All that is wrong, the worst first."""
    measurements: dict[str, Measurement]
    """By name; of several blocks `block 1: NAME`, counted from 1."""
    advice: tuple[str, ...]
    """What to try, the likeliest first."""
    portraits: tuple[Portrait, ...] = ()
    """What a page shows, a block each; not a part of `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes null."""
        plain = asdict(self)
        del plain["portraits"]
        for row in plain["measurements"].values():
            if row["value"] is not None and not abs(row["value"]) < float("inf"):
                row["value"] = None
        return plain | {"verdicts": list(self.verdicts), "advice": list(self.advice)}


def worst(diagnoses: list[Diagnosis]) -> Diagnosis:
    """Return the diagnosis of a stack: that of its worst block, all blocks' numbers beside it."""
    if len(diagnoses) == 1:
        return diagnoses[0]
    held = {name for one in diagnoses for name in one.verdicts}
    merged = {
        f"block {k + 1}: {name}": row
        for k, one in enumerate(diagnoses)
        for name, row in one.measurements.items()
    }
    portraits = tuple(portrait for one in diagnoses for portrait in one.portraits)
    return _conclude(diagnoses[0].scope, held - {"healthy"}, merged, portraits)


def _conclude(
    scope: str,
    held: set[str],
    measurements: dict[str, Measurement],
    portraits: tuple[Portrait, ...],
) -> Diagnosis:
    verdicts = tuple(name for name in ORDER if name in held) or ("healthy",)
    return Diagnosis(
        scope=scope,
        verdict=verdicts[0],
        verdicts=verdicts,
        measurements=measurements,
        advice=tuple(ADVICE[name] for name in verdicts),
        portraits=portraits,
    )


class _Sheet:
    """The measurements so far, and the names that those speak for which did not pass."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.rules = thresholds
        self.rows: dict[str, Measurement] = {}
        self.held: set[str] = set()

    def note(self, name: str, value: float) -> None:
        self.rows[name] = Measurement(value=value)

    def judge(self, name: str, value: float, wanted: str, passed: bool, verdict: str) -> None:
        self.rows[name] = Measurement(value=value, threshold=wanted, passed=passed)
        if not passed:
            self.held.add(verdict)

    def judge_size(self, contexts: Tensor) -> None:
        # the median: a third of the tokens with contexts would hide that the others have none
        rms, least = contexts.square().mean(dim=-1).sqrt().median().item(), self.rules.zero_rms
        self.judge("rms", rms, f">= {least}", rms >= least, "zero_collapse")

    def judge_spread(self, cosine: float, spread: float) -> None:
        rules = self.rules
        one_point = cosine > rules.attractor_cosine or spread < rules.attractor_spread
        wanted = f">= {rules.attractor_spread}, and cosine <= {rules.attractor_cosine}"
        self.judge("relative_spread", spread, wanted, not one_point, "global_attractor")

    def judge_rank(self, parts: list[Tensor]) -> None:
        width = parts[0].shape[-1]
        rank, least = min(effective_rank(part) for part in parts), self.rules.rank_share * width
        self.judge("effective_rank", rank, f">= {least:g} of {width}", rank >= least, "low_rank")
        self.note("participation_ratio", min(participation_ratio(part) for part in parts))

    def judge_coupling(self, singular: Tensor) -> None:
        value, least = singular.mean().item(), self.rules.coupling
        self.judge("coupling", value, f">= {least}", value >= least, "decoupled")

    def note_gates(self, forget: Tensor) -> None:
        """Describe the forget gates at the contexts, `[N, gates, C]`."""
        self.note("forget_mean", forget.mean().item())
        self.note("forget_above_0.99", (forget > 0.99).float().mean().item())
        self.note("timescale_median", time_scales(forget).median().item())

    def conclude(self, scope: str, portrait: Portrait | None = None) -> Diagnosis:
        portraits = () if portrait is None else (portrait,)
        return _conclude(scope, self.held, self.rows, portraits)


@dataclass(frozen=True, kw_only=True)
class TokenSubject:
    """One block's cell on a set of tokens, as the doctor sees it."""

    delivered: Tensor
    """Contexts as the run's own stop rule delivers them, `[N, C]`."""
    apply: Map
    """The map that is iterated, `(context [M, C], rows [M])` to `[M, C]`."""
    settle: Callable[[Tensor], FixedPoint]
    """Iterates `apply` from contexts `[N, C]` to the doctor's own tolerance."""
    convex: bool
    """Whether the cell separates its gate, so that its coupling can be judged."""
    forget: Map | None = None
    """Forget gates, `(context [M, C], rows [M])` to `[M, gates, C]`, where the cell has some."""
    proved: Mapping[str, float] = field(default_factory=dict)
    """Bounds of the factor that hold for any tokens, by name, where the cell has some."""
    population: int | None = None
    """How many tokens the N were drawn from; none where the N are all there are."""


@torch.no_grad()
def diagnose_tokens(subject: TokenSubject, thresholds: Thresholds = THRESHOLDS) -> Diagnosis:
    """Judge the fixed points of single tokens; rules in `Thresholds` and docs/doctor.md."""
    delivered, apply = subject.delivered, subject.apply
    rules, all_rows = thresholds, _rows(delivered)
    sheet = _Sheet(rules)
    sheet.note("tokens", len(delivered))
    sheet.note("tokens_drawn_from", subject.population or len(delivered))
    if not torch.isfinite(delivered).all():
        return non_finite("token")
    settled = subject.settle(torch.zeros_like(delivered))
    contexts = settled.context
    seed_change = measure(apply(delivered, all_rows), delivered, "mse")
    sheet.note("mse_of_delivered", seed_change.mean().item())
    sheet.note("iterations", settled.mean_iterations)
    sheet.note("norm", delivered.norm(dim=-1).mean().item())
    sheet.judge_size(delivered)

    generator = torch.Generator().manual_seed(1)
    starts = [torch.randn(delivered.shape, generator=generator).to(delivered) for _ in range(3)]
    # the first step may only bring a start into range, as a layer norm does: sqrt(1.5 / C) of it
    first = apply(starts[0], all_rows)
    moved = apply(first, all_rows)
    swapped = apply(first, all_rows.roll(1))
    move = _relative(moved, first)
    swap = _relative(swapped, moved)
    sheet.note("token_sensitivity", swap)
    is_identity = move < rules.identity_move and swap < rules.identity_swap
    wanted = f">= {rules.identity_move}, or token_sensitivity >= {rules.identity_swap}"
    sheet.judge("random_start_move", move, wanted, not is_identity, "identity_map")

    cosine = max(mean_cosine(delivered), mean_cosine(contexts))
    spread = min(relative_spread(delivered), relative_spread(contexts))
    sheet.judge_spread(cosine, spread)

    ratios = pair_ratios(apply, contexts)
    factor = upper_factor(ratios)
    sheet.judge("factor_p99", factor, f"< {rules.factor}", factor < rules.factor, "expanding")
    sheet.note("factor_median", ratios.median().item())
    for name, bound in subject.proved.items():
        sheet.note(name, bound)
    singular = largest_singular_value(apply, contexts[:_JACOBIANS])
    sheet.note("jacobian_norm", singular.mean().item())
    sheet.note("spectral_radius", spectral_radius(apply, contexts[:_JACOBIANS]).mean().item())

    ends = [subject.settle(start).context for start in starts]
    size = contexts.norm(dim=-1).clamp(min=_TINY)
    apart = torch.stack([(end - contexts).norm(dim=-1) / size for end in ends]).amax(dim=0)
    one_end = (apart <= rules.same_end).float().mean().item()
    wanted = f">= {rules.same_end_share}"
    sheet.judge("one_end_share", one_end, wanted, one_end >= rules.same_end_share, "multi_stable")

    share = (settled.change <= rules.residual).float().mean().item()
    wanted = f">= {rules.residual_share}"
    sheet.judge("settled_share", share, wanted, share >= rules.residual_share, "not_converged")
    residual = settled.change.median().item()
    sheet.note("residual_median", residual)
    sheet.note("distance_estimate", residual / (1.0 - min(factor, 1.0 - 1e-6)))

    sheet.judge_rank([delivered, contexts])
    sheet.judge("cosine", cosine, f"<= {rules.cosine}", cosine <= rules.cosine, "low_rank")
    if subject.convex:
        sheet.judge_coupling(singular)
    forget = None if subject.forget is None else subject.forget(contexts, all_rows)
    if forget is not None:
        sheet.note_gates(forget)
    return sheet.conclude("token", draw(contexts, settled.curve, ratios, forget))


@dataclass(frozen=True, kw_only=True)
class SequenceSubject:
    """One block's cell carried through held-out dialogues, as the doctor sees it."""

    contexts: Tensor
    """Contexts of real positions, `[N, C]`."""
    sweeps: Swept
    """The parallel solve from zero, with the doctor's own cap and tolerance."""
    residual: float
    """Largest relative change of a real position after it."""
    distance: float
    """Largest relative distance of what it reached to `contexts`, which a scan has found."""
    lyapunov: float
    """Mean log growth of a small difference, nats a token."""
    decay_length: float
    """Tokens until a difference of starts has shrunk to 1/e; infinite where it never did."""
    apply: Map
    """The map of the cell's coupling, `delta` for ConvexCell, at rows of `before`."""
    before: Tensor
    """Contexts that were read, `[M, C]`."""
    convex: bool
    forget: Map | None = None
    """Forget gates at rows of `before`, `[M, gates, C]`."""
    read_back: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """What a linear probe reads of the token so many positions back, and what guessing gets."""


@torch.no_grad()
def diagnose_sequence(subject: SequenceSubject, thresholds: Thresholds = THRESHOLDS) -> Diagnosis:
    """Judge the contexts of carried text; `amnesic` is added by `with_memory`."""
    rules, contexts = thresholds, subject.contexts
    sheet = _Sheet(rules)
    if not torch.isfinite(contexts).all():
        return non_finite("sequence")
    sheet.judge_size(contexts)
    cosine = mean_cosine(contexts)
    sheet.judge_spread(cosine, relative_spread(contexts))
    sheet.judge("lyapunov", subject.lyapunov, "< 0", subject.lyapunov < 0.0, "expanding")
    most = rules.gate_scan_sweeps if subject.convex else rules.jacobi_sweeps
    sweeps = subject.sweeps.num_sweeps
    settled = subject.residual <= rules.residual and sweeps <= most
    sheet.judge("sweeps", float(sweeps), f"<= {most}", settled, "not_converged")
    sheet.note("sweep_residual", subject.residual)
    sheet.note("sweep_distance", subject.distance)
    sheet.note("decay_length", subject.decay_length)
    sheet.judge_rank([contexts])
    sheet.note("cosine", cosine)
    ratios = pair_ratios(subject.apply, subject.before)
    sheet.note("factor_p99", upper_factor(ratios))
    singular = largest_singular_value(subject.apply, subject.before[:_JACOBIANS])
    sheet.note("jacobian_norm", singular.mean().item())
    if subject.convex:
        sheet.judge_coupling(singular)
    forget = (
        None if subject.forget is None else subject.forget(subject.before, _rows(subject.before))
    )
    if forget is not None:
        sheet.note_gates(forget)
    for back, (read, guessed) in subject.read_back.items():
        sheet.note(f"read_{back}_back", read)
        sheet.note(f"guess_{back}_back", guessed)
    portrait = draw(contexts, subject.sweeps.curve[:, :3], ratios, forget)
    return sheet.conclude("sequence", portrait)


def non_finite(scope: str) -> Diagnosis:
    """Return the diagnosis of contexts that became NaN or infinite, of which nothing is measured.

    >>> non_finite("token").verdict
    'non_finite'
    """
    sheet = _Sheet(THRESHOLDS)
    sheet.judge("finite", 0.0, "1", False, "non_finite")
    return sheet.conclude(scope)


def with_memory(
    diagnosis: Diagnosis,
    *,
    gain_nats: float,
    context_length: float | None,
    trained: bool,
    thresholds: Thresholds = THRESHOLDS,
) -> Diagnosis:
    """Add what the carried context is worth; `amnesic` is judged only after Phase 2.

    Args:
        diagnosis: of the sequence scope.
        gain_nats: loss with the context zeroed one token back, less the loss with it.
        context_length: tokens of context after which more gains less than the threshold; None
            where texts are too short to tell.
        trained: whether Phase 2 has been.
        thresholds: the rules.
    """
    rows, held = dict(diagnosis.measurements), set(diagnosis.verdicts) - {"healthy"}
    remembers = gain_nats >= thresholds.amnesia_nats
    rows["memory_gain_nats"] = Measurement(
        value=gain_nats,
        threshold=f">= {thresholds.amnesia_nats}" if trained else None,
        passed=remembers if trained else None,
    )
    rows["effective_context_length"] = Measurement(value=context_length)
    if trained and not remembers:
        held.add("amnesic")
    return _conclude(diagnosis.scope, held, rows, diagnosis.portraits)


def _rows(contexts: Tensor) -> Tensor:
    return torch.arange(len(contexts), device=contexts.device)


def _relative(moved: Tensor, start: Tensor) -> float:
    return (measure(moved, start, "l2") / start.norm(dim=-1).clamp(min=_TINY)).mean().item()
