"""Token scope: apply the update of every token to its own context until the context settles.

The only module that knows how a fixed point is found. It holds no parameters and reads no
config. Axes: `N` tokens (each distinct id once), `C` context width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .errors import NonFiniteError

Metric = Literal["residual", "mse", "l2"]
Update = Callable[[Tensor, Tensor], Tensor]

ANDERSON_MEMORY = 5
# keeps the small least-squares problem of Anderson solvable when differences become parallel
ANDERSON_RIDGE = 1e-8
# tokens that are solved side by side: on a CPU all that an iteration touches stays in the caches
PART_TOKENS = {"cpu": 1024, "cuda": 131072}
# tokens that the quantiles of a curve are taken over, about
_CURVE_TOKENS = 8192
_TINY = 1e-30
# iterations that a rate is taken over, and what it is taken for after a single one
_RATE_SPAN = 8
_ASSUMED_RATE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPoint:
    """Where a search stopped; running out of iterations is a result, not an exception."""

    context: Tensor
    """Contexts as delivered, `[N, C]`, detached."""
    converged: Tensor
    """Whether the change fell under the tolerance, `[N]`."""
    num_iterations: Tensor
    """Evaluations up to and including the first under the tolerance, or the cap, `[N]` int64."""
    change: Tensor
    """The last change, in the metric asked for, `[N]`."""
    rate: Tensor
    """Factor that the last changes shrank by in an iteration, their geometric mean, `[N]`."""
    curve: Tensor
    """10 %, 50 % and 90 % quantile over tokens of the change after each iteration, `[K, 3]`."""
    damping: float = 0.0
    """Share of the old context that each iteration kept."""

    @property
    def distance(self) -> Tensor:
        """Estimate of what is left to the fixed point, `[N]`, in the metric asked for.

        `change * r / (1 - r)`, `r` the factor that the undamped update shrinks distances by: `rate`
        itself, or with damping `d` `(rate - d) / (1 - d)` or `(-rate - d) / (1 - d)`, whichever
        leaves more. Infinite where changes do not shrink. Of `anderson`, whose steps are not those
        of the update, it says only where changes would lead that went on shrinking as they did.
        """
        rate, kept = self.rate, self.damping
        # both `abs(r) / (1 - r)`, multiplied out
        same = self.change * (rate - kept).abs() / (1.0 - rate)
        opposite = self.change * (rate + kept) / (1.0 + rate)
        return torch.where(rate < 1.0, same.maximum(opposite), torch.inf)

    def replaced(self, rows: Tensor, later: "FixedPoint") -> "FixedPoint":
        """Return this with tokens `rows` as a second search left them, iterations added."""
        given = {
            name: getattr(self, name).index_copy(
                0, rows, getattr(later, name).to(getattr(self, name).dtype)
            )
            for name in ("context", "converged", "change", "rate")
        }
        counts = self.num_iterations.index_add(0, rows, later.num_iterations)
        return replace(self, **given, num_iterations=counts)

    @property
    def convergence_rate(self) -> float:
        """Share of tokens that converged."""
        return self.converged.float().mean().item()

    @property
    def mean_iterations(self) -> float:
        """Mean iterations over all tokens; those that did not converge count as the cap."""
        return self.num_iterations.float().mean().item()

    @property
    def mean_iterations_converged(self) -> float | None:
        """Mean iterations over the tokens that converged; None where there are none."""
        chosen = self.num_iterations[self.converged]
        return chosen.float().mean().item() if len(chosen) else None


def measure(updated: Tensor, context: Tensor, metric: Metric) -> Tensor:
    """Return the change of each context, `[N, C]` twice to `[N]`.

    `residual` is `norm(updated - context) / norm(updated)`, `mse` the mean square, `l2` the norm.

    >>> measure(torch.ones(1, 4), torch.zeros(1, 4), "mse")
    tensor([1.])
    >>> measure(torch.ones(1, 4), torch.zeros(1, 4), "l2")
    tensor([2.])
    """
    # in float32 at least: bfloat16 squares drop the digits the tolerance is about
    wide = torch.promote_types(updated.dtype, torch.float32)
    updated, context = updated.to(wide), context.to(wide)
    distance = (updated - context).norm(dim=-1)
    if metric == "l2":
        return distance
    if metric == "mse":
        return distance.square() / updated.shape[-1]
    # 0 / 0 is a context that rests at zero: no change at all
    return distance / updated.norm(dim=-1).clamp(min=_TINY)


@torch.no_grad()
def solve(
    update: Update,
    initial: Tensor,
    *,
    metric: Metric = "residual",
    tolerance: float = 1e-5,
    max_iterations: int = 200,
    warmup: int = 0,
    damping: float = 0.0,
    method: Literal["picard", "anderson"] = "picard",
) -> FixedPoint:
    """Find `context` with `update(context) == context` for all tokens at once.

    Each iteration evaluates the tokens that have not converged, `update(context[rows], rows)`, and
    moves them: `context <- (1 - damping) * update + damping * context`. A token has converged when
    the change of the undamped update is below `tolerance`; it delivers that update and is no longer
    computed. The first `warmup` iterations are not looked at.

    Args:
        update: maps contexts `[M, C]` and their row numbers `[M]` to contexts `[M, C]`.
        initial: contexts to start from, `[N, C]`.
        metric: what is compared with `tolerance`, see `measure`.
        tolerance: largest change of a converged token.
        max_iterations: cap on evaluations a token.
        warmup: iterations before convergence is looked at.
        damping: share of the old context that is kept, in [0, 1).
        method: `picard` is the plain iteration, `anderson` mixes the last few.

    Raises:
        ValueError: a number is out of range, or `update` changes the shape.
        NonFiniteError: `update` gave NaN or infinity; the message names the iteration.

    Source: damped Picard iteration of equilibrium models (arXiv:1909.01377); Anderson acceleration
    as in arXiv:1909.01377, solved for each token alone.

    >>> halve = lambda context, rows: 0.5 * context + 1.0
    >>> found = solve(halve, torch.zeros(3, 2), tolerance=1e-6, max_iterations=60)
    >>> torch.allclose(found.context, torch.full((3, 2), 2.0)), found.convergence_rate
    (True, 1.0)
    """
    if not 0.0 <= damping < 1.0:
        raise ValueError(f"damping must be in [0, 1), got {damping}; 0 is the plain iteration")
    if tolerance <= 0.0 or max_iterations < 1 or warmup < 0:
        given = (tolerance, max_iterations, warmup)
        raise ValueError(f"need tolerance > 0, max_iterations >= 1, warmup >= 0; got {given}")
    parts = [
        _solve_part(
            update, initial, part, metric, tolerance, max_iterations, warmup, damping, method
        )
        for part in torch.arange(len(initial), device=initial.device).split(
            PART_TOKENS.get(initial.device.type, PART_TOKENS["cuda"])
        )
    ]
    if not parts:
        parts = [_Part.of(initial, max_iterations)]
    # evenly over the tokens: quantiles of some thousand say as much
    every = max(1, len(initial) // _CURVE_TOKENS)
    length = max(len(part.history) for part in parts)
    curve = [
        _quantiles(
            torch.cat([part.history[min(k, len(part.history) - 1)] for part in parts])[::every]
        )
        for k in range(length)
    ]
    return FixedPoint(
        context=torch.cat([part.context for part in parts]),
        converged=torch.cat([part.converged for part in parts]),
        num_iterations=torch.cat([part.num_iterations for part in parts]),
        change=torch.cat([part.change for part in parts]),
        rate=torch.cat([part.rate() for part in parts]),
        curve=torch.stack(curve).cpu() if curve else torch.zeros(0, 3),
        damping=damping,
    )


@dataclass(kw_only=True, slots=True)
class _Part:
    """Tokens that are solved side by side: few enough that all of it stays in the caches."""

    context: Tensor
    change: Tensor
    num_iterations: Tensor
    converged: Tensor
    history: list[Tensor]

    @staticmethod
    def of(initial: Tensor, max_iterations: int) -> "_Part":
        count, device = len(initial), initial.device
        return _Part(
            context=initial.detach().clone(),
            change=torch.full((count,), float("inf"), device=device),
            num_iterations=torch.full((count,), max_iterations, device=device),
            converged=torch.zeros(count, dtype=torch.bool, device=device),
            history=[],
        )

    def rate(self) -> Tensor:
        """Return the factor that each token's last changes shrank by, `[N]`."""
        if len(self.history) < 2:
            return torch.full_like(self.change, _ASSUMED_RATE)
        last = self.num_iterations.clamp(max=len(self.history)) - 1
        first = (last - _RATE_SPAN).clamp(min=0)
        earlier = torch.stack(self.history).gather(0, first[None])[0]
        ratio = (self.change / earlier.clamp(min=_TINY)) ** (1.0 / (last - first).clamp(min=1))
        return torch.where(last > first, ratio, _ASSUMED_RATE)


def _solve_part(
    update: Update,
    initial: Tensor,
    part: Tensor,
    metric: Metric,
    tolerance: float,
    max_iterations: int,
    warmup: int,
    damping: float,
    method: Literal["picard", "anderson"],
) -> _Part:
    found = _Part.of(initial[part], max_iterations)
    context = found.context
    rows = torch.arange(len(part), device=part.device)
    mixer = _Anderson(len(part), initial.shape[-1], initial) if method == "anderson" else None
    for iteration in range(1, max_iterations + 1):
        old = context if len(rows) == len(part) else context[rows]
        updated = update(old, part[rows])
        if updated.shape != old.shape:
            raise ValueError(f"update must keep {tuple(old.shape)}, got {tuple(updated.shape)}")
        # measured before damping: a heavily damped step is small without being converged
        changed = measure(updated, old, metric).to(found.change.dtype)
        if not torch.isfinite(changed).all():
            raise NonFiniteError(
                f"contexts must stay finite, got NaN or infinity in iteration {iteration} of "
                f"{max_iterations}; lower the learning rate or check the weights"
            )
        found.change[rows] = changed
        found.history.append(found.change.clone())
        done = changed < tolerance
        if iteration <= warmup:
            done = torch.zeros_like(done)
        moved = updated if mixer is None else mixer.mix(old, updated, rows)
        if damping:
            moved = torch.lerp(moved, old, damping)
        # what is delivered is the update itself, whatever would have been tried next
        if moved is not updated:
            last = done if iteration < max_iterations else torch.ones_like(done)
            moved = torch.where(last[:, None], updated, moved)
        if len(rows) == len(part):
            context = found.context = moved
        else:
            context[rows] = moved
        if done.any():
            found.num_iterations[rows[done]] = iteration
            found.converged[rows[done]] = True
            if len(rows) == len(part):
                # from here on it is written into, and `update` may have given what others hold
                context = found.context = context.clone()
            rows = rows[~done]
            if len(rows) == 0:
                break
    return found


def _quantiles(change: Tensor) -> Tensor:
    # by sorting: torch.quantile refuses more than 16 million values and is no faster
    ordered = change.sort().values
    last = len(ordered) - 1
    return torch.stack([ordered[round(share * last)] for share in (0.1, 0.5, 0.9)])


class _Anderson:
    """The last few contexts and updates of each token, mixed by least squares a token."""

    def __init__(self, num_tokens: int, width: int, like: Tensor) -> None:
        shape = (ANDERSON_MEMORY, num_tokens, width)
        self.contexts = like.new_zeros(shape)
        self.updates = like.new_zeros(shape)
        self.num_kept = 0

    def mix(self, context: Tensor, updated: Tensor, rows: Tensor) -> Tensor:
        """Return the next context of `rows`: sum of updates whose residuals nearly cancel."""
        slot = self.num_kept % ANDERSON_MEMORY
        self.contexts[slot, rows], self.updates[slot, rows] = context, updated
        self.num_kept += 1
        kept = min(self.num_kept, ANDERSON_MEMORY)
        if kept == 1:
            return updated
        updates = self.updates[:kept, rows].transpose(0, 1)  # [M, kept, C]
        residuals = updates - self.contexts[:kept, rows].transpose(0, 1)
        # in double precision: in single the ridge is less than the rounding of what it is added to
        residuals = residuals.double()
        gram = residuals @ residuals.transpose(1, 2)
        scale = gram.diagonal(dim1=1, dim2=2).amax(dim=1).clamp(min=_TINY)
        eye = torch.eye(kept, dtype=gram.dtype, device=gram.device)
        ones = gram.new_ones(len(rows), kept, 1)
        # no check: what has no solution says so by its numbers, without a wait for the device
        shares, _ = torch.linalg.solve_ex(gram / scale[:, None, None] + ANDERSON_RIDGE * eye, ones)
        shares = (shares / shares.sum(dim=1, keepdim=True)).to(updates.dtype)
        mixed = (shares * updates).sum(dim=1)
        return torch.where(mixed.isfinite().all(dim=1, keepdim=True), mixed, updated)
