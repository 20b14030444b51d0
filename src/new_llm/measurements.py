"""What can be measured of contexts and of the map that moves them; judges nothing.

Of callables and matrices: knows no model class. Axes: `N` tokens or positions, `C` context width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor, Tensor], Tensor]
"""`(context [M, C], rows [M])` to `[M, C]`: moves the contexts of chosen tokens, each alone."""

# tokens of context, as far back as a measurement of what they are worth looks
LONGEST_REACH = 256
_TINY = 1e-30
# far above the rounding of float32 contexts, far below their size
_SMALL_DISTANCE = 1e-2
# share of a float32 vector that is rounding after a few dozen subtractions
_ROUNDING = 1e-4
# rows of a matrix whose singular values are taken; more change the entropy in the third digit
_LARGEST_SPECTRUM = 4096


def singular_values(contexts: Tensor) -> Tensor:
    """Return the singular values of the centred `[N, C]`, largest first, in float64.

    >>> singular_values(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]))
    tensor([2.8284, 0.0000], dtype=torch.float64)
    """
    rows = contexts[:: max(1, len(contexts) // _LARGEST_SPECTRUM)].double()
    return torch.linalg.svdvals(rows - rows.mean(dim=0))


def effective_rank(contexts: Tensor) -> float:
    """Return `exp(entropy)` of the normalised singular values of the centred `[N, C]`.

    Source: Roy and Vetterli 2007, "The effective rank".

    >>> effective_rank(torch.cat([torch.eye(4), -torch.eye(4)]))
    4.0
    """
    values = singular_values(contexts)
    share = values / values.sum().clamp(min=_TINY)
    entropy = -(share * share.clamp(min=_TINY).log()).sum()
    return round(entropy.exp().item(), 6)


def participation_ratio(contexts: Tensor) -> float:
    """Return `(sum of variances)^2 / sum of squared variances` over principal directions.

    A second count of the directions in use, that a few strong ones dominate more than they do the
    effective rank.

    Source: Gao et al. 2017, "A theory of multineuronal dimensionality".

    >>> participation_ratio(torch.cat([torch.eye(4), -torch.eye(4)]))
    4.0
    """
    variances = singular_values(contexts).square()
    ratio = variances.sum().square() / variances.square().sum().clamp(min=_TINY)
    return round(ratio.item(), 6)


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
    """Return the largest singular value of each row's Jacobian, `[N]`.

    One VJP and one JVP an iteration. All directions of the power iteration are kept, and the
    largest value is taken of their span (Golub and Kahan 1965): a plain power iteration of as many
    steps is some per cent too low where the next value is close.

    >>> stretch = torch.tensor([3.0, 1.0])
    >>> largest_singular_value(lambda c, rows: c * stretch, torch.zeros(2, 2)).round(decimals=4)
    tensor([3., 3.])
    """
    rows = torch.arange(len(contexts), device=contexts.device)
    pushed, pull = torch.func.vjp(lambda context: apply(context, rows), contexts)[:2]
    steps = min(iterations, contexts.shape[-1], pushed.shape[-1])
    direction = _normal_like(contexts, seed=0)
    right: list[Tensor] = []
    left: list[Tensor] = []
    pulled: list[Tensor] = []
    for _ in range(steps):
        right.append(_new_direction(direction, right))
        moved = torch.func.jvp(lambda context: apply(context, rows), (contexts,), (right[-1],))[1]
        left.append(_new_direction(moved, left))
        (direction,) = pull(left[-1])
        pulled.append(direction)
    # rows of the Jacobian as seen from the span of `left`
    return torch.linalg.svdvals(torch.stack(pulled, dim=1))[:, 0]


def spectral_radius(apply: Map, contexts: Tensor, *, iterations: int = 128) -> Tensor:
    """Return the size of each row's largest eigenvalue of the Jacobian, `[N]`.

    The rate at which the iteration closes in on a fixed point in the end; the singular value
    bounds one step. Growth a step over the second half of a power iteration, whose mean is right
    for complex pairs too.

    >>> turn = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
    >>> spectral_radius(lambda c, rows: c @ turn, torch.zeros(1, 2)).round(decimals=4)
    tensor([0.5000])
    """
    rows = torch.arange(len(contexts), device=contexts.device)
    tangent = F.normalize(_normal_like(contexts, seed=0), dim=-1)
    growth = contexts.new_zeros(len(contexts))
    for step in range(iterations):
        tangent = torch.func.jvp(lambda context: apply(context, rows), (contexts,), (tangent,))[1]
        size = tangent.norm(dim=-1).clamp(min=_TINY)
        tangent = tangent / size[:, None]
        if step >= iterations // 2:
            growth = growth + size.log()
    return (growth / (iterations - iterations // 2)).exp()


def _normal_like(contexts: Tensor, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(contexts.shape, generator=generator).to(contexts)


def _new_direction(vectors: Tensor, others: list[Tensor]) -> Tensor:
    """Return the unit vectors of what is not along orthonormal others, row by row.

    Zero where nothing but rounding is left: the others then span all that there is.
    """
    apart = vectors
    for _ in range(2):  # once more for rounding
        for other in others:
            apart = apart - (apart * other).sum(dim=-1, keepdim=True) * other
    size = apart.norm(dim=-1, keepdim=True)
    is_new = size > _ROUNDING * vectors.norm(dim=-1, keepdim=True)
    return torch.where(is_new, apart / size.clamp(min=_TINY), 0.0)


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


def upper_factor(ratios: Tensor) -> float:
    """Return the 99th percentile of ratios `[N]`: what nearly all pairs shrink by at least.

    >>> upper_factor(torch.linspace(0.0, 1.0, 101))
    0.9900000095367432
    """
    return ratios.sort().values[int(0.99 * (len(ratios) - 1))].item()


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


def read_back(contexts: Tensor, targets: Tensor, *, ridge: float = 1e-3) -> tuple[float, float]:
    """Return how often a linear probe reads a token from a context, and what guessing gets.

    Ridge regression on one-hot ids, fitted on the first half of the rows and scored on the second;
    the guess is the most frequent id of the first half.

    Args:
        contexts: `[N, C]`.
        targets: the id to be read from each, `[N]`.
        ridge: share of the mean variance added to each direction.

    Source: linear classifier probes, Alain and Bengio 2016 (arXiv:1610.01644).

    >>> ids = torch.arange(64) % 4
    >>> read_back(torch.eye(4)[ids], ids)
    (1.0, 0.25)
    """
    half = len(contexts) // 2
    if half == 0:
        return 0.0, 0.0
    wide = contexts.double()
    wide = wide - wide[:half].mean(dim=0)
    fitted, scored = wide[:half], wide[half:]
    ids, place, counts = targets[:half].unique(return_inverse=True, return_counts=True)
    sums = wide.new_zeros(len(ids), wide.shape[-1]).index_add_(0, place, fitted)
    gram = fitted.T @ fitted
    gram.diagonal().add_(ridge * gram.diagonal().mean() + _TINY)
    slopes = torch.linalg.solve(gram, sums.T)
    guessed = ids[(scored @ slopes + counts / half).argmax(dim=-1)]
    most = ids[counts.argmax()]
    share = [(chosen == targets[half:]).float().mean().item() for chosen in (guessed, most)]
    return share[0], share[1]


def time_scales(forget: Tensor) -> Tensor:
    """Return after how many tokens `1/e` is left of what a forget gate keeps, any shape.

    >>> time_scales(torch.tensor([0.5, 0.904837])).round(decimals=2)
    tensor([ 1.4400, 10.0000], dtype=torch.float64)
    """
    return -1.0 / forget.double().clamp(min=_TINY, max=1.0 - 1e-9).log()


@dataclass(frozen=True, kw_only=True)
class Portrait:
    """What a page shows of one block's contexts: plain numbers, small enough for a file."""

    residual: list[list[float]]
    """10 %, 50 % and 90 % quantile of the change after each iteration or sweep."""
    factors: list[float]
    """Contraction factors of pairs, as 101 quantiles."""
    spectrum: list[float]
    """Singular values of the centred contexts, as shares of the largest."""
    places: list[list[float]]
    """Two principal coordinates of some contexts."""
    rows: list[int]
    """Which contexts `places` shows."""
    cosines: list[list[float]]
    """Cosine of each pair of a few contexts, evenly taken from `places`."""
    time_scales: list[float]
    """Time-scales of the forget gates, tokens, as 101 quantiles; empty without gates."""


_PLACES, _COSINES = 512, 48


def draw(contexts: Tensor, curve: Tensor, ratios: Tensor, forget: Tensor | None) -> Portrait:
    """Return the portrait of contexts `[N, C]`, of their solve's curve `[K, 3]` and pair ratios."""
    rows = torch.linspace(0, len(contexts) - 1, min(_PLACES, len(contexts))).long().unique()
    values = singular_values(contexts)
    wide = contexts.double()
    centred = wide - wide.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False)[2][:2]
    units = F.normalize(wide[rows[:: max(1, len(rows) // _COSINES)]][:_COSINES], dim=-1)
    return Portrait(
        residual=_plain(curve),
        factors=_plain(_quantiles(ratios)),
        spectrum=_plain(values / values[:1].clamp(min=_TINY)),
        places=_plain(centred[rows] @ directions.T),
        rows=rows.tolist(),
        cosines=_plain(units @ units.T),
        time_scales=[] if forget is None else _plain(_quantiles(time_scales(forget))),
    )


def _quantiles(values: Tensor) -> Tensor:
    ordered = values.flatten().sort().values
    return ordered[torch.linspace(0, len(ordered) - 1, 101).round().long()]


def _plain(values: Tensor) -> list:
    """Return four significant digits: a picture shows no more."""
    return [_plain(value) if value.ndim else float(f"{value.item():.4g}") for value in values.cpu()]
