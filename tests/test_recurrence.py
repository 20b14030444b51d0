import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from new_llm.cell import ConvexCell, SequentialCell
from new_llm.recurrence import linear_scan, scan, sweep


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 65), width=st.integers(1, 4), seed=st.integers()
)
def test_linear_scan_is_the_loop(batch: int, length: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    decay = torch.rand(batch, length, width, generator=generator, dtype=torch.float64)
    decay[decay < 0.1] = 0.0
    source = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    context = initial = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    expected = []
    for t in range(length):
        context = decay[:, t] * context + source[:, t]
        expected.append(context)
    found = linear_scan(decay, source, initial)
    torch.testing.assert_close(found, torch.stack(expected, dim=1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 63), (3, 300)])
def test_gate_scan_equals_scan(batch: int, length: int) -> None:
    cell = ConvexCell(32, 16, 32).eval()
    x, initial = torch.randn(batch, length, 16), torch.randn(batch, 32)
    starts = torch.rand(batch, length) < 0.05
    real = torch.ones(batch, length, dtype=torch.bool)
    real[-1, length // 2 :] = length == 1
    swept = sweep(cell, x, initial, starts=starts, real=real, tolerance=1e-6)
    expected = scan(cell, x, initial, starts=starts, real=real)
    assert swept.converged
    assert swept.num_sweeps <= 32
    torch.testing.assert_close(swept.contexts, expected, atol=1e-5, rtol=0)
    assert len(swept.curve) == swept.num_sweeps


def test_gate_scan_needs_far_fewer_sweeps_than_jacobi() -> None:
    cell = ConvexCell(32, 16, 32, longest_timescale=300.0).eval()
    x, zero = torch.randn(1, 400, 16), torch.zeros(1, 32)
    gated = sweep(cell, x, zero, tolerance=1e-4, max_sweeps=400)
    jacobi = sweep(cell, x, zero, tolerance=1e-4, max_sweeps=400, gate_exact=False)
    assert gated.num_sweeps * 5 < jacobi.num_sweeps


def test_a_good_guess_saves_sweeps() -> None:
    cell = ConvexCell(32, 16, 32).eval()
    x, zero = torch.randn(1, 50, 16), torch.zeros(1, 32)
    solved = sweep(cell, x, zero, tolerance=1e-6)
    again = sweep(cell, x, zero, tolerance=1e-5, guess=solved.contexts)
    assert again.num_sweeps == 1 < solved.num_sweeps


def test_running_out_of_sweeps_is_a_result() -> None:
    cell = ConvexCell(8, 4, 8).eval()
    swept = sweep(cell, torch.randn(1, 40, 4), torch.zeros(1, 8), tolerance=1e-9, max_sweeps=2)
    assert not swept.converged
    assert swept.num_sweeps == 2


def test_seed_cells_have_no_separate_gate() -> None:
    cell = SequentialCell(8, 4, 8)
    with pytest.raises(ValueError, match="separate gate"):
        sweep(cell, torch.randn(1, 4, 4), torch.zeros(1, 8), gate_exact=True)
