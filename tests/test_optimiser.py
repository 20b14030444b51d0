"""Muon: equal to PyTorch's in exact arithmetic, whatever the shapes; whatever the CPU."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from new_llm import optimiser
from new_llm.config import ModelConfig, Phase2Config
from new_llm.model import NewLLM
from new_llm.optimiser import Muon, orthogonalised
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
    weight = next(p for p in muon.param_groups[0]["params"] if p.shape == (64, 64))
    with torch.no_grad():
        weight.zero_()
    torch.manual_seed(0)
    weight.grad = torch.randn(64, 64)
    muon.step()
    # momentum scales the first direction, which is then made as long as it ever is
    wanted = -0.2 * 8.0 * in_turn(weight.grad, steps=5)
    apart = ((weight - wanted).norm() / wanted.norm()).item()
    assert apart < 1e-5 if precision == "float32" else 1e-3 < apart < 0.1


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
