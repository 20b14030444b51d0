"""Muon: equal to PyTorch's in exact arithmetic, whatever the shapes; whatever the CPU."""

from typing import Any, Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import small_model
from new_llm import optimiser
from new_llm.cell import ConvexCell
from new_llm.config import ModelConfig, PeerConfig, Phase2Config
from new_llm.model import NewLLM
from new_llm.optimiser import Muon, orthogonalised
from new_llm.peers import Peer
from new_llm.phase2 import make_optimisers

SHAPES = [(12, 12), (12, 12), (8, 20), (20, 8), (8, 20), (1, 6)]


def matrices() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def in_turn(matrix: Tensor, *, steps: int) -> Tensor:
    """Orthogonalise one matrix, in double precision, from the formula."""
    x = matrix.double() / matrix.double().norm()
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("fast", [False, True])
def test_steps_are_those_of_pytorch(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimiser, "fast_bfloat16", lambda device: fast)
    ours, theirs = matrices(), matrices()
    kwargs: Any = {"lr": 0.02, "weight_decay": 0.1}
    pair = (
        Muon(ours, **kwargs),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **kwargs),
    )
    before = [p.detach().clone() for p in ours]
    for step in range(4):
        torch.manual_seed(step)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for one in pair:
            one.step()
    # PyTorch's products are in bfloat16
    for one, other, old in zip(ours, theirs, before, strict=True):
        moved = (other - old).norm().item()
        assert moved > 0.0
        assert (one - other).norm().item() < 0.03 * moved


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_precision_is_the_one_that_phase_2_asks_for(
    precision: Literal["auto", "float32"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimiser, "fast_bfloat16", lambda device: True)
    model = NewLLM(ModelConfig(context_width=64, embedding_width=64, hidden_width=64), 50)
    config = Phase2Config(muon_precision=precision, learning_rate=1.0, weight_decay=0.0)
    muon = make_optimisers(model, config)[0]
    assert isinstance(muon, Muon)
    weight = cast(ConvexCell, model.cells()[0]).to_delta.weight
    with torch.no_grad():
        weight.zero_()
    torch.manual_seed(0)
    weight.grad = torch.randn(64, 64)
    muon.step()
    # momentum scales the first direction, which is then made as long as it ever is
    wanted = -0.2 * 8.0 * in_turn(weight.grad, steps=5)
    apart = ((weight - wanted).norm() / wanted.norm()).item()
    assert apart < 1e-5 if precision == "float32" else 1e-3 < apart < 0.1


def test_maps_that_share_a_matrix_move_as_if_each_had_its_own() -> None:
    torch.manual_seed(0)
    shared = [nn.Parameter(torch.randn(12, 8)) for _ in range(2)]
    apart = [[nn.Parameter(part.detach().clone()) for part in p.chunk(3)] for p in shared]
    pair = (
        Muon([{"params": shared, "parts": 3}], lr=0.1, weight_decay=0.1),
        Muon([part for parts in apart for part in parts], lr=0.1, weight_decay=0.1),
    )
    for _ in range(3):
        for matrix, parts in zip(shared, apart, strict=True):
            matrix.grad = torch.randn_like(matrix)
            for part, grad in zip(parts, matrix.grad.chunk(3), strict=True):
                part.grad = grad.clone()
        for one in pair:
            one.step()
    for matrix, parts in zip(shared, apart, strict=True):
        torch.testing.assert_close(matrix, torch.cat(parts))  # pyright: ignore


SHAPE = {"embedding_width": 16, "width": 16, "mlp_width": 24}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (ModelConfig(context_width=16, embedding_width=16, hidden_width=16, mlp_width=24), {2: 2}),
        (small_model("layerwise"), {2: 1, 3: 2}),
        (PeerConfig(kind="lstm", **SHAPE), {2: 2, 4: 4}),
        (PeerConfig(kind="gru", **SHAPE), {2: 2, 3: 4}),
        (PeerConfig(kind="mingru", **SHAPE), {2: 4}),
        (PeerConfig(kind="gpt", **SHAPE), {2: 2, 3: 2}),
        (PeerConfig(kind="mamba", **SHAPE), {2: 4, 3: 2}),
    ],
)
def test_gates_that_share_a_matrix_are_taken_apart(
    shape: ModelConfig | PeerConfig, expected: dict[int, int]
) -> None:
    model = NewLLM(shape, 50) if isinstance(shape, ModelConfig) else Peer(shape, 50)
    config = Phase2Config(optimiser="muon")
    muon = make_optimisers(model, config)[0]
    found = {group["parts"]: len(group["params"]) for group in muon.param_groups}
    assert {parts: count for parts, count in found.items() if parts > 1} == expected
    for group in muon.param_groups:
        assert all(len(matrix) % group["parts"] == 0 for matrix in group["params"])


def test_a_matrix_without_gradient_stays() -> None:
    still, moving = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    moving.grad = torch.eye(3)
    Muon([still, moving], 0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(3, 3))
    assert not torch.equal(moving, torch.ones(3, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 1000))
def test_matrices_of_one_shape_do_not_mix(rows: int, columns: int, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    each = torch.randn(3, rows, columns)
    found = orthogonalised(each, steps=steps)
    for one, expected in zip(found, each, strict=True):
        assert torch.allclose(one.double(), in_turn(expected, steps=steps), atol=1e-3)


def test_singular_vectors_stay() -> None:
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(10, 10))
    v, _ = torch.linalg.qr(torch.randn(10, 10))
    found = u.T @ orthogonalised((u * torch.linspace(0.3, 1.0, 10) @ v.T)[None])[0] @ v
    assert torch.allclose(found, torch.diag(found.diag()), atol=1e-4)
    assert ((found.diag() > 0.6) & (found.diag() < 1.3)).all()


def test_zero_gradients_move_nothing() -> None:
    weight = nn.Parameter(torch.eye(4))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], 0.1).step()
    assert torch.equal(weight, torch.eye(4))
