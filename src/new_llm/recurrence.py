"""Sequence scope, all positions at once: `c_t = f(c_{t-1}, x_t)` solved as one fixed point.

A Jacobi sweep applies the cell to every position with the contexts of the last sweep. Gate-scan
treats the gate of ConvexCell exactly and keeps only `delta` from the last sweep, so that memory
costs no sweeps and only coupling does. `carry` picks an engine, checks what it reached, and falls
back to the exact `scan` rather than differ from it in silence.
Axes: `B` sequences, `T` positions, `C` context width, `P` width of a projected token. Inside, time
comes first: a part of a text is then one piece of memory.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cell import BOUND, ContextCell, ConvexCell, Weights
from .errors import NonFiniteError
from .fixed_point import measure
from .scan import activated, convex_gradients, delta_share, scan_projected

Engine = Literal["scan", "gate-scan", "jacobi"]

# the cap on sweeps that a contractive model should never reach, and how far a fall-back goes on
MAX_SWEEPS = 12
MORE_SWEEPS = 3
SMALLEST_CHUNK = 16
# positions times sequences that are solved at once: bounds memory, and fills the caches
CHUNK_ROWS = {"cpu": 2048, "cuda": 65536}
# the first steps of a linear scan are taken in blocks of this many positions
_BLOCK = 16
# from this many numbers a position, blocks save no time on a CPU
_WIDE_POSITION = 8192
# single positions may settle more slowly than the largest change of all: none is trusted with less
_LEAST_RATE = 0.25
# ratio of changes that is assumed while there is only one
_ASSUMED_RATE = 0.5
# ratios that a rate is taken from: with two, a hard place that slows now and then broke its bound
_RATIOS = 4
# ratio from which more sweeps would be as slow as the scan
_HOPELESS = 0.95
# changes are relative to what changes, or to these shares of the largest of a part
_SMALLEST, _SMALLEST_GRADIENT = 1e-3, 0.1
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """What sweeps over a text reached; running out of sweeps is a result."""

    contexts: Tensor
    """`[B, T, C]`, detached."""
    history: Tensor
    """Relative change of each position in each sweep, `[K, B, T]`."""
    curve: Tensor
    """10 %, 50 %, 90 % quantile and maximum over positions after each sweep, `[K, 4]`."""
    converged: bool
    """Whether every position changed by less than the tolerance."""

    @property
    def num_sweeps(self) -> int:
        """Applications of the cell to every position that had not come to rest."""
        return len(self.curve)

    @property
    def residual(self) -> Tensor:
        """Relative change of each position in its last sweep, `[B, T]`."""
        return self.history[-1]


@dataclass(kw_only=True, slots=True)
class Sweeps:
    """What the sweeps over all parts of a text came to; that of a gradient fills in `backward`."""

    num_sweeps: int = 0
    """The most of any part."""
    residual: float = 0.0
    """Largest relative change of a position in the last sweep of its part."""
    rate: float = 0.0
    """Largest of the last few ratios of changes when a part ended, in the sup-norm; 0 where none
    took a second sweep. Of a gradient it is taken over two sweeps where single ratios are 0.95."""
    distance: float = 0.0
    """Relative distance to the true recurrence, the largest of any position: a bound with
    `Carried.proved`, else an estimate of what each part adds, as is always that of a gradient."""
    work: int = 0
    """Positions computed, those of every sweep counted; `T` for a scan."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """How often: `more sweeps`, `smaller chunks`, `scan`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """Contexts of a text, and how far they can be trusted."""

    contexts: Tensor
    """After each position, `[B, T, C]`, differentiable."""
    engine: Engine
    """What was asked for; `sweeps.fallbacks` says where it was left."""
    sweeps: Sweeps
    """Of the forward pass."""
    adjoint: Sweeps
    """Of the gradient, once `backward` was called."""
    proved: bool
    """Whether `sweeps.distance` is a bound by `q_inf < 1`, or an estimate by the measured rate;
    says nothing of the gradient."""

    @property
    def fell_back(self) -> bool:
        """Whether a part was cut smaller or scanned."""
        return bool(self.sweeps.fallbacks["smaller chunks"] or self.sweeps.fallbacks["scan"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Microseconds of a device, forward, at `C = H = 256`; `bench engines` measures them."""

    position: float
    """Of a scan, for each position, however many sequences."""
    row: float
    """Of a scan, for each position of each sequence."""
    swept_row: float
    """Of a sweep, for each position of each sequence."""
    sweep: float
    """Of a sweep over a chunk, however long."""


COSTS = {
    "cpu": Costs(position=21.0, row=5.3, swept_row=2.6, sweep=300.0),
    "cuda": Costs(position=45.0, row=0.02, swept_row=0.02, sweep=600.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An engine, and why it."""

    engine: Engine
    why: str


def choose(
    cell: ContextCell, *, device: str, batch: int, length: int, num_sweeps: int | None
) -> Choice:
    """Pick scan or gate-scan by what each would cost.

    Args:
        cell: the update.
        device: type of the device.
        batch: sequences side by side.
        length: positions of a text.
        num_sweeps: measured sweeps of gate-scan on this cell; None where it was not measured.

    >>> cell = ConvexCell(256, 256, 256)
    >>> choose(cell, device="cpu", batch=64, length=512, num_sweeps=7).engine
    'scan'
    >>> choose(cell, device="cuda", batch=1, length=16384, num_sweeps=7).engine
    'gate-scan'
    """
    if not cell.separates_gate:
        return Choice(engine="scan", why="the gate of this cell is not separate")
    if not isinstance(cell, ConvexCell):
        return Choice(engine="scan", why="what gate-scan costs was measured for ConvexCell only")
    if num_sweeps is None or num_sweeps >= MAX_SWEEPS:
        return Choice(engine="scan", why=f"gate-scan took {num_sweeps} sweeps or more")
    costs = COSTS.get(device, COSTS["cuda"])
    scale = cell.context_width * cell.hidden_width / 65536
    scanned = length * (costs.position + scale * costs.row * batch)
    chunks = math.ceil(length / max(SMALLEST_CHUNK, CHUNK_ROWS.get(device, 65536) // batch))
    swept = num_sweeps * (chunks * costs.sweep + scale * costs.swept_row * batch * length)
    engine: Engine = "gate-scan" if swept < scanned else "scan"
    return Choice(
        engine=engine,
        why=f"{num_sweeps} sweeps of {batch} x {length} positions on {device}: about "
        f"{swept / 1e3:.1f} ms, scan {scanned / 1e3:.1f} ms",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Some positions of a text, time-major, as sweeps need them."""

    cell: ContextCell
    weights: Weights
    projected: Tensor
    """`[T, B, P]`."""
    keep: Tensor | None
    """0 where a dialogue begins, else 1, `[T, B, 1]`."""
    real: Tensor | None
    """False at padding, `[T, B, 1]`."""
    forget: Tensor | None
    """Gate that is treated exactly, 1 at padding, `[T, B, C]`; None for Jacobi."""

    @staticmethod
    def make(
        cell: ContextCell,
        weights: Weights,
        projected: Tensor,
        keep: Tensor | None,
        real: Tensor | None,
        *,
        gate_exact: bool,
    ) -> "_Part":
        """Take the gate out of the projected tokens, where it is to be treated exactly."""
        forget = None
        if gate_exact:
            # the token alone decides it, so any context will do
            forget = cell.forget_gates(projected, projected, weights)[..., 0, :]
            if real is not None:
                forget = forget.masked_fill(~real, 1.0)
        return _Part(
            cell=cell, weights=weights, projected=projected, keep=keep, real=real, forget=forget
        )

    def __len__(self) -> int:
        return len(self.projected)

    def __getitem__(self, part: slice) -> "_Part":
        return _Part(
            cell=self.cell,
            weights=self.weights,
            projected=self.projected[part],
            keep=None if self.keep is None else self.keep[part],
            real=None if self.real is None else self.real[part],
            forget=None if self.forget is None else self.forget[part],
        )

    def before(self, contexts: Tensor, initial: Tensor) -> Tensor:
        """Return the context that each position reads, `[T, B, C]`."""
        shifted = torch.cat([initial[None], contexts[:-1]])
        return shifted if self.keep is None else shifted.mul_(self.keep)

    def decay(self) -> Tensor | None:
        """Return what the gate keeps of the context before, `[T, B, C]`."""
        if self.forget is None or self.keep is None:
            return self.forget
        return self.forget * self.keep

    def sweep(self, contexts: Tensor, initial: Tensor) -> Tensor:
        """Apply the cell to every position once."""
        before = self.before(contexts, initial)
        decay = self.decay()
        if self.forget is None or decay is None:
            return self.update(before)
        delta = self.cell.search_map(before, self.projected, self.weights)
        return linear_scan(decay, delta.sub_(delta * self.forget), initial)

    def update(self, before: Tensor) -> Tensor:
        """Return the contexts that follow given ones."""
        updated = self.cell.update(before, self.projected, self.weights)
        return updated if self.real is None else torch.where(self.real, updated, before)

    def scan(self, initial: Tensor) -> Tensor:
        """Return the contexts position by position."""
        return scan_projected(
            self.cell,
            self.projected.transpose(0, 1),
            self.weights,
            initial,
            starts=None if self.keep is None else self.keep[..., 0].T == 0,
            real=None if self.real is None else self.real[..., 0].T,
        ).transpose(0, 1)


def carry(
    cell: ContextCell,
    x: Tensor,
    initial: Tensor,
    *,
    engine: Engine,
    starts: Tensor | None = None,
    real: Tensor | None = None,
    weights: Weights | None = None,
    guess: Tensor | None = None,
    tolerance: float = 1e-5,
    max_sweeps: int = MAX_SWEEPS,
    chunk: int | None = None,
) -> Carried:
    """Carry the context through a text by an engine, and say what it reached.

    Sweeps go over one chunk after another, each from the context that the one before ended in, so
    that memory is bounded by the chunk. A chunk rests when the distance to where its sweeps lead,
    `residual * rate / (1 - rate)`, is under the tolerance at every position. One that does not gets
    more sweeps, then smaller chunks, then the scan; all of that stands in the result. What a chunk
    inherits from the one before is added to the distance where `q_inf < 1` bounds it, so that this
    may exceed the tolerance.

    Args:
        cell: the update.
        x: token embeddings, `[B, T, E]`.
        initial: context before the first position, `[B, C]`.
        engine: `scan`; `gate-scan`, where the gate is separate; `jacobi`, for any cell.
        starts: where a dialogue begins, `[B, T]` bool; the context before it counts as zero.
        real: False at padding, `[B, T]` bool; padding holds the context.
        weights: `cell.weights()`, where they were taken already.
        guess: contexts to start from, `[B, T, C]`; None is zeros.
        tolerance: largest relative distance that the sweeps over a chunk may leave.
        max_sweeps: cap on sweeps, before more are a fall-back.
        chunk: positions that are solved at once; None is what the device likes.

    Raises:
        ValueError: gate-scan was asked of a cell whose gate is not separate.
        NonFiniteError: contexts became NaN or infinite.

    Source: parallel solves of nonlinear recurrences, DEER (arXiv:2309.12252) and quasi-DEER
    (arXiv:2407.19115), ParaRNN (arXiv:2510.21450); here the linear part is the cell's own gate. The
    gradient is the adjoint recurrence, solved the same way from the end.

    >>> cell = ConvexCell(4, 3, 5).eval()
    >>> found = carry(cell, torch.ones(1, 9, 3), torch.zeros(1, 4), engine="gate-scan")
    >>> found.contexts.shape, found.fell_back
    (torch.Size([1, 9, 4]), False)
    """
    _require_separate_gate(cell, engine)
    projected = cell.project(x).to(initial.dtype)
    sweeps, adjoint = Sweeps(), Sweeps()
    with torch.autocast(x.device.type, enabled=False):
        weights = cell.weights() if weights is None else weights
        if engine == "scan":
            contexts = scan_projected(cell, projected, weights, initial, starts=starts, real=real)
            sweeps.work = x.shape[1]
            return Carried(
                contexts=contexts, engine=engine, sweeps=sweeps, adjoint=adjoint, proved=True
            )
        bound = proved_rate(cell, weights) if engine == "gate-scan" else None
        rows = CHUNK_ROWS.get(x.device.type, CHUNK_ROWS["cuda"])
        settings = _Settings(
            tolerance=tolerance,
            max_sweeps=max_sweeps,
            chunk=chunk or max(SMALLEST_CHUNK, rows // len(x)),
            bound=bound,
        )
        contexts: Any = _Swept.apply(
            cell, engine == "gate-scan", settings, sweeps, adjoint,
            None if starts is None else (~starts.T[..., None]).to(initial.dtype),
            None if real is None else real.T[..., None],
            None if guess is None else guess.transpose(0, 1),
            initial, projected.transpose(0, 1).contiguous(), *weights,
        )  # fmt: skip
    return Carried(
        contexts=contexts.transpose(0, 1),
        engine=engine,
        sweeps=sweeps,
        adjoint=adjoint,
        proved=bound is not None,
    )


def _require_separate_gate(cell: ContextCell, engine: Engine) -> None:
    if engine == "gate-scan" and not cell.separates_gate:
        raise ValueError(
            f"gate-scan needs a separate gate, which {type(cell).__name__} has not; "
            "use the engine scan or jacobi"
        )


@torch.no_grad()
def proved_rate(cell: ContextCell, weights: Weights) -> float | None:
    """Return `q_inf` of weights in use, where it proves that gate-scan contracts; else None.

    >>> cell = ConvexCell(4, 3, 5, coupling_limit=0.0)
    >>> proved_rate(cell, cell.weights())
    0.0
    """
    if not isinstance(cell, ConvexCell):
        return None
    q_inf = cell.sup_coupling(weights).item()
    return q_inf if q_inf < 1.0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    tolerance: float
    max_sweeps: int
    chunk: int
    bound: float | None
    """A rate in the sup-norm that is proved."""

    def ranges(self, length: int) -> list[slice]:
        """Return the chunks of a text."""
        return [
            slice(begin, min(begin + self.chunk, length)) for begin in range(0, length, self.chunk)
        ]


class _Swept(torch.autograd.Function):
    """Contexts by sweeps, and the adjoint recurrence by sweeps from the end."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        (cell, gate_exact, settings, sweeps, adjoint, keep, real, guess, initial, projected,
         *weights) = inputs  # fmt: skip
        text = _Part.make(cell, tuple(weights), projected, keep, real, gate_exact=gate_exact)
        contexts = projected.new_empty(*projected.shape[:2], cell.context_width)
        carried, error = initial, 0.0
        for part in settings.ranges(len(text)):
            start = None if guess is None else guess[part]
            contexts[part], error = _solve(text[part], carried, start, settings, sweeps, error)
            carried = contexts[part][-1]
        ctx.save_for_backward(keep, real, initial, projected, contexts, *weights)
        ctx.settings = cell, gate_exact, settings, adjoint
        return contexts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        keep, real, initial, projected, contexts, *weights = ctx.saved_tensors
        cell, gate_exact, settings, adjoint = ctx.settings
        text = _Part.make(cell, tuple(weights), projected, keep, real, gate_exact=gate_exact)
        sums = [torch.zeros_like(weight) for weight in weights]
        to_projected = torch.empty_like(projected)
        carried = torch.zeros_like(initial)
        for part in reversed(settings.ranges(len(text))):
            start = initial if part.start == 0 else contexts[part.start - 1]
            grad = grads[0][part].clone()
            grad[-1] += carried
            carried, to_projected[part], *shares = _adjoint(
                text[part], contexts[part], start, grad, settings, adjoint
            )
            for total, share in zip(sums, shares, strict=True):
                total += share
        return (None,) * 8 + (carried, to_projected, *sums)


class _Progress:
    """What successive sweeps over a part say of the distance to their end."""

    def __init__(
        self,
        settings: _Settings,
        *,
        error: float = 0.0,
        floor: float = _SMALLEST,
        in_turn: bool = False,
    ) -> None:
        self.settings = settings
        self.error = error
        """The most that any number is wrong by, where a rate is proved: at first of the context
        that the part goes on from, then of all of its positions."""
        self.floor = floor
        self.in_turn = in_turn
        """Whether changes may be large and small in turn, so that two say more than one."""
        self.num_sweeps = 0
        self.work = 0
        self.residual = float("inf")
        self._largest: list[float] = []
        self._before: Tensor | None = None
        self._estimate = 0.0
        self._rests = False

    @property
    def rate(self) -> float:
        """The largest of the last ratios of largest changes; after one sweep only a guess."""
        if self.num_sweeps < 2:
            return _ASSUMED_RATE
        rate = self._ratio(1)
        # over two sweeps once both kinds of change were seen to shrink, the large and the small
        if self.in_turn and rate >= _HOPELESS and self.num_sweeps > 3:
            rate = math.sqrt(self._ratio(2))
        return rate

    def _ratio(self, apart: int) -> float:
        """Return the largest of the last ratios of changes that many sweeps apart."""
        last = self._largest[-apart - _RATIOS :]
        pairs = zip(last[:-apart], last[apart:], strict=True)
        return max(now / before if before > 0.0 else 0.0 for before, now in pairs)

    @property
    def factor(self) -> float:
        """What a change, or the sum of two in turn, is multiplied by for the distance left."""
        rate = max(self.rate, _LEAST_RATE) if self.settings.bound is None else self.settings.bound
        if self.in_turn:
            rate = rate * rate
        return rate / (1.0 - rate) if rate < 1.0 else float("inf")

    def rest(self, relative: Tensor) -> int:
        """Return how many leading positions have come to rest, and remember how near they are.

        A position whose past rests has read it: it is as near as its own change says.
        """
        change = relative
        if self.in_turn:
            before = relative / _ASSUMED_RATE if self._before is None else self._before
            # what a sweep leaves as it is, with all that it reads, no other sweep will change
            relative = torch.where(change > 0.0, change + before, change)
        limit = self.settings.tolerance / max(self.factor, _TINY)
        moving = (relative >= limit) if limit > 0.0 else (relative > 0.0)
        count = int((moving.cumsum(dim=0) == 0).sum())
        self._before = change[count:]
        if count == 0:
            return 0
        largest = relative[:count].amax().item()
        if largest > 0.0:
            self._estimate = max(self._estimate, largest * self.factor)
        if self.settings.bound is not None and not self._rests:
            # delta passes on `bound` of the error that the last sweep left, and the gate averages
            # that with what it keeps: errors of many chunks come to no more than `own / (1 -
            # bound)`, and more sweeps over those that do not rest yet make no error larger
            own = self.factor * self._largest[-1]
            self.error = max(self.error, self.settings.bound * self.error + own)
        self._rests = True
        return count

    def distance(self, solved: Tensor) -> float:
        """Return the relative distance of solved positions to the recurrence, the largest."""
        if self.settings.bound is None or len(solved) == 0:
            return self._estimate
        smallest = _sizes(solved, self.floor).amin().item()
        return self.error * math.sqrt(solved.shape[-1]) / smallest

    def look(self, updated: Tensor, old: Tensor, what: str) -> Tensor:
        """Take note of a sweep; return the relative change of each position, `[T]`."""
        difference = updated - old
        width = updated.shape[-1]
        size = _sizes(updated, self.floor)
        largest = difference.abs().amax()
        if self.settings.bound is None:
            change = torch.linalg.vector_norm(difference, dim=-1)
        else:
            # the norm that the proof is in, as a bound of the other
            change = largest * math.sqrt(width)
        relative = (change / size).amax(dim=-1)
        self.num_sweeps += 1
        self.work += len(updated)
        now, self.residual = torch.stack([largest, relative.amax()]).tolist()
        if not (math.isfinite(now) and math.isfinite(self.residual)):
            raise NonFiniteError(
                f"{what} must stay finite, got NaN or infinity in sweep {self.num_sweeps}; "
                "lower the learning rate or check the weights"
            )
        self._largest.append(now)
        return relative

    def note(self, sweeps: Sweeps) -> None:
        """Add what was reached to the record of a whole text."""
        sweeps.num_sweeps = max(sweeps.num_sweeps, self.num_sweeps)
        if self.num_sweeps > 1:
            sweeps.rate = max(sweeps.rate, self.rate)
        sweeps.work += self.work


def _sizes(values: Tensor, floor: float) -> Tensor:
    """Return what changes are relative to, `[T, B, C]` to `[T, B]`."""
    size = torch.linalg.vector_norm(values, dim=-1)
    return size.maximum(floor * size.amax()).clamp(min=_TINY)


def _solve(
    part: _Part,
    initial: Tensor,
    guess: Tensor | None,
    settings: _Settings,
    sweeps: Sweeps,
    error: float,
    *,
    whole: bool = True,
) -> tuple[Tensor, float]:
    """Return the contexts of a part, by whatever it takes, and the most a number is wrong by.

    `error` is the same of `initial`. Both are bounds where a rate is proved, and nothing elsewhere.
    """
    if guess is None:
        contexts = initial.new_zeros(*part.projected.shape[:2], initial.shape[-1])
    else:
        contexts = guess.clone()
    progress, rested = _Progress(settings, error=error), 0
    cap = settings.max_sweeps
    while rested < len(part):
        if progress.num_sweeps == cap:
            if not whole or cap > settings.max_sweeps or progress.rate >= _HOPELESS:
                break
            cap *= MORE_SWEEPS
            sweeps.fallbacks["more sweeps"] += 1
        start = initial if rested == 0 else contexts[rested - 1]
        left = part[rested:]
        updated = left.sweep(contexts[rested:], start)
        relative = progress.look(updated, contexts[rested:], "contexts")
        contexts[rested:] = updated
        rested += progress.rest(relative)
    progress.note(sweeps)
    if rested == len(part):
        sweeps.residual = max(sweeps.residual, progress.residual)
        sweeps.distance = max(sweeps.distance, progress.distance(contexts))
        return contexts, progress.error
    start = initial if rested == 0 else contexts[rested - 1]
    left = part[rested:]
    smaller = max(SMALLEST_CHUNK, len(part) // 8)
    if whole and progress.rate < _HOPELESS and smaller < len(left):
        sweeps.fallbacks["smaller chunks"] += 1
        sweeps.distance = max(sweeps.distance, progress.distance(contexts[:rested]))
        error = progress.error
        for begin in range(0, len(left), smaller):
            piece = slice(rested + begin, min(rested + begin + smaller, len(part)))
            contexts[piece], error = _solve(
                part[piece], start, contexts[piece], settings, sweeps, error, whole=False
            )
            start = contexts[piece][-1]
        return contexts, error
    sweeps.fallbacks["scan"] += 1
    sweeps.work += len(left)
    contexts[rested:] = left.scan(start)
    # a scan is exact, but goes on from where sweeps ended
    sweeps.distance = max(sweeps.distance, progress.distance(contexts))
    return contexts, progress.error


def _adjoint(
    part: _Part,
    contexts: Tensor,
    initial: Tensor,
    grad: Tensor,
    settings: _Settings,
    sweeps: Sweeps,
) -> tuple[Tensor, ...]:
    """Return gradients of the first context, the projected tokens and the weights of a part.

    `lambda_t = g_t + J_{t+1}^T lambda_{t+1}` by sweeps from the end; with the gate exact that is
    `lambda_t = forget_{t+1} lambda_{t+1} + g_t + D_{t+1}^T (1 - forget_{t+1}) lambda_{t+1}`, `D`
    the Jacobian of `delta`. Its distance is an estimate whatever is proved of the contexts: `q_inf`
    bounds the sum of all that sweeps change in the source, and a slow gate makes little of it much.
    So changes of one sweep may be small and those of the next large, where slow and fast
    coordinates read each other: two are judged together.
    """
    length = len(part)
    by_hand = part.forget is not None and isinstance(part.cell, ConvexCell)
    pull = (_GatePull if by_hand else _Pull)(part, part.before(contexts, initial))
    decay = part.decay()
    if decay is not None:
        # what each position's gradient keeps of the next one's
        decay = torch.cat([decay[1:], torch.zeros_like(decay[:1])])
    total = torch.zeros_like(grad)
    # what no sweep changes any more lies at the end
    moving, cap = length, settings.max_sweeps
    progress = _Progress(replace(settings, bound=None), floor=_SMALLEST_GRADIENT, in_turn=True)
    while moving > 0:
        if progress.num_sweeps == cap:
            if cap > settings.max_sweeps or progress.rate >= _HOPELESS:
                break
            cap *= MORE_SWEEPS
            sweeps.fallbacks["more sweeps"] += 1
        source = grad[:moving].clone()
        reached = min(moving + 1, length)
        source[: reached - 1] += pull.through(total[1:reached], slice(1, reached))
        if decay is not None:
            rests = total[moving] if moving < length else torch.zeros_like(grad[0])
            source = linear_scan(decay[:moving].flip(0), source.flip(0), rests).flip(0)
        relative = progress.look(source, total[:moving], "gradients")
        total[:moving] = source
        moving -= progress.rest(relative.flip(0))
    progress.note(sweeps)
    sweeps.distance = max(sweeps.distance, progress.distance(total[moving:]))
    if moving == 0:
        sweeps.residual = max(sweeps.residual, progress.residual)
    else:
        sweeps.fallbacks["scan"] += 1
        sweeps.work += moving
        for t in range(moving - 1, -1, -1):
            total[t] = grad[t]
            if t + 1 < length:
                total[t] += pull.through(total[t + 1 : t + 2], slice(t + 1, t + 2))[0]
                if decay is not None:
                    total[t] += decay[t] * total[t + 1]
    return pull.gradients(total)


class _GatePull:
    """What a gradient passes on through `delta` of ConvexCell at known contexts."""

    def __init__(self, part: _Part, before: Tensor) -> None:
        assert isinstance(part.cell, ConvexCell) and part.forget is not None
        self.part, self.before, self.forget = part, before, part.forget
        from_context, to_delta, bias = part.weights
        token_part, self.share, _ = part.cell.parts(part.projected)
        self.read = before @ from_context.T
        self.hidden, self.slope = activated(
            torch.addcmul(token_part, self.share, self.read), part.cell.activation
        )
        # of `W_c c` rather than of the preactivation
        self.read_slope = self.slope * self.share
        self.delta = F.linear(self.hidden, to_delta, bias).clamp_(-BOUND, BOUND)
        self.reach = delta_share(self.forget, self.delta)

    def through(self, total: Tensor, part: slice) -> Tensor:
        """Return what the contexts before some positions get by way of `delta`."""
        from_context, to_delta, _ = self.part.weights
        pulled = ((total * self.reach[part]) @ to_delta).mul_(self.read_slope[part]) @ from_context
        return pulled if self.part.keep is None else pulled.mul_(self.part.keep[part])

    def gradients(self, total: Tensor) -> tuple[Tensor, ...]:
        """Return those of the first context, the projected tokens and the weights."""
        from_context, to_delta, _ = self.part.weights
        to_bias = total * self.reach
        to_hidden = to_bias @ to_delta
        to_token, to_read = to_hidden * self.slope, to_hidden * self.read_slope
        first = to_read[0] @ from_context + self.forget[0] * total[0]
        if self.part.keep is not None:
            first = first * self.part.keep[0]
        to_forget, *to_weights = convex_gradients(
            total, to_bias, to_read, before=self.before, hidden=self.hidden, delta=self.delta
        )
        if self.part.real is not None:
            to_forget = to_forget.masked_fill(~self.part.real, 0.0)
        to_projected = torch.cat([to_token, to_token * self.read, to_forget], dim=-1)
        return first, to_projected, *to_weights


class _Pull:
    """What a gradient passes on through one update of any cell, by its graph."""

    def __init__(self, part: _Part, before: Tensor) -> None:
        self.keep = part.keep
        with torch.enable_grad():
            self.before = before.requires_grad_()
            self.projected = part.projected.detach().requires_grad_()
            self.weights = tuple(weight.detach().requires_grad_() for weight in part.weights)
            traced = replace(part, projected=self.projected, weights=self.weights)
            self.updated = traced.update(self.before)
            # what a separate gate passes on is exact already, and not for sweeps to find
            self.moved = self.updated
            if part.forget is not None:
                self.moved = self.updated - part.forget * self.before

    def through(self, total: Tensor, part: slice) -> Tensor:
        """Return what the contexts before some positions get."""
        whole = torch.zeros_like(self.moved)
        whole[part] = total
        (pulled,) = torch.autograd.grad(self.moved, self.before, whole, retain_graph=True)
        return pulled[part] if self.keep is None else pulled[part] * self.keep[part]

    def gradients(self, total: Tensor) -> tuple[Tensor, ...]:
        """Return those of the first context, the projected tokens and the weights."""
        before, projected, *weights = torch.autograd.grad(
            self.updated,
            [self.before, self.projected, *self.weights],
            total,
            allow_unused=True,
            materialize_grads=True,
        )
        first = before[0] if self.keep is None else before[0] * self.keep[0]
        return first, projected, *weights


@torch.no_grad()
def sweep(
    cell: ContextCell,
    x: Tensor,
    initial: Tensor,
    *,
    starts: Tensor | None = None,
    real: Tensor | None = None,
    tolerance: float = 1e-5,
    max_sweeps: int = 128,
    gate_exact: bool | None = None,
) -> Swept:
    """Sweep over a whole text until no position moves, and keep the way there.

    For looking: `carry` is for using. A Jacobi sweep is exact after T sweeps for any cell.

    Args:
        cell: the update.
        x: token embeddings, `[B, T, E]`.
        initial: context before the first position, `[B, C]`.
        starts: where a dialogue begins, `[B, T]` bool.
        real: False at padding, `[B, T]` bool.
        tolerance: relative change below which a position rests.
        max_sweeps: cap on sweeps.
        gate_exact: gate-scan instead of Jacobi; None is gate-scan wherever the cell allows it.

    Raises:
        ValueError: `gate_exact` for a cell whose gate is not separate.
        NonFiniteError: contexts became NaN or infinite.

    >>> cell = ConvexCell(4, 3, 5).eval()
    >>> x, zero = torch.ones(1, 9, 3), torch.zeros(1, 4)
    >>> expected = carry(cell, x, zero, engine="scan").contexts
    >>> torch.allclose(sweep(cell, x, zero).contexts, expected, atol=1e-4)
    True
    """
    if gate_exact is None:
        gate_exact = cell.separates_gate
    _require_separate_gate(cell, "gate-scan" if gate_exact else "jacobi")
    part = _Part.make(
        cell,
        cell.weights(),
        cell.project(x).transpose(0, 1).contiguous(),
        None if starts is None else (~starts.T[..., None]).to(x.dtype),
        None if real is None else real.T[..., None],
        gate_exact=gate_exact,
    )
    contexts = initial.new_zeros(*part.projected.shape[:2], cell.context_width)
    curve: list[Tensor] = []
    history: list[Tensor] = []
    while len(curve) < max_sweeps:
        updated = part.sweep(contexts, initial)
        residual = measure(updated, contexts, "residual")
        if not torch.isfinite(residual).all():
            raise NonFiniteError(
                f"contexts must stay finite, got NaN or infinity in sweep {len(curve) + 1} of "
                f"{max_sweeps}; lower the learning rate or check the weights"
            )
        contexts = updated
        history.append(residual.T)
        ordered = residual.flatten().sort().values
        last = len(ordered) - 1
        curve.append(torch.stack([ordered[round(share * last)] for share in (0.1, 0.5, 0.9, 1.0)]))
        if curve[-1][-1] < tolerance:
            break
    return Swept(
        contexts=contexts.transpose(0, 1),
        history=torch.stack(history),
        curve=torch.stack(curve).cpu(),
        converged=bool(curve[-1][-1] < tolerance),
    )


def linear_scan(decay: Tensor, source: Tensor, initial: Tensor) -> Tensor:
    """Return `c_t = decay_t * c_{t-1} + source_t` for all `t`, time-major.

    All `[T, ...]`, `initial` `[...]`. Blocks of positions are run side by side, then their ends are
    joined by the same function: about two products and sums a position and `16 log_16 T` steps. No
    logarithm or division, so gates of exactly 0 and 1 are exact.

    Source: Blelloch 1990, "Prefix sums and their applications".

    >>> half = torch.full((3, 1), 0.5)
    >>> linear_scan(half, torch.ones(3, 1), torch.zeros(1)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    length = len(source)
    wide = initial.numel() >= _WIDE_POSITION and not source.is_cuda
    if wide or length <= 2 * _BLOCK:
        found = torch.empty_like(source)
        context = initial
        for decay_t, source_t, found_t in zip(
            decay.unbind(), source.unbind(), found.unbind(), strict=True
        ):
            context = torch.addcmul(source_t, decay_t, context, out=found_t)
        return found
    even = length - length % _BLOCK
    kept = decay[:even].unflatten(0, (-1, _BLOCK)).transpose(0, 1).contiguous()
    found = source[:even].unflatten(0, (-1, _BLOCK)).transpose(0, 1).contiguous()
    kept_rows, rows = kept.unbind(), found.unbind()
    for i in range(1, _BLOCK):
        rows[i].addcmul_(kept_rows[i], rows[i - 1])
        kept_rows[i].mul_(kept_rows[i - 1])
    ends = linear_scan(kept_rows[-1], rows[-1], initial)
    found.addcmul_(kept, torch.cat([initial[None], ends[:-1]]))
    joined = found.transpose(0, 1).flatten(0, 1)
    if even == length:
        return joined
    return torch.cat([joined, linear_scan(decay[even:], source[even:], joined[-1])])
