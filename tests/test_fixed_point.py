import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from new_llm import fixed_point
from new_llm.cell import ContextCell, ConvexCell, Weights
from new_llm.config import SolverConfig
from new_llm.errors import NonFiniteError
from new_llm.fixed_point import measure, solve
from new_llm.model import solve_tokens


def linear(rate: Tensor, shift: Tensor) -> object:
    return lambda context, rows: rate[rows][:, None] * context + shift[rows]


@settings(max_examples=30, deadline=None)
@given(
    rates=st.lists(st.floats(-0.9, 0.9), min_size=1, max_size=6),
    damping=st.sampled_from([0.0, 0.3]),
    method=st.sampled_from(["picard", "anderson"]),
)
def test_finds_the_solution_of_linear_maps(rates: list[float], damping: float, method: str) -> None:
    rate = torch.tensor(rates, dtype=torch.float64)
    shift = torch.randn(len(rates), 3, dtype=torch.float64)
    found = solve(
        linear(rate, shift),  # pyright: ignore
        torch.zeros(len(rates), 3, dtype=torch.float64),
        tolerance=1e-10,
        max_iterations=2000,
        damping=damping,
        method=method,  # pyright: ignore
    )
    assert found.converged.all()
    torch.testing.assert_close(found.context, shift / (1 - rate)[:, None], atol=1e-7, rtol=1e-7)


def test_iterations_are_counted_up_to_the_first_under_the_threshold() -> None:
    # changes of 0.5 c + 1 from zero are 1, 1/2, 1/4, ...: the fifth is the first under 0.1
    found = solve(lambda c, rows: 0.5 * c + 1.0, torch.zeros(1, 1), metric="l2", tolerance=0.1)
    assert found.num_iterations.tolist() == [5]
    assert found.change.item() == pytest.approx(1 / 16)
    assert found.context.item() == pytest.approx(2 - 1 / 16)
    assert len(found.curve) == 5


def test_warm_up_is_not_looked_at() -> None:
    found = solve(lambda c, rows: 0.5 * c, torch.ones(1, 1), metric="l2", tolerance=1.0, warmup=7)
    assert found.num_iterations.tolist() == [8]


def test_unconverged_tokens_count_as_the_cap_and_are_a_result() -> None:
    rate = torch.tensor([0.1, 1.0])
    found = solve(
        lambda c, rows: rate[rows][:, None] * c + 1.0,
        torch.zeros(2, 1),
        metric="l2",
        tolerance=2e-3,
        max_iterations=9,
    )
    assert found.converged.tolist() == [True, False]
    assert found.num_iterations.tolist() == [4, 9]
    assert found.convergence_rate == 0.5
    assert found.mean_iterations == 6.5
    assert found.mean_iterations_converged == 4.0
    assert found.context[1].item() == 9.0


def test_converged_tokens_are_no_longer_computed() -> None:
    sizes = []

    def update(context: Tensor, rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        rate = torch.tensor([0.01, 0.5, 0.9])[rows]
        return rate[:, None] * context + 1.0

    solve(update, torch.zeros(3, 2), tolerance=1e-3)
    assert sizes[0] == 3 and sizes[-1] == 1 and 2 in sizes
    assert sizes == sorted(sizes, reverse=True)


def test_each_token_ends_where_it_would_alone() -> None:
    cell = ConvexCell(8, 4, 8).eval()
    projected, weights = cell.project(torch.randn(5, 4)), cell.weights()

    def search(chosen: Tensor) -> Tensor:
        part = projected[chosen]
        return solve(
            lambda c, rows: cell.search_map(c, part[rows], weights),
            torch.zeros(len(chosen), 8),
            tolerance=1e-4,
        ).context

    together = search(torch.arange(5))
    alone = torch.cat([search(torch.tensor([i])) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_the_gate_does_not_move_the_fixed_point() -> None:
    cell = ConvexCell(16, 4, 16).double().eval()
    projected, weights = cell.project(torch.randn(6, 4).double()), cell.weights()
    zero = torch.zeros(6, 16).double()
    fast = solve(lambda c, r: cell.search_map(c, projected[r], weights), zero, tolerance=1e-10)
    slow = solve(
        lambda c, r: cell.update(c, projected[r], weights),
        zero,
        tolerance=1e-12,
        max_iterations=20_000,
    )
    torch.testing.assert_close(fast.context, slow.context, atol=1e-7, rtol=0)
    assert fast.mean_iterations * 5 < slow.mean_iterations


def test_anderson_needs_fewer_iterations() -> None:
    matrix = torch.randn(12, 12, dtype=torch.float64)
    matrix = 0.95 * matrix / torch.linalg.matrix_norm(matrix, 2)
    shift = torch.randn(4, 12, dtype=torch.float64)

    def update(context: Tensor, rows: Tensor) -> Tensor:
        return context @ matrix.T + shift[rows]

    zero = torch.zeros(4, 12, dtype=torch.float64)
    plain = solve(update, zero, tolerance=1e-9, max_iterations=1000)
    mixed = solve(update, zero, tolerance=1e-9, max_iterations=1000, method="anderson")
    assert plain.converged.all() and mixed.converged.all()
    assert mixed.mean_iterations < 0.8 * plain.mean_iterations
    torch.testing.assert_close(mixed.context, plain.context, atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [2, 256])
def test_anderson_of_parallel_differences(width: int) -> None:
    """All differences lie on one line: least squares alone has no single solution."""
    found = solve(
        lambda context, rows: 0.5 * context + 1.0,
        torch.zeros(3, width),
        tolerance=1e-6,
        max_iterations=60,
        method="anderson",
    )
    assert found.converged.all() and found.mean_iterations < 10
    torch.testing.assert_close(found.context, torch.full((3, width), 2.0))


@pytest.mark.parametrize("coupling", [0.0, 0.95])
@pytest.mark.parametrize("width", [1, 16])
def test_anderson_where_single_precision_ends(width: int, coupling: float) -> None:
    """Near the end differences are rounding, which mixes into nothing useful, and never crashes."""
    torch.manual_seed(0)
    cell = ConvexCell(width, 64, 64, coupling_limit=coupling).eval()
    x, zero = torch.randn(200, 64), torch.zeros(200, width)
    solver = SolverConfig(method="anderson", tolerance=1e-8)
    found = solve_tokens(cell, x, zero, solver)
    plain = solve_tokens(cell, x, zero, SolverConfig(tolerance=1e-7))
    assert (found.change < 1e-6).all()
    torch.testing.assert_close(found.context, plain.context, atol=1e-5, rtol=1e-5)


def test_anderson_takes_the_plain_update_where_mixing_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = lambda a, b: (torch.full_like(b, torch.nan), None)  # noqa: E731
    monkeypatch.setattr(torch.linalg, "solve_ex", failed)
    update = lambda context, rows: 0.5 * context + 1.0  # noqa: E731
    zero = torch.zeros(3, 2)
    mixed = solve(update, zero, tolerance=1e-6, method="anderson")
    plain = solve(update, zero, tolerance=1e-6)
    assert torch.equal(mixed.context, plain.context)


def test_metrics_are_what_the_documents_mix_up() -> None:
    updated, context = torch.full((1, 256), 0.1), torch.zeros(1, 256)
    mse, l2 = measure(updated, context, "mse"), measure(updated, context, "l2")
    assert mse.item() == pytest.approx(0.01)
    assert l2.item() == pytest.approx(1.6)
    assert l2.item() == pytest.approx(math.sqrt(256 * mse.item()))
    assert measure(updated, context, "residual").item() == pytest.approx(1.0)
    assert measure(context, context, "residual").item() == 0.0


def test_not_a_number_is_an_error_and_names_the_iteration() -> None:
    def update(context: Tensor, rows: Tensor) -> Tensor:
        return context * 1e10

    with pytest.raises(NonFiniteError, match="iteration 2 of 50"):
        solve(update, torch.ones(1, 2), max_iterations=50)


@pytest.mark.parametrize(
    "numbers", [{"damping": 1.0}, {"tolerance": 0.0}, {"max_iterations": 0}, {"warmup": -1}]
)
def test_numbers_out_of_range(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"damping|tolerance"):
        solve(lambda c, r: c, torch.ones(1, 1), **numbers)  # pyright: ignore


def test_update_must_keep_the_shape() -> None:
    with pytest.raises(ValueError, match="keep"):
        solve(lambda c, r: c[:, :1], torch.ones(1, 2))


def test_what_an_update_returns_is_not_written_into() -> None:
    kept = torch.arange(6.0).reshape(3, 2)
    before = kept.clone()
    speed = torch.tensor([[0.0], [0.5], [0.9]])
    calls = []

    def update(context: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return kept if len(calls) == 1 else kept[rows] + speed[rows] * (context - kept[rows])

    solve(update, torch.full((3, 2), 9.0), tolerance=1e-4, max_iterations=50, warmup=1)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("method", ["picard", "anderson"])
def test_parts_of_the_tokens_are_solved_as_one(
    method: Literal["picard", "anderson"], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    speed = torch.rand(50, 1, generator=generator) * 0.9
    goal = torch.randn(50, 3, generator=generator)

    def update(context: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return goal[rows] + speed[rows] * torch.tanh(context - goal[rows])

    found = []
    for size in (1000, 7):
        monkeypatch.setitem(fixed_point.PART_TOKENS, "cpu", size)
        found.append(solve(update, torch.zeros(50, 3), max_iterations=40, method=method))
    one, parted = found
    for name in ("context", "converged", "num_iterations", "change", "curve"):
        torch.testing.assert_close(getattr(parted, name), getattr(one, name), msg=name)


class Slow(ContextCell):
    """`f(c, x) = rate c + (1 - rate) x`, each token's rate in front of its embedding."""

    context_width, embedding_width = 4, 5

    def project(self, x: Tensor) -> Tensor:
        return x

    def weights(self) -> Weights:
        return ()

    def update(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        rate, goal = projected[..., :1], projected[..., 1:]
        return rate * context + (1.0 - rate) * goal

    def forget_gates(self, context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        return projected[..., None, :1].expand_as(context[..., None, :])


@settings(max_examples=20, deadline=None)
@given(rates=st.lists(st.floats(0.0, 0.998), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_a_distance_is_reached_where_single_precision_is_not_enough(
    rates: list[float], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    goal = torch.randn(len(rates), 4, generator=generator)
    x = torch.cat([torch.tensor(rates)[:, None], goal], dim=1)
    solver = SolverConfig(tolerance=1e-6, max_iterations=100_000, distance=1e-5)
    found = solve_tokens(Slow(), x, torch.zeros(len(rates), 4), solver)
    error = (found.context - goal).norm(dim=1) / goal.norm(dim=1)
    assert found.context.dtype == torch.float32 and (error <= 1.1e-5).all()
    assert found.converged.all()


def test_the_distance_is_estimated_from_the_rate() -> None:
    rate = torch.tensor([0.5, 0.9], dtype=torch.float64)
    found = solve(
        lambda c, rows: rate[rows][:, None] * c + 1.0,
        torch.zeros(2, 1, dtype=torch.float64),
        tolerance=1e-6,
        max_iterations=1000,
    )
    exact = 1.0 / (1.0 - rate)
    left = (found.context[:, 0] - exact).abs() / exact
    torch.testing.assert_close(found.rate, rate.float(), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(found.distance, left.float(), rtol=2e-2, atol=0.0)
    assert torch.equal(found.distance, found.change * found.rate / (1.0 - found.rate))
    grows = solve(lambda c, rows: 1.1 * c + 1.0, torch.zeros(1, 1), metric="l2", max_iterations=20)
    assert grows.distance.isinf().all()


@settings(max_examples=60, deadline=None)
@given(rate=st.floats(-0.95, 0.95), damping=st.floats(0.01, 0.9))
def test_the_distance_covers_either_sign_with_damping(rate: float, damping: float) -> None:
    """Changes are of the undamped update, the rate of the damped iteration."""
    goal = torch.tensor([[1.0, 2.0]], dtype=torch.float64) / (1.0 - rate)
    found = solve(
        lambda c, rows: goal + rate * (c - goal),
        torch.zeros(1, 2, dtype=torch.float64),
        metric="l2",
        tolerance=1e-3,
        damping=damping,
        max_iterations=5000,
    )
    left = (found.context - goal).norm().item()
    assert left <= 1.01 * found.distance.item() + 1e-12


@pytest.mark.parametrize(("rate", "damping"), [(0.9, 0.5), (-0.9, 0.47), (-0.5, 0.33)])
def test_the_distance_with_damping_is_near_the_truth(rate: float, damping: float) -> None:
    goal = torch.tensor([[1.0, 2.0]]) / (1.0 - rate)
    found = solve(
        lambda c, rows: goal + rate * (c - goal),
        torch.zeros(1, 2),
        tolerance=1e-3,
        damping=damping,
        max_iterations=1000,
    )
    left = (found.context - goal).norm().item() / found.context.norm().item()
    assert found.distance.item() == pytest.approx(left, rel=0.05)
