"""Long memory: tasks whose answer stands far back, for ours and its peers at equal parameters.

Each task is drawn anew for every step, so that nothing can be learned by heart. Models train on
short texts and are asked at distances far past them. Axes: `B` texts, `T` positions.

Sources: copying and recall as in "Unitary evolution recurrent neural networks" (arXiv:1511.06464)
and "Zoology" (arXiv:2312.04927); parity and the permutations of three as in "The illusion of state
in state-space models" (arXiv:2404.08819).
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from .config import PeerConfig, Phase2Config, preset, scaled, to_dict
from .console import Console
from .errors import NonFiniteError
from .model import LanguageModel, num_parameters, token_losses
from .phase2 import learning_rate, make_optimisers
from .quality import PEERS, build, device_name, matched, places_of
from .runner import Numbers, Runner

# a position counts as answered where at least this share of texts is right
HELD = 0.9
# texts train on distances up to this, and are asked up to LONGEST
TRAINED = 64
LONGEST = 2048
# of the slowest unit, in tokens, at the start: tried beside how gates usually begin
LONG_TIMESCALE = 1000.0
_SHORTEST = 4


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
    """Share of right answers of a model that remembers nothing."""


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


def copied(length: int, batch: int, generator: torch.Generator) -> Examples:
    """Return symbols, a mark, and the same symbols: what follows each from the mark on is asked."""
    symbols = torch.randint(_SYMBOLS, (batch, length), generator=generator)
    mark = symbols.new_full((batch, 1), _SYMBOLS)
    ids = torch.cat([symbols, mark, symbols[:, :-1]], dim=1)
    targets = torch.cat([torch.full_like(symbols, -1), symbols], dim=1)
    return Examples(ids=ids, targets=targets, distance=torch.full_like(ids, length))


_NAMES = 16
_PAIRS = 4
_ASKED_SHARE = 0.1


def induced(length: int, batch: int, generator: torch.Generator) -> Examples:
    """Return four keys, each with a name, then noise in which keys return: whose name is asked.

    A name is said once. `length` is how far the noise reaches; keys are one token in ten of it.
    """
    keys = torch.rand(batch, _NAMES, generator=generator).argsort(dim=1)[:, :_PAIRS]
    names = torch.randint(_NAMES, (batch, _PAIRS), generator=generator)
    told = torch.stack([keys, names + _NAMES], dim=-1).flatten(1)
    noise = torch.randint(_SYMBOLS, (batch, length), generator=generator) + 2 * _NAMES
    asked = torch.rand(batch, length, generator=generator) < _ASKED_SHARE
    asked[:, -1] = True
    which = torch.randint(_PAIRS, (batch, length), generator=generator)
    ids = torch.cat([told, torch.where(asked, keys.gather(1, which), noise)], dim=1)
    answers = torch.where(asked, names.gather(1, which) + _NAMES, -1)
    targets = torch.cat([torch.full_like(told, -1), answers], dim=1)
    distance = torch.cat([torch.zeros_like(told), 2 * (_PAIRS - which) - 1
                          + torch.arange(length)], dim=1)  # fmt: skip
    return Examples(ids=ids, targets=targets, distance=distance)


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(1, ids.shape[1] + 1).expand_as(ids)


TASKS: dict[str, Task] = {
    "parity": Task(vocab_size=2, draw=parity, chance=1 / 2),
    "S3": Task(vocab_size=6, draw=permuted, chance=1 / 6),
    "copy": Task(vocab_size=_SYMBOLS + 1, draw=copied, chance=1 / _SYMBOLS),
    "induction": Task(vocab_size=2 * _NAMES + _SYMBOLS, draw=induced, chance=1 / _NAMES),
}


def solved(
    *, task: str, model: Numbers, training: Numbers, seed: int, device: str = "cpu"
) -> Numbers:
    """Train a model on a task; return the share of right answers by distance.

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
        length = int(torch.randint(_SHORTEST, TRAINED + 1, (), generator=generator))
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
    made.eval()
    shares = by_distance(made, chosen)
    return {
        "parameters": num_parameters(made),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device_name(device),
        "accuracy": {str(distance): share for distance, share in shares.items()},
    }


@torch.no_grad()
def by_distance(
    model: LanguageModel, task: Task, *, longest: int = LONGEST, batch: int = 32, seed: int = 1
) -> dict[int, float]:
    """Return the share of right answers at distances up to 8, from 9 to 16, and so on doubled."""
    generator = torch.Generator().manual_seed((1 << 32) + seed)
    shares, edge = {}, 8
    while edge <= longest:
        # the last of a text of this length: an answer behind noise, or after a long text
        examples = task.draw(edge, batch, generator).to(model.readout.weight.device)
        far = (examples.targets >= 0) & (examples.distance > edge // 2)
        features = model(examples.ids).features[far]
        said = (features @ model.readout.weight.T).argmax(dim=-1)
        shares[edge] = (said == examples.targets[far]).double().mean().item()
        edge *= 2
    return shares


def holds_until(accuracy: dict[str, float]) -> int:
    """Return the distance up to which at least nine in ten answers are right, 0 for none.

    >>> holds_until({"8": 1.0, "16": 0.95, "32": 0.4, "64": 0.95})
    16
    """
    held = 0
    for distance, share in accuracy.items():
        if share < HELD:
            break
        held = int(distance)
    return held


@dataclass(frozen=True, kw_only=True)
class LongMemory:
    """All tasks for all models, and where the trials are kept."""

    console: Console
    out: Path | None = None
    num_steps: int = 3000
    num_seeds: int = 3
    width: int = 64
    learning_rates: tuple[float, ...] = (1e-3, 4e-3)
    num_workers: int | None = None
    device: str = "cpu"

    def run(self) -> list[Numbers]:
        """Train what is not kept yet; return a row a task and model."""
        ways = {
            (task, name): [(shape, rate) for shape in begun(model) for rate in self.learning_rates]
            for task, given in TASKS.items()
            for name, model in self.models(given.vocab_size).items()
        }
        with Runner(
            console=self.console,
            folder=None if self.out is None else self.out / "trials",
            num_workers=self.num_workers,
        ) as runner:

            def solve(title: str, asked: list[Numbers]) -> Iterator[Numbers]:
                return iter(runner.run(title, solved, asked, places={"device": self.device}))

            # a first seed chooses how each begins and its learning rate, for all seeds
            tried = solve(
                "time-scales and learning rates",
                [self._arguments(pair[0], *way, 0) for pair, each in ways.items() for way in each],
            )
            best: dict[tuple[str, str], tuple[Numbers, float]] = {}
            for pair, each in ways.items():
                reached = [_reached(next(tried)) for _ in each]
                best[pair] = each[reached.index(max(reached))]
            # its step takes five times as long as the others'
            seeds = {pair: range(1 if pair[1] == "mamba" else self.num_seeds) for pair in ways}
            found = solve(
                "long memory",
                [self._arguments(pair[0], *way, seed)
                 for pair, way in best.items() for seed in seeds[pair]],
            )  # fmt: skip
            return [
                _row(*pair, *way, [next(found) for _ in seeds[pair]]) for pair, way in best.items()
            ]

    def _arguments(self, task: str, model: Numbers, learning_rate: float, seed: int) -> Numbers:
        """Return what `solved` is given."""
        training = Phase2Config(
            batch_size=32, warmup_steps=100, learning_rate=learning_rate,
            max_steps=self.num_steps, min_steps=self.num_steps,
            muon_precision="float32",  # on every CPU the same
        )  # fmt: skip
        return {"task": task, "model": model, "training": to_dict(training), "seed": seed}

    def models(self, vocab_size: int) -> dict[str, Numbers]:
        """Return ours at three limits of its coupling, and its peers, equally large."""
        shape = scaled(preset("convex").model, self.width)
        limits = {"convex": shape.coupling_limit, "convex, W_c = 0": 0.0, "convex, no limit": 100.0}
        found = {
            name: to_dict(replace(shape, coupling_limit=limit)) for name, limit in limits.items()
        }
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
    """Return a shape as its gates usually begin, and with long time-scales where it has any.

    What lies a thousand tokens back needs gates that keep; such gates do not learn parity.
    """
    if model.get("kind") in ("gpt", "mamba"):
        return [model]
    return [model, model | {"longest_timescale": LONG_TIMESCALE}]


def _reached(numbers: Numbers) -> tuple[int, float]:
    """Return how far a trained model holds, and its share of right answers near by."""
    return holds_until(numbers["accuracy"]), numbers["accuracy"][str(TRAINED)]


def _row(
    task: str, name: str, model: Numbers, learning_rate: float, found: list[Numbers]
) -> Numbers:
    """Return one row: how far each seed holds, and mean shares of right answers by distance."""
    row: Numbers = {
        "table": task,
        "model": name,
        "parameters": found[0]["parameters"],
        "learning_rate": learning_rate,
        "time-scales": model["longest_timescale"] if len(begun(model)) > 1 else None,
        "holds until": [holds_until(numbers["accuracy"]) for numbers in found],
    }
    for distance in found[0]["accuracy"]:
        row[distance] = statistics.fmean(numbers["accuracy"][distance] for numbers in found)
    return row | {"trained on": places_of(found)}
