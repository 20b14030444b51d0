import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import C, ContextCellContract, E, H
from new_llm.cell import BOUND, LIPSCHITZ, ConvexCell, LayerwiseCell, SequentialCell


class TestSequential(ContextCellContract):
    def make(self) -> SequentialCell:
        return SequentialCell(C, E, H, num_layers=2, initialisation="torch")


class TestLayerwise(ContextCellContract):
    def make(self) -> LayerwiseCell:
        return LayerwiseCell(C, E, H, num_layers=2, initialisation="torch")


class TestLayerwiseOneLayer(ContextCellContract):
    def make(self) -> LayerwiseCell:
        return LayerwiseCell(C, E, H, num_layers=1, initialisation="torch")


class TestConvex(ContextCellContract):
    def make(self) -> ConvexCell:
        return ConvexCell(C, E, H)


class TestConvexGelu(ContextCellContract):
    def make(self) -> ConvexCell:
        return ConvexCell(C, E, H, activation="gelu", coupling_limit=0.5)


def test_layerwise_is_the_documents_formula() -> None:
    cell = LayerwiseCell(C, E, H, num_layers=2, initialisation="torch").eval()
    context, x = torch.randn(3, C), torch.randn(3, E)
    expected = context
    for phi, gate, norm in zip(cell.hidden, cell.gates, cell.norms, strict=True):
        h = torch.relu(phi(torch.cat([x, expected], dim=-1)))
        delta, forget, insert = gate(h).chunk(3, dim=-1)
        mixed = torch.sigmoid(forget) * expected + torch.sigmoid(insert) * torch.tanh(delta)
        expected = norm(mixed)
    torch.testing.assert_close(cell(context, x), expected)


def test_sequential_is_the_documents_formula() -> None:
    cell = SequentialCell(C, E, H, num_layers=3, initialisation="torch").eval()
    context, x = torch.randn(3, C), torch.randn(3, E)
    h = torch.cat([x, context], dim=-1)
    for phi in cell.hidden:
        h = torch.relu(phi(h))
    delta, forget, insert = cell.gates[0](h).chunk(3, dim=-1)
    mixed = torch.sigmoid(forget) * context + torch.sigmoid(insert) * torch.tanh(delta)
    torch.testing.assert_close(cell(context, x), cell.norms[0](mixed))


def test_orthogonal_weights_carry_the_token_through_any_depth() -> None:
    """What the gate is told of the token neither fades nor grows with the layers."""
    torch.manual_seed(0)
    x, zero = torch.randn(64, 64), torch.zeros(64, 64)
    heard = {}
    for initialisation in ("normal", "torch", "orthogonal"):
        for num_layers in (1, 8):
            cell = SequentialCell(
                64, 64, 64, num_layers=num_layers, initialisation=initialisation
            ).eval()
            gates = cell.forget_gates(zero, cell.project(x), cell.weights())
            heard[initialisation, num_layers] = gates.std(dim=0).mean().item()
    for initialisation in ("normal", "torch"):
        assert heard[initialisation, 8] < 0.1 * heard[initialisation, 1]
    assert 0.5 < heard["orthogonal", 8] / heard["orthogonal", 1] < 2.0


def test_seed_initialisation_and_clip() -> None:
    cell = SequentialCell(64, 64, 64, clip=0.01)
    assert abs(cell.hidden[0].weight.std().item() - 0.02) < 0.002  # pyright: ignore
    assert cell.gates[0].bias.abs().max() == 0  # pyright: ignore
    assert cell(torch.randn(4, 64), torch.randn(4, 64)).abs().max() <= 0.01


def test_dropout_acts_in_training_only() -> None:
    cell = SequentialCell(C, E, 64, dropout=0.5, initialisation="torch")
    context, x = torch.randn(2, C), torch.randn(2, E)
    assert not torch.equal(cell(context, x), cell(context, x))
    cell.eval()
    assert torch.equal(cell(context, x), cell(context, x))


@pytest.mark.parametrize("name", list(LIPSCHITZ))
def test_lipschitz_constants_bound_the_slope(name: str) -> None:
    from new_llm.cell import ACTIVATIONS

    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64, requires_grad=True)
    ACTIVATIONS[name](x).sum().backward()
    assert x.grad is not None
    steepest = x.grad.abs().max().item()
    assert steepest <= LIPSCHITZ[name] <= steepest + 2e-4


@settings(max_examples=25, deadline=None)
@given(
    limit=st.sampled_from([0.1, 0.5, 0.95]),
    scale=st.floats(0.1, 30.0),
    seed=st.integers(0, 1000),
)
def test_convex_contracts_at_its_coupling_whatever_its_weights(
    limit: float, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    cell = ConvexCell(C, E, H, coupling_limit=limit).double()
    with torch.no_grad():
        for linear in (cell.from_context, cell.to_delta):
            linear.weight.copy_(scale * torch.randn_like(linear.weight))
    cell.eval()
    q2 = cell.coupling()["q2"]
    assert q2 <= limit * (1 + 1e-6)
    projected, weights = cell.project(torch.randn(50, E).double()), cell.weights()
    a, b = torch.randn(50, C).double(), torch.randn(50, C).double()
    moved = cell.search_map(a, projected, weights) - cell.search_map(b, projected, weights)
    assert (moved.norm(dim=-1) <= q2 * (a - b).norm(dim=-1) + 1e-12).all()


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 100.0), seed=st.integers(0, 1000))
def test_convex_contexts_stay_bounded_even_where_nothing_contracts(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    cell = ConvexCell(C, E, H, coupling_limit=100.0).eval()
    with torch.no_grad():
        for linear in (cell.from_context, cell.to_delta):
            linear.weight.copy_(scale * torch.randn_like(linear.weight))
    cell.sharpen()
    context = torch.zeros(1, C)
    for x in torch.randn(200, 1, E):
        context = cell(context, x)
        assert context.abs().max() <= BOUND


def test_coupling_stays_under_its_limit_through_training() -> None:
    torch.manual_seed(0)
    cell = ConvexCell(16, 8, 16, coupling_limit=0.9)
    optimiser = torch.optim.Adam(cell.parameters(), lr=1e-2)
    x, context = torch.randn(32, 8), torch.randn(32, 16)
    for _ in range(100):
        loss = -(cell(context, x) - cell(-context, x)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cell.weights()  # as the next step does
        # the estimate follows the weights and may lag by a few per cent at so large a step
        assert cell.coupling()["q2"] < 0.96
    cell.eval()
    # it pressed against the limit, or nothing was shown
    assert 0.89 <= cell.coupling()["q2"] <= 0.9 * (1 + 1e-5)


def test_zero_limit_is_a_linear_recurrence() -> None:
    cell = ConvexCell(C, E, H, coupling_limit=0.0).eval()
    projected, weights = cell.project(torch.randn(3, E)), cell.weights()
    a, b = torch.randn(3, C), torch.randn(3, C)
    assert torch.equal(
        cell.search_map(a, projected, weights), cell.search_map(b, projected, weights)
    )
    assert cell.coupling()["q2"] == 0.0


def test_time_scales_are_log_uniform_up_to_the_longest() -> None:
    cell = ConvexCell(256, 8, 16, longest_timescale=300.0)
    forget = cell.parts(cell.project(torch.zeros(1, 8)))[2][0]
    timescale = -1.0 / forget.log()
    assert abs(timescale[0].item() - 1.0) < 0.05
    assert abs(timescale[-1].item() - 300.0) < 15.0
    middle = timescale[128].item()
    assert abs(middle - 300.0**0.5) < 1.5
