"""What every cell must keep; inherited by the tests of each."""

import pytest
import torch
from torch import Tensor

from new_llm.cell import ContextCell
from new_llm.recurrence import sweep
from new_llm.scan import scan, scan_by_steps

C, E, H = 5, 4, 6


class ContextCellContract:
    """Subclasses say how a cell is made."""

    def make(self) -> ContextCell:
        raise NotImplementedError

    @pytest.fixture
    def cell(self) -> ContextCell:
        return self.make().double().eval()

    def test_shape_and_dtype(self, cell: ContextCell) -> None:
        moved = cell(torch.zeros(2, 3, C).double(), torch.ones(2, 3, E).double())
        assert moved.shape == (2, 3, C)
        assert moved.dtype == torch.float64

    def test_rows_do_not_mix(self, cell: ContextCell) -> None:
        context, x = torch.randn(3, C).double(), torch.randn(3, E).double()
        together = cell(context, x)
        alone = torch.stack([cell(context[i], x[i]) for i in range(3)])
        torch.testing.assert_close(together, alone)

    def test_both_arguments_matter(self, cell: ContextCell) -> None:
        context, x = torch.randn(2, C).double(), torch.randn(2, E).double()
        moved = cell(context, x)
        assert not torch.allclose(moved, cell(context + 1.0, x))
        assert not torch.allclose(moved, cell(context, x + torch.randn(2, E).double()))

    def test_update_is_deterministic_in_evaluation(self, cell: ContextCell) -> None:
        context, x = torch.randn(2, C).double(), torch.randn(2, E).double()
        assert torch.equal(cell(context, x), cell(context, x))

    def test_search_map_has_the_fixed_points_of_update(self, cell: ContextCell) -> None:
        projected, weights = cell.project(torch.randn(4, E).double()), cell.weights()
        context = torch.zeros(4, C).double()
        for _ in range(3000):
            context = cell.search_map(context, projected, weights)
        settled = (cell.search_map(context, projected, weights) - context).abs().amax(dim=-1)
        assert (settled < 1e-9).any()
        moved = cell.update(context, projected, weights)
        torch.testing.assert_close(
            moved[settled < 1e-9], context[settled < 1e-9], atol=1e-7, rtol=0
        )

    def test_forget_gates_are_shares(self, cell: ContextCell) -> None:
        context, x = torch.randn(3, C).double(), torch.randn(3, E).double()
        gates = cell.forget_gates(context, cell.project(x), cell.weights())
        assert gates.shape[0] == 3
        assert gates.shape[-1] == C
        assert ((gates > 0) & (gates < 1)).all()
        assert not torch.allclose(gates[0], gates[1])

    def test_state_dict_round_trip(self, cell: ContextCell) -> None:
        other = self.make().double().eval()
        context, x = torch.randn(2, C).double(), torch.randn(2, E).double()
        assert not torch.allclose(cell(context, x), other(context, x))
        other.load_state_dict(cell.state_dict())
        assert torch.equal(cell(context, x), other(context, x))

    def test_gradcheck(self, cell: ContextCell) -> None:
        context = torch.randn(2, C, requires_grad=True, dtype=torch.float64)
        x = torch.randn(2, E, requires_grad=True, dtype=torch.float64)
        # away from the kink of relu, finite differences are exact
        assert torch.autograd.gradcheck(cell, (context, x), atol=1e-6)

    @pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 63), (3, 7)])
    @pytest.mark.parametrize("segments", [1, 2])
    def test_scan_is_the_step_by_step_law(
        self, cell: ContextCell, batch: int, length: int, segments: int
    ) -> None:
        x, initial, starts, real = text(batch, length)
        outcomes = []
        for carry in (scan, _by_steps):
            cell.zero_grad()
            leaf = x.clone().requires_grad_()
            start = initial.clone().requires_grad_()
            context, parts = start, []
            for part in torch.arange(length).tensor_split(segments):
                if len(part):
                    after = carry(
                        cell, leaf[:, part], context, starts=starts[:, part], real=real[:, part]
                    )
                    context = after[:, -1]
                    parts.append(after)
            contexts = torch.cat(parts, dim=1)
            weight = torch.linspace(-1, 1, contexts.numel(), dtype=torch.float64)
            (contexts.flatten() * weight).sum().backward()
            grads = [p.grad.clone() for p in cell.parameters() if p.grad is not None]
            outcomes.append([contexts.detach(), leaf.grad, start.grad, *grads])
        for fast, slow in zip(*outcomes, strict=True):
            torch.testing.assert_close(fast, slow, atol=1e-10, rtol=1e-9)

    def test_jacobi_is_exact_after_as_many_sweeps_as_positions(self, cell: ContextCell) -> None:
        x, initial, starts, real = text(3, 9)
        swept = sweep(
            cell, x, initial, starts=starts, real=real, tolerance=1e-300, max_sweeps=9,
            gate_exact=False,
        )  # fmt: skip
        expected = scan(cell, x, initial, starts=starts, real=real)
        torch.testing.assert_close(swept.contexts, expected, atol=1e-12, rtol=0)
        assert swept.num_sweeps <= 9

    def test_a_start_forgets_and_padding_holds(self, cell: ContextCell) -> None:
        x, initial, _, _ = text(2, 6)
        starts = torch.zeros(2, 6, dtype=torch.bool)
        starts[:, 3] = True
        contexts = scan(cell, x, initial, starts=starts)
        fresh = scan(cell, x[:, 3:], torch.zeros_like(initial))
        torch.testing.assert_close(contexts[:, 3:], fresh)
        real = torch.tensor([[True] * 6, [False, False, True, True, True, False]])
        padded = scan(cell, x, initial, real=real)
        alone = scan(cell, x[1:, 2:5], initial[1:])
        torch.testing.assert_close(padded[1:, 2:5], alone)
        torch.testing.assert_close(padded[1, 0], initial[1])
        torch.testing.assert_close(padded[1, 5], alone[0, -1])


def _by_steps(
    cell: ContextCell, x: Tensor, initial: Tensor, *, starts: Tensor, real: Tensor
) -> Tensor:
    weights = cell.weights()
    return scan_by_steps(cell, cell.project(x), weights, initial, starts=starts, real=real)


def text(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return embeddings, a first context, some starts, and padding on the right of one row."""
    x = torch.randn(batch, length, E, dtype=torch.float64)
    initial = torch.randn(batch, C, dtype=torch.float64)
    starts = torch.rand(batch, length) < 0.2
    real = torch.ones(batch, length, dtype=torch.bool)
    if batch > 1:
        real[-1, length // 2 :] = False
    return x, initial, starts, real
