"""Phase 1: train a cell until iterating it settles. Embeddings and read-out stay fixed.

Searching with frozen weights is not training: `train` changes weights, `measure_convergence`
does not. Axes: `N` tokens, `E` embedding width, `C` context width.

Every objective is a loss as a module and a number of steps; one loop drives them all, keeps their
state, and stops at what is not finite. Several processes take a share of each batch: what spreads
contexts sees those of all.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cell import ContextCell
from .checkpoint import load_weights
from .config import Phase1Config, SolverConfig
from .console import Advance, Console
from .distributed import World
from .doctor import THRESHOLDS
from .errors import NonFiniteError
from .model import NewLLM
from .resume import Keeper, TrainingState
from .scan import scan
from .watch import require_finite

# float32 of a variance near zero has no useful gradient of its root below this
_VARIANCE_FLOOR = 1e-4
# share of a context's size that separates the contexts of a near pair
_NEAR = 0.05
# difference of a coordinate under which two contexts count as one, of values near 1
_ROUNDING = 1e-4
# width up to which the mean of the hinge is enough; wider cells leave a few tokens with two ends
_HINGE_WIDTH = 256
# share of the pairs, the worst, whose hinge counts apart in wider cells
_HINGE_TAIL = 0.05
Log = Callable[[dict[str, Any]], None]


Row = dict[str, Any]


class _Loss(nn.Module):
    """A loss of a cell as a module: what an engine for several processes wraps."""

    def __init__(self, cell: ContextCell, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.cell = cell
        self.loss = loss

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return the loss, and what else the objective wants to know."""
        return self.loss(self.cell, *inputs, **options)


class Objective(ABC):
    """What trains one cell, a step at a time, and can go on where it was interrupted.

    Args:
        cell: trained in place.
        x: embeddings of the tokens, `[N, E]`.
        config: of Phase 1.
        seed: of all that is drawn.
        world: processes that train together.
    """

    stage = "phase1"
    rate = "learning_rate"

    def __init__(
        self,
        cell: ContextCell,
        x: Tensor,
        config: Phase1Config,
        *,
        seed: int,
        world: World | None = None,
    ) -> None:
        self.cell = cell
        self.x = x
        self.config = config
        self.seed = seed
        self.world = world or World()
        self.optimiser = torch.optim.Adam(
            cell.parameters(), lr=getattr(config, self.rate), fused=True
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.loss = self.world.replicated(_Loss(cell, self.compute), partly=cell.has_idle_weights)
        self.num_steps = self.count_steps()

    @abstractmethod
    def count_steps(self) -> int:
        """Return how many steps there are; fewer are taken where `step` says so."""

    @abstractmethod
    def compute(self, cell: ContextCell, *inputs: Any, **options: Any) -> Any:
        """Return the loss of this process's share."""

    @abstractmethod
    def step(self, number: int) -> tuple[Row | None, str] | None:
        """Take a step; return its row of the history and a note, None where all is done."""

    def values(self) -> dict[str, Any]:
        """Return plain values that a state holds beside weights, optimiser and generator."""
        return {}

    def restore(self, values: dict[str, Any]) -> None:
        """Go on from what `values` returned."""
        assert not values

    def descend(self, loss: Tensor, value: float, number: int) -> None:
        """Move the weights down a loss whose value over all processes is `value`."""
        self.optimiser.zero_grad(set_to_none=True)
        with self.world.guarded():
            loss.backward()
        gradients = {
            f"the gradient of {name}": parameter.grad
            for name, parameter in self.cell.named_parameters()
            if parameter.grad is not None
        }
        norm = torch.nn.utils.clip_grad_norm_(self.cell.parameters(), self.config.gradient_clip)
        require_finite(
            {"the loss": value, "the gradient norm": norm.item()},
            gradients,
            f"step {number + 1}",
            self.world,
        )
        self.optimiser.step()


def _drive(
    objective: Objective,
    *,
    log: Log,
    advance: Advance,
    keeper: Keeper | None = None,
    about: Row | None = None,
    model: nn.Module | None = None,
) -> None:
    """Take all steps of an objective, from the one that an interrupted training stood before.

    Args:
        objective: what trains.
        log: takes its rows.
        advance: called once a step.
        keeper: of its state.
        about: stands in its rows too.
        model: whose weights are kept; None is the cell alone.
    """
    keeper, about = keeper or Keeper(), about or {}
    trained = (objective.cell if model is None else model, [objective.optimiser])
    first = 0
    # what tells this training from those of other blocks, and of the literal loop before it
    place = {"stage": objective.stage, **about}
    values = keeper.values()
    if values is not None and values["phase"] == "phase1" and values["place"] == place:
        state = keeper.load(trained)
        first = state.values["step"]
        objective.generator.set_state(state.tensors["generator"])
        objective.restore(state.values["objective"])
        advance(first)

    def save(done: int) -> None:
        state = TrainingState(
            values={"place": place, "step": done, "objective": objective.values()},
            tensors={"generator": objective.generator.get_state()},
        )
        at = f"step {done} of {' '.join(map(str, place.values()))}"
        keeper.save("phase1", at, trained, state)

    objective.cell.train()
    with keeper.watching():
        for number in range(first, objective.num_steps):
            try:
                found = objective.step(number)
                if found is None:
                    break
                row, note = found
                if row is not None:
                    log({"stage": objective.stage, **about, **row})
                advance(1, note)
                keeper.after_step(lambda number=number: save(number + 1))
            except NonFiniteError as error:
                raise error.saying(
                    f"Phase 1 stopped: {error}; {keeper.last_good()}; lower "
                    "--phase1.learning-rate and use a new --out"
                ) from error


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


class _Literal(Objective):
    """The seeds' loop, one position a step; see `train_residual_literal`."""

    stage = "phase1-literal"
    rate = "literal_learning_rate"

    def __init__(
        self,
        cell: ContextCell,
        embed: Callable[[Tensor], Tensor],
        dialogues: Sequence[np.ndarray],
        config: Phase1Config,
    ) -> None:
        ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in dialogues])
        distinct, rows = np.unique(ids, return_inverse=True)
        self.rows = rows.tolist()
        # an epoch's positions, those that converged, iterations, and the sum of losses
        self.sums: list[float] = [0, 0, 0, 0.0]
        self.epochs: list[LiteralEpoch] = []
        with torch.no_grad():
            x = embed(torch.from_numpy(distinct).to(next(cell.parameters()).device))
        super().__init__(cell, x, config, seed=0)

    def count_steps(self) -> int:
        return self.config.epochs * len(self.rows)

    def compute(self, cell: ContextCell, *inputs: Any, **options: Any) -> Any:
        return _moved(cell, *inputs)

    def step(self, number: int) -> tuple[Row | None, str]:
        value, taken, stopped = _residual_visit(
            self, self.x[self.rows[number % len(self.rows)]], self.config, number
        )
        before = self.sums
        self.sums = [before[0] + 1, before[1] + stopped, before[2] + taken, before[3] + value]
        note = f"loss {value:.2e}"
        if (number + 1) % len(self.rows):
            return None, note
        count, converged, iterations, total = self.sums
        epoch = LiteralEpoch(
            convergence_rate=converged / count,
            mean_iterations=iterations / count,
            mean_loss=total / count,
            num_positions=int(count),
        )
        self.epochs.append(epoch)
        self.sums = [0, 0, 0, 0.0]
        row = {"epoch": len(self.epochs), "loss": epoch.mean_loss,
               "convergence_rate": epoch.convergence_rate,
               "mean_iterations": epoch.mean_iterations}  # fmt: skip
        return row, note

    def values(self) -> dict[str, Any]:
        return {"sums": self.sums, "epochs": [asdict(epoch) for epoch in self.epochs]}

    def restore(self, values: dict[str, Any]) -> None:
        self.sums = values["sums"]
        self.epochs = [LiteralEpoch(**epoch) for epoch in values["epochs"]]


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
    objective = _Literal(cell, embed, dialogues, config)
    _drive(objective, log=lambda row: None, advance=advance or (lambda amount=1, note="": None))
    return objective.epochs


def _moved(cell: ContextCell, context: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next context of each row, and the sum of the squares that it moved by."""
    updated = cell.search_map(context, cell.project(x), cell.weights())
    return updated, F.mse_loss(updated, context, reduction="sum")


def _residual_visit(
    objective: Objective, x: Tensor, config: Phase1Config, number: int, count: int | None = None
) -> tuple[float, int, bool]:
    """Iterate tokens `[..., E]` from zero and train on the way, or once at the end.

    `count` tokens are visited, of which `x` is this process's share; None is one token. Returns the
    last mean loss, the inner iterations and whether that loss met the threshold.
    """
    world, width = objective.world, objective.cell.context_width
    context = x.new_zeros(*x.shape[:-1], width)
    each = config.residual_loss == "each"
    value, iteration, stopped = math.inf, 0, False

    def loss_of(context: Tensor) -> tuple[Tensor, Tensor, float]:
        updated, squares = objective.loss(context, x)
        loss = squares / ((count or 1) * width)
        return updated, loss, world.total(loss.detach()).item()

    for iteration in range(1, config.max_iterations + 1):
        with torch.set_grad_enabled(each):
            updated, loss, value = loss_of(context)
        if each:
            objective.descend(world.scaled(loss), value, number)
        stopped = iteration > config.warmup_iterations and value < config.threshold
        if not each and (stopped or iteration == config.max_iterations):
            _, loss, value = loss_of(context)
            objective.descend(world.scaled(loss), value, number)
        context = updated.detach()
        if stopped:
            break
    require_finite({"the residual loss": value}, {}, f"step {number + 1}", world)
    return value, iteration, stopped


class _Residual(Objective):
    """All distinct tokens in batches; see `train_residual`. A step is the visit of a batch."""

    taken = 0

    def count_steps(self) -> int:
        return self.config.epochs * math.ceil(len(self.x) / self.config.batch_size)

    def compute(self, cell: ContextCell, *inputs: Any, **options: Any) -> Any:
        return _moved(cell, *inputs)

    def descend(self, loss: Tensor, value: float, number: int) -> None:
        super().descend(loss, value, number)
        self.taken += 1

    def step(self, number: int) -> tuple[Row, str] | None:
        config = self.config
        batches = math.ceil(len(self.x) / config.batch_size)
        epoch, batch = divmod(number, batches)
        if config.max_steps is not None:
            left = config.max_steps - self.taken
            if left <= 0:
                return None
            if config.residual_loss == "each" and left < config.max_iterations:
                warmup = min(config.warmup_iterations, left - 1)
                config = replace(config, max_iterations=left, warmup_iterations=warmup)
        rows = self._order(epoch).split(config.batch_size)[batch]
        mine = self.x[rows[self.world.share(len(rows))]]
        value = _residual_visit(self, mine, config, number, len(rows))[0]
        row = {"step": self.taken, "epoch": epoch, "loss": value}
        return row, f"loss {value:.2e}"

    def _order(self, epoch: int) -> Tensor:
        """Return the order of an epoch, which one generator draws for one after another."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epoch):
            torch.randperm(len(self.x), generator=generator)
        return torch.randperm(len(self.x), generator=generator)

    def values(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, values: dict[str, Any]) -> None:
        self.taken = values["taken"]


def train_residual(
    cell: ContextCell, x: Tensor, config: Phase1Config, *, seed: int, log: Log, advance: Advance
) -> None:
    """Train on `MSE(f(c, x), c.detach())` with all distinct tokens `[N, E]` in batches.

    The batched form of the literal loop: a batch is iterated together, one Adam step an inner
    iteration on the mean over its tokens, until the mean loss is under the threshold; each distinct
    token counts once an epoch, however often it occurs.
    """
    _drive(_Residual(cell, x, config, seed=seed), log=log, advance=advance)


class _Repetition(Objective):
    """Repeated phrases, context carried; see `train_repetition`."""

    def count_steps(self) -> int:
        return _num_steps(len(self.x), self.config)

    def compute(self, cell: ContextCell, *inputs: Any, **options: Any) -> Any:
        (text,) = inputs
        cycle = self.config.cycle_length
        contexts = scan(cell, text, text.new_zeros(len(text), cell.context_width))
        return F.mse_loss(contexts[:, cycle:], contexts[:, :-cycle].detach(), reduction="sum")

    def step(self, number: int) -> tuple[Row, str]:
        config = self.config
        cycle, count = config.cycle_length, config.batch_size
        phrase = torch.randint(len(self.x), (count, cycle), generator=self.generator)
        text = self.x[phrase[self.world.share(count)]].repeat(1, config.num_cycles, 1)
        compared = count * cycle * (config.num_cycles - 1) * self.cell.context_width
        loss = self.loss(text) / compared
        value = self.world.total(loss.detach()).item()
        self.descend(self.world.scaled(loss), value, number)
        return {"step": number + 1, "loss": value}, f"loss {value:.2e}"


def train_repetition(
    cell: ContextCell, x: Tensor, config: Phase1Config, *, seed: int, log: Log, advance: Advance
) -> None:
    """Train on `MSE(c[t], c[t - cycle])` over repeated phrases, context carried.

    Phrases are drawn at random from the tokens `[N, E]`; the first cycle has nothing before it.
    The earlier context is the target and is detached.

    Source: the founding documents, "Repetition Training".
    """
    _drive(_Repetition(cell, x, config, seed=seed), log=log, advance=advance)


class _Contractive(Objective):
    """Contraction and spread together; see `train_contractive`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # the last steps are small: a step of full size leaves some tokens of a deep cell unsettled
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimiser,
            self.num_steps,
            eta_min=self.config.final_learning_rate * self.config.learning_rate,
        )

    def count_steps(self) -> int:
        return _num_steps(len(self.x), self.config)

    def compute(self, cell: ContextCell, *inputs: Any, **options: Any) -> Any:
        (x,) = inputs
        return contractive_loss(cell, x, self.config, self.generator, world=self.world, **options)

    def step(self, number: int) -> tuple[Row, str]:
        rows = torch.randint(len(self.x), (self.config.batch_size,), generator=self.generator)
        loss, terms = self.loss(
            self.x[rows],
            spread_only=number < self.config.spread_steps,
            progress=number / self.num_steps,
        )
        value = loss.item()
        self.descend(self.world.scaled(loss), value, number)
        self.schedule.step()
        row = {"step": number + 1, "loss": value, **terms}
        return row, f"loss {value:.3f} factor {terms['factor']:.2f}"

    def values(self) -> dict[str, Any]:
        return {"rate": self.optimiser.param_groups[0]["lr"], "schedule": self.schedule.last_epoch}

    def restore(self, values: dict[str, Any]) -> None:
        self.schedule.last_epoch = values["schedule"]
        self.optimiser.param_groups[0]["lr"] = values["rate"]


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
    _drive(_Contractive(cell, x, config, seed=seed), log=log, advance=advance)


def contractive_loss(
    cell: ContextCell,
    x: Tensor,
    config: Phase1Config,
    generator: torch.Generator,
    *,
    spread_only: bool = False,
    progress: float = 1.0,
    world: World | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the `contractive` loss of different tokens `[N, E]`, and its terms.

    What is random, the starts and the number of visited iterations, comes from `generator`;
    `progress` is the share of the training that is behind, in [0, 1]. Of several processes, which
    all give the same tokens and generator, each iterates its share, and all have the loss of the
    whole.
    """
    world, count = world or World(), len(x)
    share = world.share(count)
    x = x[share]
    projected, weights, size = cell.project(x), cell.weights(), _context_size(cell)

    def draw() -> Tensor:
        return torch.randn((count, cell.context_width), generator=generator)[share].to(x)

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
    of_pairs = torch.stack(
        [
            _ratio(moved, moved_near, context, near),
            _ratio(moved, moved_other, context, other),
            _ratio(moved, moved_far, context, far),
            _ratio(moved_far, moved_zero, far, zero),
        ],
        dim=1,
    )
    length = moved.detach().square().sum(dim=-1).clamp(min=1e-6)
    relative = (moved - context).square().sum(dim=-1) / length
    # every context, so that spread is that of the whole batch
    moved = world.gathered(moved, count)
    ratios = world.gathered(of_pairs, count).T.reshape(-1)
    residual = world.gathered(relative, count).mean()
    excess = F.relu(ratios - config.contraction_target).square()
    hinge = excess.mean()
    wider = max(0.0, cell.context_width / _HINGE_WIDTH - 1.0)
    if wider > 0.0:
        # from nothing to all: at full weight from the start, deep cells are drawn to one context
        worst = excess.topk(math.ceil(_HINGE_TAIL * len(excess))).values.mean()
        hinge = hinge + progress * wider * worst
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
    return 0.5 if cell.separates_gate else 1.0  # about what cells have at the start


def _ratio(moved: Tensor, other_moved: Tensor, context: Tensor, other: Tensor) -> Tensor:
    # nearer contexts differ by rounding, and so would their ratio
    least = _ROUNDING * math.sqrt(context.shape[-1])
    apart = (context - other).norm(dim=-1).clamp(min=least)
    return (moved - other_moved).norm(dim=-1) / apart


def pair_hinge(
    cell: ContextCell, x: Tensor, contexts: Tensor, noise: Tensor, target: float
) -> Tensor:
    """Return the hinge on near pairs at each of given contexts, `[N]`, which keeps contraction.

    Inputs `[N, E]`, the contexts `[N, C]` that were carried into them, and unit normal noise of
    their shape.
    """
    context = contexts.detach()
    near = context + _NEAR * noise
    projected, weights = cell.project(x), cell.weights()
    moved, other = cell.search_map(
        torch.cat([context, near]), projected.repeat(2, 1), weights
    ).chunk(2)
    return F.relu(_ratio(moved, other, context, near) - target).square()


def _num_steps(num_tokens: int, config: Phase1Config) -> int:
    by_epochs = config.epochs * math.ceil(num_tokens / config.batch_size)
    return by_epochs if config.max_steps is None else config.max_steps


OBJECTIVES: dict[str, type[Objective]] = {
    "residual": _Residual,
    "repetition": _Repetition,
    "contractive": _Contractive,
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
    keeper: Keeper | None = None,
) -> None:
    """Train the cell of every block on distinct token ids `[N]`, one block after another.

    A block reads what the blocks before it settle at, so those are trained and frozen first.
    `residual` begins with `literal_dialogues` of the given dialogues. With a keeper it goes on
    where it was interrupted.

    Raises:
        NonFiniteError: a loss or gradient became NaN or infinite; the message names it.
        KeyboardInterrupt: Ctrl-C was pressed; the step was ended and the state kept.
    """
    keeper = keeper or Keeper()
    kept = keeper.values()
    is_literal = config.objective == "residual" and config.literal_dialogues > 0
    passes = [
        (k, literal)
        for k in range(len(model.cells()))
        for literal in ((True, False) if is_literal else (False,))
    ]
    if kept is not None and kept["phase"] == "phase1":
        stages = {True: _Literal.stage, False: Objective.stage}
        places = [{"stage": stages[literal], "block": k + 1} for k, literal in passes]
        begun = places.index(kept["place"])
        # the cells that were trained before it, and what they are read by
        load_weights(keeper.weights(), model)
        passes = passes[begun:]
    for k, literal in passes:
        cell = model.cells()[k]
        model.eval()
        if literal:
            _train_literal(model, cell, k, dialogues[: config.literal_dialogues], config, console,
                           log, keeper)  # fmt: skip
            continue
        x = model.search(ids).inputs[k].detach()
        name = f"phase 1 {config.objective}"
        name += f", block {k + 1}" if len(model.cells()) > 1 else ""
        objective = OBJECTIVES[config.objective](cell, x, config, seed=seed + k, world=keeper.world)
        with console.track(name, objective.num_steps) as advance:
            _drive(objective, log=log, advance=advance, keeper=keeper, about={"block": k + 1},
                   model=model)  # fmt: skip
    model.eval()


def _train_literal(
    model: NewLLM,
    cell: ContextCell,
    k: int,
    dialogues: Sequence[np.ndarray],
    config: Phase1Config,
    console: Console,
    log: Log,
    keeper: Keeper,
) -> None:
    """Let the main process alone take the seeds' loop, which is one step after another."""
    world = keeper.world

    def alone() -> None:
        objective = _Literal(cell, lambda ids: model.search(ids).inputs[k], dialogues, config)
        with console.track("phase 1 residual, token by token", objective.num_steps) as advance:
            _drive(objective, log=log, advance=advance, keeper=keeper.alone(),
                   about={"block": k + 1}, model=model)  # fmt: skip

    world.told(alone)
    world.send(cell)


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
