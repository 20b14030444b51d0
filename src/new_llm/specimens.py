"""Models that have a verdict by the way they are made: what the doctor is examined with.

Sizes, weights and their perturbation are drawn at random; what makes the kind is set by
hand, or trained. No threshold of the doctor was chosen by looking at them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cell import ConvexCell
from .config import CellName, ModelConfig, Phase1Config, SolverConfig
from .data import TokenStore, held_out_ids
from .evaluate import sequence_verdict, token_verdict
from .model import NewLLM
from .phase1 import train_contractive

# largest relative noise on every weight
_NOISE = 0.05
_TEXT = (8, 256)
_HEALTHY_STEPS = 400


@dataclass(frozen=True)
class Draw:
    """What a kind is made of."""

    model: NewLLM
    generator: torch.Generator

    @property
    def cell(self) -> Any:
        """The only cell."""
        return self.model.cells()[0]

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def normal(self, *shape: int) -> Tensor:
        """Return unit normal numbers."""
        return torch.randn(shape, generator=self.generator)


def _zero_convex(draw: Draw) -> None:
    draw.cell.to_delta.weight.mul_(draw.uniform(1e-3, 5e-2))


def _zero_seed(draw: Draw) -> None:
    for norm in draw.cell.norms:
        norm.weight.mul_(draw.uniform(1e-3, 5e-2))


def _constant_convex(draw: Draw) -> None:
    cell = draw.cell
    cell.from_token.weight.mul_(draw.uniform(0.0, 0.05))
    cell.from_token.bias.copy_(draw.normal(len(cell.from_token.bias)))


def _constant_seed(draw: Draw) -> None:
    """Blind to the token; the gates' biases decide where all of them settle."""
    cell = draw.cell
    for layer in cell.hidden:
        if layer.weight.shape[1] > cell.embedding_width:
            layer.weight[:, : cell.embedding_width].mul_(draw.uniform(0.0, 0.01))
    for gate in cell.gates:
        gate.bias[: cell.context_width].copy_(2.0 * draw.normal(cell.context_width))


def _identity(draw: Draw) -> None:
    """Forget nothing, insert hardly anything: every context stays where it is."""
    for gate in draw.cell.gates:
        _, forget, insert = gate.bias.chunk(3)
        forget.fill_(draw.uniform(8.0, 10.0))
        insert.fill_(draw.uniform(-8.0, -6.5))


def _two_attractors(draw: Draw) -> None:
    """One hidden unit reads on which side of a plane the context is, and pushes it there."""
    cell = draw.cell
    width = cell.context_width
    side = torch.zeros(width)
    side[: width // 3] = draw.normal(width // 3).sign()
    cell.from_context.weight.zero_()
    cell.from_context.weight[0] = draw.uniform(20.0, 40.0) * side / side.square().sum()
    cell.from_token.weight[0].zero_()
    cell.from_token.weight[1:].mul_(0.7)
    # a larger push would move contexts on both sides further apart than they were
    cell.to_delta.weight[:, 0] = draw.uniform(0.6, 0.9) * side
    _read_all(cell)


def _expansion(draw: Draw) -> None:
    """Random weights far beyond the edge of chaos."""
    cell = draw.cell
    gain = draw.uniform(3.0, 5.0)
    for layer in (cell.from_context, cell.to_delta):
        layer.weight.copy_(draw.normal(*layer.weight.shape) * gain * layer.weight.shape[1] ** -0.5)
    cell.from_token.weight.mul_(0.2)
    # the present context replaces the last one, or its growth would be averaged away
    cell.to_forget.bias.fill_(-4.0)
    _read_all(cell)


def _read_all(cell: Any) -> None:
    """Let no token turn away from the context."""
    cell.to_share.weight.zero_()
    cell.to_share.bias.fill_(4.0)


def _few_directions(draw: Draw) -> None:
    cell = draw.cell
    width, rank = cell.context_width, max(2, cell.context_width // 16)
    basis = torch.linalg.qr(draw.normal(width, rank))[0]
    cell.to_delta.weight.copy_(basis @ (basis.T @ cell.to_delta.weight))
    cell.to_delta.weight.mul_(draw.uniform(0.8, 1.2))
    # few directions carry little: larger tokens, or they would be next to zero
    cell.from_token.weight.mul_(3.0)


def _decoupled(draw: Draw) -> None:
    draw.cell.from_context.weight.mul_(draw.uniform(0.0, 0.03))


def _bigram(draw: Draw) -> None:
    """Read the token and nothing else."""
    cell = draw.cell
    for layer in cell.hidden:
        if layer.weight.shape[1] > cell.embedding_width:
            layer.weight[:, cell.embedding_width :].zero_()
    for gate in cell.gates:
        gate.bias.chunk(3)[1].fill_(draw.uniform(-14.0, -10.0))


def _healthy_convex(draw: Draw) -> None:
    """Random tokens, an orthogonal coupling under its limit: contraction by construction."""


def _trained(draw: Draw) -> None:
    model = draw.model
    held_out = held_out_ids(model.vocab_size, model.config.context_width)
    ids = torch.from_numpy(np.setdiff1d(np.arange(model.vocab_size), held_out))
    with torch.enable_grad():
        train_contractive(
            draw.cell,
            model.search(ids, SolverConfig(max_iterations=1)).inputs[0].detach(),
            Phase1Config(max_steps=_HEALTHY_STEPS),
            seed=0,
            log=lambda row: None,
            advance=lambda amount=1, note="": None,
        )


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to make models of one verdict."""

    verdict: str
    cell: CellName
    make: Callable[[Draw], None]
    scope: str = "token"
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the model's config."""


_ORTHOGONAL = (("initialisation", "orthogonal"), ("num_layers", 2))
_TANH = (("coupling_limit", 100.0), ("activation", "tanh"))
_SHORT = (("longest_timescale", 1.5),)

KINDS: dict[str, Kind] = {
    "zero, Convex": Kind(verdict="zero_collapse", cell="convex", make=_zero_convex),
    "zero, Sequential": Kind(
        verdict="zero_collapse", cell="sequential", make=_zero_seed, changes=_ORTHOGONAL
    ),
    "zero, Layer-wise": Kind(
        verdict="zero_collapse", cell="layerwise", make=_zero_seed, changes=_ORTHOGONAL
    ),
    "one vector, Convex": Kind(verdict="global_attractor", cell="convex", make=_constant_convex),
    "one vector, Layer-wise": Kind(
        verdict="global_attractor", cell="layerwise", make=_constant_seed, changes=_ORTHOGONAL
    ),
    "identity, Sequential": Kind(
        verdict="identity_map", cell="sequential", make=_identity, changes=_ORTHOGONAL
    ),
    "identity, Layer-wise": Kind(
        verdict="identity_map", cell="layerwise", make=_identity, changes=_ORTHOGONAL
    ),
    "two attractors, Convex": Kind(
        verdict="multi_stable", cell="convex", make=_two_attractors, changes=_TANH
    ),
    "expansion, Convex": Kind(verdict="expanding", cell="convex", make=_expansion, changes=_TANH),
    "expansion, carried, Convex": Kind(
        verdict="expanding", cell="convex", make=_expansion, scope="sequence", changes=_TANH
    ),
    "few directions, Convex": Kind(verdict="low_rank", cell="convex", make=_few_directions),
    "W_c = 0, Convex": Kind(
        verdict="decoupled",
        cell="convex",
        make=_healthy_convex,
        changes=(("coupling_limit", 0.0),),
    ),
    "W_c near 0, Convex": Kind(verdict="decoupled", cell="convex", make=_decoupled),
    "W_c = 0, carried, Convex": Kind(
        verdict="decoupled",
        cell="convex",
        make=_healthy_convex,
        scope="sequence",
        changes=(("coupling_limit", 0.0),),
    ),
    "token only, carried, Sequential": Kind(
        verdict="amnesic",
        cell="sequential",
        make=_bigram,
        scope="sequence",
        changes=_ORTHOGONAL,
    ),
    "token only, carried, Layer-wise": Kind(
        verdict="amnesic", cell="layerwise", make=_bigram, scope="sequence", changes=_ORTHOGONAL
    ),
    "contraction, Convex": Kind(verdict="healthy", cell="convex", make=_healthy_convex),
    "cured, Sequential": Kind(
        verdict="healthy", cell="sequential", make=_trained, changes=_ORTHOGONAL
    ),
    "cured, Layer-wise": Kind(
        verdict="healthy", cell="layerwise", make=_trained, changes=_ORTHOGONAL
    ),
}


@torch.no_grad()
def make_specimen(name: str, seed: int) -> NewLLM:
    """Return a model of a kind, its sizes, weights and perturbation drawn from a seed.

    >>> make_specimen("W_c = 0, Convex", 3).cells()[0].coupling()["q2"]
    0.0
    """
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    width = 8 * between(4, 12)
    config = ModelConfig(
        **{
            "cell": kind.cell,
            "num_blocks": 1,
            "context_width": width,
            "embedding_width": width + 8 * between(0, 4),
            "hidden_width": width + 8 * between(0, 8),
            "mlp_width": 0,
            **dict(kind.changes),
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw = Draw(NewLLM(config, width * between(12, 24)), generator)
        kind.make(draw)
        _perturb(draw)
    if isinstance(draw.cell, ConvexCell):
        draw.cell.sharpen()
    return draw.model.eval()


def _perturb(draw: Draw) -> None:
    noise = draw.uniform(0.0, _NOISE)
    for layer in draw.cell.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(1.0 + noise * draw.normal(*layer.weight.shape))


def examine(name: str, seed: int) -> str:
    """Return the doctor's verdict on a specimen, in the scope its kind is about."""
    model = make_specimen(name, seed)
    if KINDS[name].scope == "token":
        return token_verdict(model).verdict
    return sequence_verdict(model, _random_text(model.vocab_size, seed), trained=True).verdict


def _random_text(vocab_size: int, seed: int) -> TokenStore:
    count, length = _TEXT
    tokens = np.random.default_rng(seed).integers(vocab_size, size=count * length, dtype=np.int32)
    return TokenStore(
        tokens=tokens,
        assistant=np.zeros(len(tokens), dtype=bool),
        offsets=np.arange(count + 1, dtype=np.int64) * length,
        num_content_bytes=np.full(count, length, dtype=np.int64),
        fingerprint="random",
    )
