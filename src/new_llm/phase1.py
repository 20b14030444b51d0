"""Phase 1: train a cell until iterating it settles. Embeddings and read-out stay fixed.

Searching with frozen weights is not training: `train` changes weights, `measure_convergence`
does not. Axes: `N` tokens, `E` embedding width, `C` context width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cell import ContextCell
from .config import Phase1Config, SolverConfig
from .console import Advance, Console
from .doctor import THRESHOLDS
from .errors import NonFiniteError
from .model import NewLLM
from .scan import scan

# float32 of a variance near zero has no useful gradient of its root below this
_VARIANCE_FLOOR = 1e-4
# share of a context's size that separates the contexts of a near pair
_NEAR = 0.05
# width up to which the mean of the hinge is enough; wider cells leave a few tokens with two ends
_HINGE_WIDTH = 256
# share of the pairs, the worst, whose hinge counts apart in wider cells
_HINGE_TAIL = 0.05
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LiteralEpoch:
    """One pass of the literal loop over its tokens."""

    convergence_rate: float
    """Share of visited positions whose loss fell under the threshold."""
    mean_iterations: float
    """Mean inner iterations a position, as trained."""
    mean_loss: float
    """Mean over positions of the last inner loss."""
    num_positions: int
    """Positions visited."""


def train_residual_literal(
    cell: ContextCell,
    embed: Callable[[Tensor], Tensor],
    dialogues: Sequence[np.ndarray],
    config: Phase1Config,
    *,
    advance: Advance | None = None,
) -> list[LiteralEpoch]:
    """Train as the seeds' loop does: token by token, one Adam step an inner iteration.

    For every position: `context` from zero; up to `max_iterations` times the loss
    `MSE(f(context, x), context)`, clip, Adam step, `context <-` the value computed before the step;
    stop once that loss is under `threshold`. One Adam over the cell's weights for all positions.
    With `residual_loss` "last" the weights rest while the context is iterated, and one step is
    taken on the loss of the last iteration.

    Args:
        cell: trained in place, with dropout as it is configured.
        embed: token ids `[N]` to what the cell reads, `[N, E]`.
        dialogues: token ids of each dialogue; positions to be left out are not in them.
        config: epochs, literal learning rate, inner iterations, threshold, clip.
        advance: called once a position.

    Raises:
        NonFiniteError: the loss became NaN or infinite.

    Source: the founding documents, "Phase 1 Training Loop".
    """
    parameters = list(cell.parameters())
    optimiser = torch.optim.Adam(parameters, lr=config.literal_learning_rate, fused=True)

    def take_step(loss: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimiser.step()
        return loss.item()

    cell.train()
    epochs = []
    for _ in range(config.epochs):
        converged = iterations = visited = 0
        total = 0.0
        for ids in dialogues:
            with torch.no_grad():
                embeddings = embed(torch.as_tensor(ids, dtype=torch.long))
            for x in embeddings:
                value, taken, stopped = _residual_visit(cell, x, config, take_step)
                _require_finite(value, "residual loss", visited)
                converged += stopped
                iterations += taken
                total += value
                visited += 1
                if advance is not None:
                    advance(1, f"loss {value:.2e}")
        count = max(visited, 1)
        epochs.append(
            LiteralEpoch(
                convergence_rate=converged / count,
                mean_iterations=iterations / count,
                mean_loss=total / count,
                num_positions=visited,
            )
        )
    return epochs


def _residual_visit(
    cell: ContextCell, x: Tensor, config: Phase1Config, take_step: Callable[[Tensor], float]
) -> tuple[float, int, bool]:
    """Iterate tokens `[..., E]` from zero and train on the way, or once at the end.

    Returns the last mean loss, the inner iterations and whether that loss met the threshold.
    """
    context = x.new_zeros(*x.shape[:-1], cell.context_width)
    each = config.residual_loss == "each"
    value, iteration, stopped = math.inf, 0, False

    def step_of(context: Tensor) -> tuple[Tensor, Tensor]:
        updated = cell.search_map(context, cell.project(x), cell.weights())
        return updated, F.mse_loss(updated, context)

    for iteration in range(1, config.max_iterations + 1):
        with torch.set_grad_enabled(each):
            updated, loss = step_of(context)
        value = take_step(loss) if each else loss.item()
        stopped = iteration > config.warmup_iterations and value < config.threshold
        if not each and (stopped or iteration == config.max_iterations):
            value = take_step(step_of(context)[1])
        context = updated.detach()
        if stopped:
            break
    return value, iteration, stopped


def train_residual(
    cell: ContextCell, x: Tensor, config: Phase1Config, *, seed: int, log: Log, advance: Advance
) -> None:
    """Train on `MSE(f(c, x), c.detach())` with all distinct tokens `[N, E]` in batches.

    The batched form of the literal loop: a batch is iterated together, one Adam step an inner
    iteration on the mean over its tokens, until the mean loss is under the threshold; each distinct
    token counts once an epoch, however often it occurs.
    """
    optimiser = torch.optim.Adam(cell.parameters(), lr=config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    cell.train()
    step = 0

    def take_step(loss: Tensor) -> float:
        nonlocal step
        step += 1
        return _step(optimiser, cell, loss, config, step - 1)

    for epoch in range(config.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(config.batch_size):
            limited = config
            if config.max_steps is not None:
                left = config.max_steps - step
                if left <= 0:
                    return
                if config.residual_loss == "each" and left < config.max_iterations:
                    warmup = min(config.warmup_iterations, left - 1)
                    limited = replace(config, max_iterations=left, warmup_iterations=warmup)
            value = _residual_visit(cell, x[rows], limited, take_step)[0]
            log({"stage": "phase1", "step": step, "epoch": epoch, "loss": value})
            advance(1, f"loss {value:.2e}")


def train_repetition(
    cell: ContextCell, x: Tensor, config: Phase1Config, *, seed: int, log: Log, advance: Advance
) -> None:
    """Train on `MSE(c[t], c[t - cycle])` over repeated phrases, context carried.

    Phrases are drawn at random from the tokens `[N, E]`; the first cycle has nothing before it.
    The earlier context is the target and is detached.

    Source: the founding documents, "Repetition Training".
    """
    optimiser = torch.optim.Adam(cell.parameters(), lr=config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    cell.train()
    cycle = config.cycle_length
    for step in range(_num_steps(len(x), config)):
        shape = (config.batch_size, cycle)
        phrase = torch.randint(len(x), shape, generator=generator)
        text = x[phrase].repeat(1, config.num_cycles, 1)
        contexts = scan(cell, text, x.new_zeros(len(text), cell.context_width))
        loss = F.mse_loss(contexts[:, cycle:], contexts[:, :-cycle].detach())
        value = _step(optimiser, cell, loss, config, step)
        log({"stage": "phase1", "step": step + 1, "loss": value})
        advance(1, f"loss {value:.2e}")


def train_contractive(
    cell: ContextCell, x: Tensor, config: Phase1Config, *, seed: int, log: Log, advance: Advance
) -> None:
    """Train contraction and spread together: every token settles, each at a place of its own.

    A hinge keeps the ratio of context pairs, near and far, from zero and random starts, under the
    target; a residual is taken at visited contexts; variance and covariance over the batch keep
    tokens apart. Without these two a cell is drawn to one constant, usually zero. The ratio is that
    of the map that is iterated: for ConvexCell a hinge on `f` would destroy its memory.

    Source: variance and covariance terms, VICReg (arXiv:2105.04906).
    """
    optimiser = torch.optim.Adam(cell.parameters(), lr=config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    cell.train()
    total = _num_steps(len(x), config)
    # the last steps are small: a step of full size leaves some tokens of a deep cell unsettled
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, total, eta_min=config.final_learning_rate * config.learning_rate
    )
    for step in range(total):
        rows = torch.randint(len(x), (config.batch_size,), generator=generator)
        spread_only = step < config.spread_steps
        loss, terms = contractive_loss(
            cell, x[rows], config, generator, spread_only=spread_only, progress=step / total
        )
        value = _step(optimiser, cell, loss, config, step)
        schedule.step()
        log({"stage": "phase1", "step": step + 1, "loss": value, **terms})
        advance(1, f"loss {value:.3f} factor {terms['factor']:.2f}")


def contractive_loss(
    cell: ContextCell,
    x: Tensor,
    config: Phase1Config,
    generator: torch.Generator,
    *,
    spread_only: bool = False,
    progress: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """Return the `contractive` loss of different tokens `[N, E]`, and its terms.

    What is random, the starts and the number of visited iterations, comes from `generator`;
    `progress` is the share of the training that is behind, in [0, 1].
    """
    projected, weights, size = cell.project(x), cell.weights(), _context_size(cell)

    def draw() -> Tensor:
        return torch.randn((len(x), cell.context_width), generator=generator).to(x)

    # where tokens end, and the way there: always the same number would leave the rest unseen
    visited = int(torch.randint(1, config.visited_iterations + 1, (), generator=generator))
    context, other = torch.zeros_like(draw()), size * draw()
    with torch.no_grad():
        for _ in range(visited):
            context = cell.search_map(context, projected, weights)
            other = cell.search_map(other, projected, weights)
    # what is left between two runs lies along the direction that shrinks least
    apart = F.normalize(other - context + 1e-3 * size * draw(), dim=-1)
    near = context + _NEAR * size * math.sqrt(cell.context_width) * apart
    zero, far = torch.zeros_like(other), size * draw()
    moved, moved_other, moved_near, moved_far, moved_zero = cell.search_map(
        torch.cat([context, other, near, far, zero]), projected.repeat(5, 1), weights
    ).chunk(5)
    ratios = torch.cat(
        [
            _ratio(moved, moved_near, context, near),
            _ratio(moved, moved_other, context, other),
            _ratio(moved, moved_far, context, far),
            _ratio(moved_far, moved_zero, far, zero),
        ]
    )
    excess = F.relu(ratios - config.contraction_target).square()
    hinge = excess.mean()
    wider = max(0.0, cell.context_width / _HINGE_WIDTH - 1.0)
    if wider > 0.0:
        # from nothing to all: at full weight from the start, deep cells are drawn to one context
        worst = excess.topk(math.ceil(_HINGE_TAIL * len(excess))).values.mean()
        hinge = hinge + progress * wider * worst
    length = moved.detach().square().sum(dim=-1).clamp(min=1e-6)
    residual = ((moved - context).square().sum(dim=-1) / length).mean()
    variance, covariance = spread_terms(moved, size)
    loss = config.variance_weight * variance + config.covariance_weight * covariance
    if not spread_only:
        loss = loss + config.hinge_weight * hinge + config.residual_weight * residual
    terms = {"residual": residual, "factor": ratios.max(), "variance": variance,
             "covariance": covariance}  # fmt: skip
    return loss, {name: value.item() for name, value in terms.items()}


def spread_terms(contexts: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Return VICReg's variance and covariance terms of contexts `[N, C]`.

    The first is the mean shortfall of a coordinate's standard deviation from `size`, and the mean
    square of its mean, which would make all contexts alike; the second the summed squares off the
    diagonal of the covariance over C. All are relative to `size`.

    >>> spread_terms(torch.zeros(4, 2), 1.0)[0] > 0.9
    tensor(True)
    """
    mean = contexts.mean(dim=0)
    centred = (contexts - mean) / size
    deviation = (centred.var(dim=0) + _VARIANCE_FLOOR).sqrt()
    covariance = centred.T @ centred / (len(centred) - 1)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    offset = (mean / size).square().mean()
    return F.relu(1.0 - deviation).mean() + offset, off_diagonal.square().sum() / contexts.shape[-1]


def _context_size(cell: ContextCell) -> float:
    return 0.5 if cell.separates_gate else 1.0  # tanh reaches 1, a layer norm has RMS 1


def _ratio(moved: Tensor, other_moved: Tensor, context: Tensor, other: Tensor) -> Tensor:
    apart = (context - other).norm(dim=-1).clamp(min=1e-6)
    return (moved - other_moved).norm(dim=-1) / apart


def pair_hinge(cell: ContextCell, x: Tensor, contexts: Tensor, target: float) -> Tensor:
    """Return the hinge on near pairs at given contexts, for training that must keep contraction.

    Inputs `[N, E]` and the contexts `[N, C]` that were carried into them.
    """
    context = contexts.detach()
    near = context + _NEAR * torch.randn_like(context)
    projected, weights = cell.project(x), cell.weights()
    moved, other = cell.search_map(
        torch.cat([context, near]), projected.repeat(2, 1), weights
    ).chunk(2)
    return F.relu(_ratio(moved, other, context, near) - target).square().mean()


def _num_steps(num_tokens: int, config: Phase1Config) -> int:
    by_epochs = config.epochs * math.ceil(num_tokens / config.batch_size)
    return by_epochs if config.max_steps is None else config.max_steps


def _step(
    optimiser: torch.optim.Optimizer,
    cell: ContextCell,
    loss: Tensor,
    config: Phase1Config,
    step: int,
) -> float:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    value = loss.item()
    _require_finite(value, "Phase 1 loss", step)
    torch.nn.utils.clip_grad_norm_(cell.parameters(), config.gradient_clip)
    optimiser.step()
    return value


def _require_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{what} must stay finite, got {value} in step {step + 1}; "
            "lower --phase1.learning-rate and use a new --out"
        )


OBJECTIVES = {
    "residual": train_residual,
    "repetition": train_repetition,
    "contractive": train_contractive,
}


def train(
    model: NewLLM,
    ids: Tensor,
    dialogues: Sequence[np.ndarray],
    config: Phase1Config,
    *,
    seed: int,
    console: Console,
    log: Log,
) -> None:
    """Train the cell of every block on distinct token ids `[N]`, one block after another.

    A block reads what the blocks before it settle at, so those are trained and frozen first.
    `residual` begins with `literal_dialogues` of the given dialogues.
    """
    objective = OBJECTIVES[config.objective]
    num_cells = len(model.cells())
    for k, cell in enumerate(model.cells()):
        model.eval()
        x = model.search(ids).inputs[k].detach()
        name = f"phase 1 {config.objective}" + (f", block {k + 1}" if num_cells > 1 else "")
        if config.objective == "residual" and config.literal_dialogues:
            _literal(model, cell, k, dialogues[: config.literal_dialogues], config, console, log)
        batches = math.ceil(len(ids) / config.batch_size)
        by_steps = config.objective != "residual"
        total = _num_steps(len(ids), config) if by_steps else config.epochs * batches
        with console.track(name, total) as advance:
            objective(
                cell,
                x,
                config,
                seed=seed + k,
                log=lambda row, k=k: log({"block": k + 1, **row}),
                advance=advance,
            )
    model.eval()


def _literal(
    model: NewLLM,
    cell: ContextCell,
    k: int,
    dialogues: Sequence[np.ndarray],
    config: Phase1Config,
    console: Console,
    log: Log,
) -> None:
    total = config.epochs * sum(len(ids) for ids in dialogues)
    with console.track("phase 1 residual, token by token", total) as advance:
        epochs = train_residual_literal(
            cell, lambda ids: model.search(ids).inputs[k], dialogues, config, advance=advance
        )
    for number, epoch in enumerate(epochs, start=1):
        log(
            {
                "stage": "phase1-literal",
                "epoch": number,
                "loss": epoch.mean_loss,
                "convergence_rate": epoch.convergence_rate,
                "mean_iterations": epoch.mean_iterations,
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Convergence:
    """How a frozen model converges on tokens, by one metric and stop rule."""

    ids: Tensor
    """Distinct token ids, `[N]`."""
    converged: Tensor
    """Whether every block of a token converged, `[N]`."""
    num_iterations: Tensor
    """Iterations of the slowest block, `[N]`."""
    change: Tensor
    """Last change, the largest over blocks, `[N]`."""
    curve: Tensor
    """Quantiles of the first block's change after each iteration, `[K, 3]`."""

    def summary(self, counts: Tensor | None = None) -> dict[str, float | None]:
        """Return rate, mean iterations and mean last change, tokens weighted by `counts` `[N]`."""
        # whole numbers in double, divided last: a rate of all tokens is 1 exactly
        weight = torch.ones(len(self.ids)).double() if counts is None else counts.double()
        total = weight.sum().clamp(min=1.0).item()
        done = weight * self.converged
        mean_converged = None
        if done.sum() > 0:
            mean_converged = ((done * self.num_iterations).sum() / done.sum()).item()
        return {
            "convergence_rate": done.sum().item() / total,
            "mean_iterations": (weight * self.num_iterations).sum().item() / total,
            "mean_iterations_converged": mean_converged,
            "mean_change": (weight * self.change).sum().item() / total,
        }

    def of_dialogue(self, ids: np.ndarray) -> dict[str, float | None]:
        """Return the summary over the positions of one dialogue."""
        counts = torch.from_numpy(np.bincount(ids, minlength=1))
        padded = torch.zeros(int(max(self.ids.max() + 1, len(counts))))
        padded[: len(counts)] = counts.float()
        return self.summary(padded[self.ids])


SEED_SOLVER = SolverConfig(metric="mse", tolerance=THRESHOLDS.gate_metric_mse, max_iterations=50)


def measure_convergence(
    model: NewLLM, ids: Tensor, solver: SolverConfig = SEED_SOLVER
) -> Convergence:
    """Search the fixed points of distinct ids `[N]` from zero, weights frozen, evaluation mode."""
    model.eval()
    found = model.search(ids, solver).blocks
    return Convergence(
        ids=ids.cpu(),
        converged=torch.stack([point.converged for point in found]).all(dim=0).cpu(),
        num_iterations=torch.stack([point.num_iterations for point in found]).amax(dim=0).cpu(),
        change=torch.stack([point.change for point in found]).amax(dim=0).cpu(),
        curve=found[0].curve,
    )
