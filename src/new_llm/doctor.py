"""The doctor: are the fixed points real? Measurements and verdicts, of callables and matrices.

Knows no model class. Every threshold stands in `Thresholds`. Axes: `N` tokens, `C` context width.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fixed_point import FixedPoint, measure

Map = Callable[[Tensor, Tensor], Tensor]

_TINY = 1e-30
# far above the rounding of float32 contexts, far below their size
_SMALL_DISTANCE = 1e-2
# rows of a matrix whose singular values are taken; more change the entropy in the third digit
_LARGEST_SPECTRUM = 4096


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the verdicts rest on; changed here only, with the evidence in docs/LOG.md."""

    zero_rms: float = 0.1
    """`zero_collapse` below this root mean square of the delivered contexts."""
    identity_move: float = 0.10
    """`identity_map`: one step from a random start moves less than this share ..."""
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
    "contractive; where Phase 2 drew them together, raise --phase2.min-steps",
    "expanding": "differences grow: lower --phase1.contraction-target, or use the convex cell",
    "multi_stable": "the end depends on the start: lower --phase1.contraction-target "
    "or raise --phase1.max-steps",
    "not_converged": "contexts still move: raise --phase1.max-steps "
    "or lower --phase1.contraction-target",
    "low_rank": "contexts share few directions: raise --phase1.covariance-weight "
    "or --phase1.spread-steps; where Phase 2 drew them together, raise --phase2.min-steps",
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
    threshold: str | None = None
    passed: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The doctor's answer for one scope."""

    scope: str
    verdict: str
    verdicts: tuple[str, ...]
    measurements: dict[str, Measurement]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite becomes null."""
        plain = asdict(self)
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
    return _conclude(diagnoses[0].scope, held - {"healthy"}, merged)


def _conclude(scope: str, held: set[str], measurements: dict[str, Measurement]) -> Diagnosis:
    verdicts = tuple(name for name in ORDER if name in held) or ("healthy",)
    return Diagnosis(
        scope=scope,
        verdict=verdicts[0],
        verdicts=verdicts,
        measurements=measurements,
        advice=tuple(ADVICE[name] for name in verdicts),
    )


def effective_rank(contexts: Tensor) -> float:
    """Return `exp(entropy)` of the normalised singular values of the centred `[N, C]`.

    Source: Roy and Vetterli 2007, "The effective rank".

    >>> effective_rank(torch.cat([torch.eye(4), -torch.eye(4)]))
    4.0
    """
    rows = contexts[:: max(1, len(contexts) // _LARGEST_SPECTRUM)].double()
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    share = values / values.sum().clamp(min=_TINY)
    entropy = -(share * share.clamp(min=_TINY).log()).sum()
    return round(entropy.exp().item(), 6)


def mean_cosine(contexts: Tensor) -> float:
    """Return the mean cosine of all pairs of different rows of `[N, C]`.

    >>> mean_cosine(torch.ones(5, 3))
    1.0
    """
    units = F.normalize(contexts.double(), dim=-1)
    count = len(units)
    alike = units.sum(dim=0).square().sum() - units.square().sum()
    return round((alike / max(count * (count - 1), 1)).item(), 9)


def relative_spread(contexts: Tensor) -> float:
    """Return the root mean square distance from the mean, relative to that from zero.

    >>> relative_spread(torch.ones(5, 3))
    0.0
    """
    wide = contexts.double()
    size = wide.square().mean().sqrt().clamp(min=_TINY)
    return ((wide - wide.mean(dim=0)).square().mean().sqrt() / size).item()


def largest_singular_value(apply: Map, contexts: Tensor, *, iterations: int = 24) -> Tensor:
    """Return the largest singular value of each row's Jacobian by power iteration, `[N]`.

    `apply(context, rows)` must treat rows alone. One JVP and one VJP an iteration.

    >>> largest_singular_value(lambda c, rows: c * torch.tensor([3.0, 1.0]), torch.zeros(2, 2))
    tensor([3., 3.])
    """
    rows = torch.arange(len(contexts), device=contexts.device)

    def at_rows(context: Tensor) -> Tensor:
        return apply(context, rows)

    generator = torch.Generator().manual_seed(0)
    tangent = torch.randn(contexts.shape, generator=generator).to(contexts)
    tangent = F.normalize(tangent, dim=-1)
    value = contexts.new_zeros(len(contexts))
    pull = torch.func.vjp(at_rows, contexts)[1]
    for _ in range(iterations):
        pushed = torch.func.jvp(at_rows, (contexts,), (tangent,))[1]
        value = pushed.norm(dim=-1)
        (tangent,) = pull(pushed)
        tangent = F.normalize(tangent, dim=-1)
    return value


def pair_ratios(apply: Map, contexts: Tensor, *, seed: int = 0) -> Tensor:
    """Return how much one application shrinks distances of context pairs, `[3N]`.

    Pairs are near (1 % away from the given contexts), far (given and unit normal) and random.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(contexts.shape, generator=generator).to(contexts)

    size = contexts.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-3)
    first, second = normal(), normal()
    rows = torch.arange(len(contexts), device=contexts.device)
    pairs = [(contexts, contexts + 0.01 * size * normal()), (contexts, first), (first, second)]
    ratios = []
    for left, right in pairs:
        moved = (apply(left, rows) - apply(right, rows)).norm(dim=-1)
        ratios.append(moved / (left - right).norm(dim=-1).clamp(min=_TINY))
    return torch.cat(ratios)


@torch.no_grad()
def lyapunov_exponent(
    step: Callable[[Tensor, int], Tensor], initial: Tensor, counted: Tensor
) -> tuple[float, Tensor]:
    """Return the mean log growth of a small difference a position, and the decay of a large one.

    Two runs a small distance apart are carried along each text and drawn back to that distance at
    each position. The second value is the distance, relative to its start, of a run that began at a
    unit normal context, after each position, `[T]` (median over texts).

    Args:
        step: context `[M, C]` of texts, repeated in order, and position to the next context.
        initial: `[B, C]`.
        counted: positions whose growth counts, `[B, T]` bool.

    Source: Benettin et al. 1980, "Lyapunov characteristic exponents".

    >>> halve = lambda context, t: 0.5 * context
    >>> exponent, decay = lyapunov_exponent(halve, torch.zeros(1, 4), torch.ones(1, 3).bool())
    >>> round(exponent, 4), [round(x, 3) for x in decay.tolist()]
    (-0.6931, [0.5, 0.25, 0.125])
    """
    generator = torch.Generator().manual_seed(0)
    tangent = torch.randn(initial.shape, generator=generator).to(initial)
    tangent = _SMALL_DISTANCE * F.normalize(tangent, dim=-1)
    other = torch.randn(initial.shape, generator=generator).to(initial)
    first = (other - initial).norm(dim=-1).clamp(min=_TINY)
    context, growth, decay = initial, initial.new_zeros(()), []
    for t in range(counted.shape[1]):
        context, near, other = step(torch.cat([context, context + tangent, other]), t).chunk(3)
        tangent = near - context
        distance = tangent.norm(dim=-1).clamp(min=_TINY)
        growth = growth + (distance / _SMALL_DISTANCE).log()[counted[:, t]].sum()
        tangent = tangent * (_SMALL_DISTANCE / distance)[:, None]
        decay.append(((other - context).norm(dim=-1) / first).median())
    return growth.item() / max(int(counted.sum()), 1), torch.stack(decay)


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


@torch.no_grad()
def diagnose_tokens(subject: TokenSubject, thresholds: Thresholds = THRESHOLDS) -> Diagnosis:
    """Judge the fixed points of single tokens; rules in `Thresholds` and docs/doctor.md."""
    delivered = subject.delivered
    rules, width = thresholds, delivered.shape[-1]
    rows: dict[str, Measurement] = {}
    held: set[str] = set()

    def judge(name: str, value: float, wanted: str, passed: bool, verdict: str) -> None:
        rows[name] = Measurement(value=value, threshold=wanted, passed=passed)
        if not passed:
            held.add(verdict)

    if not torch.isfinite(delivered).all():
        rows["finite"] = Measurement(value=0.0, threshold="1", passed=False)
        return _conclude("token", {"non_finite"}, rows)
    settled = subject.settle(torch.zeros_like(delivered))
    contexts = settled.context
    seed_change = measure(subject.apply(delivered, _rows(delivered)), delivered, "mse")
    rows["mse_of_delivered"] = Measurement(value=seed_change.mean().item())
    rows["iterations"] = Measurement(value=settled.mean_iterations)
    rows["norm"] = Measurement(value=delivered.norm(dim=-1).mean().item())
    rms = delivered.square().mean().sqrt().item()
    judge("rms", rms, f">= {rules.zero_rms}", rms >= rules.zero_rms, "zero_collapse")

    generator = torch.Generator().manual_seed(1)
    starts = [torch.randn(delivered.shape, generator=generator).to(delivered) for _ in range(3)]
    moved = subject.apply(starts[0], _rows(delivered))
    swapped = subject.apply(starts[0], _rows(delivered).roll(1))
    move = _relative(moved, starts[0])
    swap = _relative(swapped, moved)
    rows["token_sensitivity"] = Measurement(value=swap)
    is_identity = move < rules.identity_move and swap < rules.identity_swap
    wanted = f">= {rules.identity_move}, or token_sensitivity >= {rules.identity_swap}"
    judge("random_start_move", move, wanted, not is_identity, "identity_map")

    cosine = max(mean_cosine(delivered), mean_cosine(contexts))
    spread = min(relative_spread(delivered), relative_spread(contexts))
    one_point = cosine > rules.attractor_cosine or spread < rules.attractor_spread
    wanted = f">= {rules.attractor_spread}, and cosine <= {rules.attractor_cosine}"
    judge("relative_spread", spread, wanted, not one_point, "global_attractor")

    ratios = pair_ratios(subject.apply, contexts)
    factor = ratios.sort().values[int(0.99 * (len(ratios) - 1))].item()
    judge("factor_p99", factor, f"< {rules.factor}", factor < rules.factor, "expanding")
    rows["factor_median"] = Measurement(value=ratios.median().item())

    ends = [subject.settle(start).context for start in starts]
    size = contexts.norm(dim=-1).clamp(min=_TINY)
    apart = torch.stack([(end - contexts).norm(dim=-1) / size for end in ends]).amax(dim=0)
    one_end = (apart <= rules.same_end).float().mean().item()
    wanted = f">= {rules.same_end_share}"
    judge("one_end_share", one_end, wanted, one_end >= rules.same_end_share, "multi_stable")

    share = (settled.change <= rules.residual).float().mean().item()
    wanted = f">= {rules.residual_share}"
    judge("settled_share", share, wanted, share >= rules.residual_share, "not_converged")
    rows["residual_median"] = Measurement(value=settled.change.median().item())
    rate = min(factor, 1.0 - 1e-6)
    estimate = settled.change.median().item() / (1.0 - rate)
    rows["distance_estimate"] = Measurement(value=estimate)

    _judge_rank(judge, [delivered, contexts], cosine, width, rules)
    if subject.convex:
        _judge_coupling(judge, subject.apply, contexts, rules)
    return _conclude("token", held, rows)


@dataclass(frozen=True, kw_only=True)
class SequenceSubject:
    """One block's cell carried through held-out dialogues, as the doctor sees it."""

    contexts: Tensor
    """Contexts of real positions, `[N, C]`."""
    num_sweeps: int
    """Sweeps that the parallel solve took."""
    residual: float
    """Largest relative change after them."""
    lyapunov: float
    """Mean log growth of a small difference, nats a token."""
    decay_length: float
    """Tokens until a difference of starts has shrunk to 1/e; infinite where it never did."""
    apply: Map
    """For ConvexCell `delta` at rows of `before`."""
    before: Tensor
    """Contexts that were read, `[M, C]`."""
    convex: bool


@torch.no_grad()
def diagnose_sequence(subject: SequenceSubject, thresholds: Thresholds = THRESHOLDS) -> Diagnosis:
    """Judge the contexts of carried text; `amnesic` is added by `with_memory`."""
    rules, width = thresholds, subject.contexts.shape[-1]
    rows: dict[str, Measurement] = {}
    held: set[str] = set()

    def judge(name: str, value: float, wanted: str, passed: bool, verdict: str) -> None:
        rows[name] = Measurement(value=value, threshold=wanted, passed=passed)
        if not passed:
            held.add(verdict)

    if not torch.isfinite(subject.contexts).all():
        rows["finite"] = Measurement(value=0.0, threshold="1", passed=False)
        return _conclude("sequence", {"non_finite"}, rows)
    rms = subject.contexts.square().mean().sqrt().item()
    judge("rms", rms, f">= {rules.zero_rms}", rms >= rules.zero_rms, "zero_collapse")
    cosine, spread = mean_cosine(subject.contexts), relative_spread(subject.contexts)
    one_point = cosine > rules.attractor_cosine or spread < rules.attractor_spread
    wanted = f">= {rules.attractor_spread}, and cosine <= {rules.attractor_cosine}"
    judge("relative_spread", spread, wanted, not one_point, "global_attractor")
    judge("lyapunov", subject.lyapunov, "< 0", subject.lyapunov < 0.0, "expanding")
    most = rules.gate_scan_sweeps if subject.convex else rules.jacobi_sweeps
    settled = subject.residual <= rules.residual and subject.num_sweeps <= most
    judge("sweeps", float(subject.num_sweeps), f"<= {most}", settled, "not_converged")
    rows["sweep_residual"] = Measurement(value=subject.residual)
    rows["decay_length"] = Measurement(value=subject.decay_length)
    _judge_rank(judge, [subject.contexts], None, width, rules)
    rows["cosine"] = Measurement(value=cosine)
    if subject.convex:
        _judge_coupling(judge, subject.apply, subject.before, rules)
    return _conclude("sequence", held, rows)


def with_memory(
    diagnosis: Diagnosis,
    *,
    gain_nats: float,
    context_length: float,
    trained: bool,
    thresholds: Thresholds = THRESHOLDS,
) -> Diagnosis:
    """Add what the carried context is worth; `amnesic` is judged only after Phase 2.

    Args:
        diagnosis: of the sequence scope.
        gain_nats: loss with the context zeroed one token back, less the loss with it.
        context_length: tokens of context after which more gains less than the threshold.
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
    return _conclude(diagnosis.scope, held, rows)


def _judge_rank(
    judge: Callable[[str, float, str, bool, str], None],
    parts: list[Tensor],
    cosine: float | None,
    width: int,
    rules: Thresholds,
) -> None:
    rank = min(effective_rank(part) for part in parts)
    least = rules.rank_share * width
    judge("effective_rank", rank, f">= {least:g} of {width}", rank >= least, "low_rank")
    if cosine is not None:
        judge("cosine", cosine, f"<= {rules.cosine}", cosine <= rules.cosine, "low_rank")


def _judge_coupling(
    judge: Callable[[str, float, str, bool, str], None],
    apply: Map,
    contexts: Tensor,
    rules: Thresholds,
) -> None:
    value = largest_singular_value(apply, contexts[:256]).mean().item()
    judge("coupling", value, f">= {rules.coupling}", value >= rules.coupling, "decoupled")


def _rows(contexts: Tensor) -> Tensor:
    return torch.arange(len(contexts), device=contexts.device)


def _relative(moved: Tensor, start: Tensor) -> float:
    return (measure(moved, start, "l2") / start.norm(dim=-1).clamp(min=_TINY)).mean().item()
