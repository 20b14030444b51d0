"""Long memory: tasks whose answer stands far back, for ours and its peers at equal parameters.

Each task is drawn anew for every step, so that nothing can be learned by heart. Models train on
short texts and are asked at distances far past them. Axes: `B` texts, `T` positions.

Sources: copying over blanks as in "Unitary evolution recurrent neural networks" (arXiv:1511.06464),
recall of names as in "Zoology" (arXiv:2312.04927), states that permutations move as in "The
illusion of state in state-space models" (arXiv:2404.08819), here those of three things.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cell import ConvexCell
from .config import PeerConfig, Phase2Config, preset, scaled, to_dict
from .console import Console
from .errors import NonFiniteError
from .model import LanguageModel, NewLLM, num_parameters, token_losses
from .peers import Peer
from .phase2 import learning_rate, make_optimisers
from .quality import PEERS, build, device_name, filled, matched, places_of
from .runner import Numbers, Runner

# a distance counts as answered where at least this share of answers is right
HELD = 0.9
# texts train on distances up to this, and are asked up to LONGEST
TRAINED = 64
LONGEST = 2048
# of the slowest unit, in tokens, at the start; None is how gates of a peer usually begin
TIMESCALES = (100.0, 1000.0)
# settings are chosen on texts of one seed and scored on those of another. A generator keeps the
# low 32 bits of a seed: those of training, which are small, are none of these
CHOSEN_ON, SCORED_ON = 1_000_001, 1_000_002
# positions a distance is asked at, about, in so many texts at least and at most
_POSITIONS, _FEWEST, _MOST = 1 << 17, 64, 1024
# positions that are read side by side
_SIDE_BY_SIDE = 1 << 15
# tasks whose first token counts for ever, and models whose contexts are looked at for it
LASTING = ("parity", "S3")
CARRYING = ("convex", "convex, W_c = 0", "convex, no limit", "lstm", "gru")
# of a difference between two contexts; less counts as lost
LEFT = 0.01
_TWINS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Texts of a task, and what is asked."""

    ids: Tensor
    """`[B, T]`."""
    targets: Tensor
    """What must follow each position, `[B, T]`; -1 where nothing is asked."""
    distance: Tensor
    """How far back the answer stands, or how long the text is that decides it, `[B, T]`."""

    def to(self, device: torch.device | str) -> "Examples":
        """Return them on another device."""
        return Examples(
            ids=self.ids.to(device),
            targets=self.targets.to(device),
            distance=self.distance.to(device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task: how its texts are drawn."""

    vocab_size: int
    draw: Callable[[int, int, torch.Generator], Examples]
    """Texts of a length or distance, so many, from a generator."""
    chance: float
    """Share of right answers of a model that does not know which answer is meant."""
    shortest: int
    """Length of the shortest texts of training."""
    num_steps: int = 3000
    learning_rates: tuple[float, ...] = (1e-3, 4e-3)


def parity(length: int, batch: int, generator: torch.Generator) -> Examples:
    """Return bits; asked after each: is the number of ones so far odd?

    >>> examples = parity(3, 1, torch.Generator().manual_seed(0))
    >>> examples.ids.tolist(), examples.targets.tolist(), examples.distance.tolist()
    ([[0, 1, 1]], [[0, 1, 0]], [[1, 2, 3]])
    """
    ids = torch.randint(2, (batch, length), generator=generator)
    return Examples(ids=ids, targets=ids.cumsum(dim=1) % 2, distance=_positions(ids))


def permuted(length: int, batch: int, generator: torch.Generator) -> Examples:
    """Return permutations of three things; asked after each: which order are they in now?"""
    ids = torch.randint(6, (batch, length), generator=generator)
    table, state, states = _products(), torch.zeros(batch, dtype=torch.long), []
    for position in range(length):
        state = table[state, ids[:, position]]
        states.append(state)
    return Examples(ids=ids, targets=torch.stack(states, dim=1), distance=_positions(ids))


@cache
def _products() -> Tensor:
    """Return which permutation two are together, the first one first, `[6, 6]`."""
    each = [*permutations(range(3))]
    return torch.tensor([[each.index(tuple(a[i] for i in b)) for b in each] for a in each])


_SYMBOLS = 16
_COPIED = 8


def copied(length: int, batch: int, generator: torch.Generator) -> Examples:
    """Return eight symbols, blanks, a mark, and the same symbols, asked from the mark on.

    Each is asked `length` positions after it was said: eight at least. However far that is, 32 bits
    must be kept.
    """
    symbols = torch.randint(_SYMBOLS, (batch, _COPIED), generator=generator)
    blanks = symbols.new_full((batch, length - _COPIED), _SYMBOLS)
    mark = symbols.new_full((batch, 1), _SYMBOLS + 1)
    ids = torch.cat([symbols, blanks, mark, symbols[:, :-1]], dim=1)
    targets = torch.cat([symbols.new_full((batch, length), -1), symbols], dim=1)
    return Examples(ids=ids, targets=targets, distance=torch.full_like(ids, length))


_NAMES = 16
_PAIRS = 4
# of the tokens after them; with one in ten no recurrence had learned after three thousand steps to
# tell the names apart, nor ours after nine thousand
_ASKED_SHARE = 0.5


def induced(length: int, batch: int, generator: torch.Generator) -> Examples:
    """Return four keys, each with a name, then noise in which keys return: whose name is asked.

    A name is said once, at most `length` positions, seven at least, before it is asked for. Keys
    are every other token of the noise, about.
    """
    keys = torch.rand(batch, _NAMES, generator=generator).argsort(dim=1)[:, :_PAIRS]
    names = torch.randint(_NAMES, (batch, _PAIRS), generator=generator)
    told = torch.stack([keys, names + _NAMES], dim=-1).flatten(1)
    # the first name stands seven positions before the noise
    count = length - 2 * (_PAIRS - 1)
    noise = torch.randint(_SYMBOLS, (batch, count), generator=generator) + 2 * _NAMES
    asked = torch.rand(batch, count, generator=generator) < _ASKED_SHARE
    asked[:, -1] = True
    which = torch.randint(_PAIRS, (batch, count), generator=generator)
    ids = torch.cat([told, torch.where(asked, keys.gather(1, which), noise)], dim=1)
    answers = torch.where(asked, names.gather(1, which) + _NAMES, -1)
    targets = torch.cat([torch.full_like(told, -1), answers], dim=1)
    distance = torch.cat([torch.zeros_like(told), 2 * (_PAIRS - which) - 1
                          + torch.arange(count)], dim=1)  # fmt: skip
    return Examples(ids=ids, targets=targets, distance=distance)


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(1, ids.shape[1] + 1).expand_as(ids)


TASKS: dict[str, Task] = {
    "parity": Task(vocab_size=2, draw=parity, chance=1 / 2, shortest=4),
    "S3": Task(vocab_size=6, draw=permuted, chance=1 / 6, shortest=4),
    "copy": Task(vocab_size=_SYMBOLS + 2, draw=copied, chance=1 / _SYMBOLS, shortest=_COPIED),
    # one of the names that were said
    "induction": Task(
        vocab_size=2 * _NAMES + _SYMBOLS,
        draw=induced,
        chance=1 / _PAIRS + (1 - 1 / _PAIRS) / _NAMES,
        shortest=2 * _PAIRS,
        # ours learns which name is whose all at once, after some 4,500 steps
        num_steps=9000,
        learning_rates=(4e-3, 8e-3),
    ),
}


def solved(*, asked_seed: int, **given: Any) -> Numbers:
    """Train a model with `learned`; return the share of right answers by distance.

    Args:
        asked_seed: of the texts that are asked about.
        given: what `learned` is given.

    Returns:
        Shares, their errors and what was trained; or that its numbers became NaN or infinite.
    """
    begun_at = time.perf_counter()
    try:
        made = learned(**given)
        seconds = time.perf_counter() - begun_at
        found = by_distance(made, TASKS[given["task"]], seed=asked_seed, longest=LONGEST)
    except NonFiniteError as error:
        return {"diverged": str(error)}
    cells = made.cells() if isinstance(made, NewLLM) else []
    q2 = [cell.coupling()["q2"] for cell in cells if isinstance(cell, ConvexCell)]
    return {
        "parameters": num_parameters(made),
        "carried": num_carried(made),
        "q2": max(q2) if q2 else None,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": _device_of(made),
        "accuracy": {str(distance): share for distance, (share, _) in found.items()},
        "error": {str(distance): error for distance, (_, error) in found.items()},
    }


def forgotten(*, asked_seed: int, **given: Any) -> Numbers:
    """Train as `solved` does; return what is left of the first token, by the tokens after it."""
    try:
        made = learned(**given)
        left = what_is_left(made, TASKS[given["task"]], seed=asked_seed, longest=LONGEST)
    except NonFiniteError as error:
        return {"diverged": str(error)}
    return {
        "left": {str(distance): share for distance, share in left.items()},
        "torch": torch.__version__,
        "device": _device_of(made),
    }


def _device_of(model: LanguageModel) -> str:
    return device_name(str(model.readout.weight.device))


def learned(
    *, task: str, model: Numbers, training: Numbers, seed: int, device: str = "cpu"
) -> LanguageModel:
    """Return a model trained on a task.

    Args:
        task: of `TASKS`.
        model: fields of `ModelConfig` or `PeerConfig`.
        training: fields of `Phase2Config`, of which steps, batch and optimiser count.
        seed: of weights and texts, which are drawn on the CPU.
        device: of PyTorch.

    Raises:
        NonFiniteError: the loss became NaN.
    """
    chosen, config = TASKS[task], Phase2Config(**training)
    torch.manual_seed(seed)
    torch.backends.cudnn.allow_tf32 = False
    made = build(model, chosen.vocab_size).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimisers, num_steps = make_optimisers(made, config), config.max_steps or 1
    for step in range(num_steps):
        length = int(torch.randint(chosen.shortest, TRAINED + 1, (), generator=generator))
        examples = chosen.draw(length, config.batch_size, generator).to(device)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, num_steps, config)
        asked = examples.targets >= 0
        features = made(examples.ids).features[asked]
        weights = torch.full((len(features),), 1.0 / len(features), device=device)
        loss = token_losses(
            features, made.readout.weight, examples.targets[asked], weights, chunk=config.loss_chunk
        ).loss
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss of {task} must stay finite, got {loss} in step {step}")
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), config.gradient_clip)
        for optimiser in optimisers:
            optimiser.step()
    return made.eval()


def num_carried(model: LanguageModel) -> int | None:
    """Return how many numbers a model carries from position to position; None is all it read.

    >>> shape = {"embedding_width": 8, "width": 8, "mlp_width": 8}
    >>> [num_carried(build({"kind": kind} | shape, 9)) for kind in ("lstm", "gru", "gpt")]
    [32, 16, None]
    """
    if isinstance(model, Peer) and model.config.kind == "gpt":
        return None
    return model.initial_context(1).numel()


@torch.no_grad()
def by_distance(
    model: LanguageModel, task: Task, *, seed: int, longest: int
) -> dict[int, tuple[float, float]]:
    """Return shares of right answers and their standard errors over texts, by distance.

    A key of 16 is of distances from 13 to 16, one of 8 of 7 and 8, and so on doubled: a mean over
    more would hide that the farthest ones fail.
    """
    generator = torch.Generator().manual_seed(seed)
    found, edge = {}, 8
    while edge <= longest:
        left = min(_MOST, max(_FEWEST, _POSITIONS // edge))
        each: list[Tensor] = []
        while left > 0:
            count = min(left, max(1, _SIDE_BY_SIDE // edge))
            each.append(_answers(model, task.draw(edge, count, generator), edge))
            left -= count
        right, asked = torch.cat(each, dim=1).double()
        share = right.sum() / asked.sum()
        # answers of one text hang together
        error = (right - share * asked).square().sum().sqrt() / asked.sum()
        found[edge] = (share.item(), error.item())
        edge *= 2
    return found


def _answers(model: LanguageModel, examples: Examples, edge: int) -> Tensor:
    """Return how many answers of each text are right, and how many were asked for, `[2, B]`."""
    examples = examples.to(model.readout.weight.device)
    near = examples.distance <= edge - edge // 4
    far = (examples.targets >= 0) & ~near & (examples.distance <= edge)
    said = (model(examples.ids).features[far] @ model.readout.weight.T).argmax(dim=-1)
    right = torch.zeros_like(far)
    right[far] = said == examples.targets[far]
    return torch.stack([right.sum(dim=1), far.sum(dim=1)]).cpu()


@torch.no_grad()
def what_is_left(model: LanguageModel, task: Task, *, seed: int, longest: int) -> dict[int, float]:
    """Return how much is left of what the first token changed, by the number of tokens read.

    Pairs of texts differ in their first token alone. What is left is the distance of their contexts
    as a share of what it was after that token, a median over pairs: of a contraction it tends to
    zero, though in each of `LASTING` the right answers differ for ever.
    """
    texts = task.draw(longest, _TWINS, torch.Generator().manual_seed(seed)).ids
    twins = texts.clone()
    twins[:, 0] = (twins[:, 0] + 1) % task.vocab_size
    ids = torch.cat([texts, twins]).to(model.readout.weight.device)
    context, read, apart = model.initial_context(len(ids)), 0, {}
    for edge in (1, *(1 << k for k in range(3, longest.bit_length()))):
        context = model(ids[:, read:edge], context).context
        one, other = context.flatten(1).double().chunk(2)
        apart[edge], read = (one - other).norm(dim=1), edge
    return {edge: (each / apart[1]).median().item() for edge, each in apart.items() if edge > 1}


def holds_until(shares: dict[str, float], least: float = HELD) -> int:
    """Return the distance up to which every share is no less, 0 for none.

    >>> holds_until({"8": 1.0, "16": 0.95, "32": 0.4, "64": 0.95})
    16
    """
    held = 0
    for distance, share in shares.items():
        if share < least:
            break
        held = int(distance)
    return held


@dataclass(frozen=True, kw_only=True)
class LongMemory:
    """All tasks for all models, and where the trials are kept."""

    console: Console
    out: Path | None = None
    num_steps: int | None = None
    """Of each training; None is as many as the task says."""
    num_seeds: int = 3
    """Of each model as a first seed, which is not among them, found best."""
    width: int = 64
    learning_rates: tuple[float, ...] | None = None
    """To choose from; None are those of the task."""
    num_workers: int | None = None
    device: str = "cpu"

    def run(self) -> list[Numbers]:
        """Train what is not kept yet; return a row a task and model."""
        ways = {
            (task, name): [
                (shape, rate) for shape in begun(model) for rate in self._rates(given, model)
            ]
            for task, given in TASKS.items()
            for name, model in self.models(given.vocab_size).items()
        }
        with Runner(
            console=self.console,
            folder=None if self.out is None else self.out / "trials",
            num_workers=self.num_workers,
        ) as runner:

            def solve(
                title: str, asked: list[Numbers], trial: Callable[..., Numbers] = solved
            ) -> Iterator[Numbers]:
                return iter(runner.run(title, trial, asked, places={"device": self.device}))

            # a first seed chooses how each begins and its learning rate, for all seeds
            tried = solve(
                "time-scales and learning rates",
                [self._arguments(pair[0], *way, 0, CHOSEN_ON)
                 for pair, each in ways.items() for way in each],
            )  # fmt: skip
            best: dict[tuple[str, str], tuple[Numbers, float]] = {}
            for pair, each in ways.items():
                reached = [_reached(next(tried)) for _ in each]
                best[pair] = each[reached.index(max(reached))]
            seeds = {
                pair: [self._arguments(pair[0], *way, 1 + seed, SCORED_ON)
                       for seed in range(self.num_seeds)]
                for pair, way in best.items()
            }  # fmt: skip
            found = solve("long memory", [*chain(*seeds.values())])
            rows = [
                _row(*pair, *way, [next(found) for _ in range(self.num_seeds)])
                | {"steps": self._steps(pair[0])}
                for pair, way in best.items()
            ]
            # weights are not kept: the same trainings again
            asked = {pair: each for pair, each in seeds.items()
                     if pair[0] in LASTING and pair[1] in CARRYING}  # fmt: skip
            left = solve("what is left", [*chain(*asked.values())], forgotten)
            return rows + [
                _row_left(*pair, [next(left) for _ in range(self.num_seeds)]) for pair in asked
            ]

    def _steps(self, task: str) -> int:
        return self.num_steps or TASKS[task].num_steps

    def _rates(self, task: Task, model: Numbers) -> tuple[float, ...]:
        """Return learning rates to try; what begins in one way only tries more."""
        rates = self.learning_rates or task.learning_rates
        if len(begun(model)) > 1:
            return rates
        return tuple(sorted({rate * share for rate in rates for share in (0.5, 1.0)}))

    def _arguments(
        self, task: str, model: Numbers, learning_rate: float, seed: int, asked_seed: int
    ) -> Numbers:
        """Return what `solved` is given."""
        steps = self._steps(task)
        training = Phase2Config(
            batch_size=32, warmup_steps=100, learning_rate=learning_rate,
            max_steps=steps, min_steps=steps,
            muon_precision="float32",  # on every CPU the same
        )  # fmt: skip
        return {
            "task": task,
            "model": model,
            "training": to_dict(training),
            "seed": seed,
            "asked_seed": asked_seed,
        }

    def models(self, vocab_size: int) -> dict[str, Numbers]:
        """Return ours at three limits of its coupling, and its peers, equally large."""
        shape = scaled(preset("convex").model, self.width)
        limits = {"convex": shape.coupling_limit, "convex, W_c = 0": 0.0, "convex, no limit": 100.0}
        found = {
            name: to_dict(replace(shape, coupling_limit=limit)) for name, limit in limits.items()
        }
        found["convex, W_c = 0"] = filled(found["convex, W_c = 0"], vocab_size)
        with torch.device("meta"):
            wanted = num_parameters(build(found["convex"], vocab_size))
        for kind in PEERS:
            carried = 16 if kind == "mamba" else self.width
            # attention reaches a whole text
            shaped = PeerConfig(kind=kind, embedding_width=self.width, width=carried,
                                window=2 * LONGEST, longest_timescale=None)  # fmt: skip
            bare = to_dict(shaped)
            found[kind] = matched(bare, wanted, vocab_size)
        return found


def begun(model: Numbers) -> list[Numbers]:
    """Return a shape by how its gates begin: at time-scales, and a peer's as is usual for it.

    What lies a thousand tokens back needs gates that keep; such gates do not learn parity.
    """
    if model.get("kind") in ("gpt", "mamba"):
        return [model]
    usual = [model] if "kind" in model else []
    return usual + [model | {"longest_timescale": longest} for longest in TIMESCALES]


def _reached(numbers: Numbers) -> tuple[int, float]:
    """Return how far a trained model holds, and its share of right answers near by."""
    if "diverged" in numbers:
        return -1, 0.0
    return holds_until(numbers["accuracy"]), numbers["accuracy"][str(TRAINED)]


def _row(
    task: str, name: str, model: Numbers, learning_rate: float, found: list[Numbers]
) -> Numbers:
    """Return one row: how far each seed holds, and mean shares of right answers by distance."""
    ended = [numbers for numbers in found if "diverged" not in numbers]
    q2 = [numbers["q2"] for numbers in ended if numbers["q2"] is not None]
    row: Numbers = {
        "table": task,
        "model": name,
        "chance": TASKS[task].chance,
        "parameters": ended[0]["parameters"] if ended else None,
        "carried": ended[0]["carried"] if ended else None,
        "MLP width": model["mlp_width"],
        "q2": max(q2) if q2 else None,
        "learning_rate": learning_rate,
        "time-scales": model["longest_timescale"] if len(begun(model)) > 1 else None,
        "holds until": [
            None if "diverged" in numbers else holds_until(numbers["accuracy"]) for numbers in found
        ],
    }
    for distance in ended[0]["accuracy"] if ended else ():
        row[distance] = statistics.fmean(numbers["accuracy"][distance] for numbers in ended)
    row["standard error"] = max(
        (error for numbers in ended for error in numbers["error"].values()), default=None
    )
    return row | {"seconds": statistics.median(n["seconds"] for n in ended) if ended else None,
                  "trained on": places_of(ended)}  # fmt: skip


def _row_left(task: str, name: str, found: list[Numbers]) -> Numbers:
    """Return one row: until where two contexts stay apart, seed by seed, and medians of how far."""
    ended = [numbers for numbers in found if "diverged" not in numbers]
    row: Numbers = {
        "table": "forgetting",
        "task": task,
        "model": name,
        "left until": [
            None if "diverged" in numbers else holds_until(numbers["left"], least=LEFT)
            for numbers in found
        ],
    }
    for distance in ended[0]["left"] if ended else ():
        row[distance] = statistics.median(numbers["left"][distance] for numbers in ended)
    return row | {"trained on": places_of(ended)}
