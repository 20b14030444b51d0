from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from new_llm.cell import BOUND, ContextCell, ConvexCell, LayerwiseCell, SequentialCell, Weights
from new_llm.errors import NonFiniteError
from new_llm.recurrence import (
    Engine,
    _Progress,
    _Settings,
    carry,
    linear_scan,
    proved_rate,
    sweep,
)
from new_llm.scan import scan, scan_by_steps

C, E, H = 6, 5, 7


def make(name: str) -> ContextCell:
    seeds: dict[str, Any] = {"num_layers": 2, "initialisation": "torch"}
    cells = {
        "convex": lambda: ConvexCell(C, E, H),
        "cut": cut,
        "sequential": lambda: SequentialCell(C, E, H, **seeds),
        "layerwise": lambda: LayerwiseCell(C, E, H, **seeds, clip=1.0),
    }
    return cells[name]().double().eval()


def cut() -> ConvexCell:
    """Return a cell of which two numbers of delta are now cut and now not."""
    cell = ConvexCell(C, E, H)
    with torch.no_grad():
        cell.to_delta.bias.copy_(torch.linspace(-BOUND, BOUND, C))
    return cell


def expanding() -> ConvexCell:
    """Return a cell whose delta doubles differences, on purpose."""
    cell = ConvexCell(C, E, H, coupling_limit=40.0).double().eval()
    with torch.no_grad():
        cell.from_context.weight.mul_(4.0)
        cell.to_delta.weight.mul_(4.0)
        cell.to_forget.bias.fill_(-4.0)
    cell.sharpen()
    return cell


def random_text(
    batch: int, length: int, seed: int, *, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, E, generator=generator, dtype=torch.float64)
    initial = torch.rand(batch, C, generator=generator, dtype=torch.float64) - 0.5
    starts = torch.rand(batch, length, generator=generator) < 0.1
    real = torch.ones(batch, length, dtype=torch.bool)
    if padded:
        real = torch.rand(batch, length, generator=generator) < 0.8
    return x, initial, starts, real


def by_steps(cell: ContextCell, x: Tensor, initial: Tensor, **masks: Any) -> Tensor:
    return scan_by_steps(cell, cell.project(x), cell.weights(), initial, **masks)


def outcome(cell: ContextCell, run: Any, x: Tensor, initial: Tensor, **masks: Any) -> list[Tensor]:
    """Return contexts, and gradients of a sum in which every coordinate weighs differently."""
    cell.zero_grad()
    leaf, start = x.clone().requires_grad_(), initial.clone().requires_grad_()
    contexts = run(cell, leaf, start, **masks)
    weight = torch.linspace(-1, 1, contexts.numel(), dtype=x.dtype).reshape(contexts.shape)
    (contexts * weight).sum().backward()
    assert leaf.grad is not None and start.grad is not None
    grads = [p.grad.clone() for p in cell.parameters() if p.grad is not None]
    assert len(grads) == len([*cell.parameters()])
    return [contexts.detach(), leaf.grad, start.grad, *grads]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 600), width=st.integers(1, 4), seed=st.integers()
)
def test_linear_scan_is_the_loop(batch: int, length: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    decay = torch.rand(length, batch, width, generator=generator, dtype=torch.float64)
    decay[decay < 0.1] = 0.0
    decay[decay > 0.9] = 1.0
    source = torch.randn(length, batch, width, generator=generator, dtype=torch.float64)
    context = initial = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    expected = []
    for t in range(length):
        context = decay[t] * context + source[t]
        expected.append(context)
    found = linear_scan(decay, source, initial)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-11, rtol=1e-11)


ENGINES: list[tuple[str, Engine]] = [
    ("convex", "scan"),
    ("convex", "gate-scan"),
    ("convex", "jacobi"),
    ("cut", "scan"),
    ("cut", "gate-scan"),
    ("sequential", "scan"),
    ("sequential", "jacobi"),
    ("layerwise", "scan"),
    ("layerwise", "jacobi"),
]


@pytest.mark.parametrize(("name", "engine"), ENGINES)
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.one_of(st.just(1), st.just(63), st.integers(1, 90)),
    seed=st.integers(0, 1000),
    padded=st.booleans(),
    chunk=st.sampled_from([None, 7, 40]),
)
def test_every_engine_is_the_loop_with_its_gradients(
    name: str, engine: Engine, batch: int, length: int, seed: int, padded: bool, chunk: int | None
) -> None:
    torch.manual_seed(seed)
    cell = make(name)
    x, initial, starts, real = random_text(batch, length, seed, padded=padded)

    def run(cell: ContextCell, x: Tensor, initial: Tensor, **masks: Any) -> Tensor:
        # a seed cell's layer norm may expand: it falls back, and equals the loop all the same
        found = carry(
            cell, x, initial, engine=engine, tolerance=1e-12, max_sweeps=100, chunk=chunk, **masks
        )
        return found.contexts

    fast = outcome(cell, run, x, initial, starts=starts, real=real)
    slow = outcome(cell, by_steps, x, initial, starts=starts, real=real)
    for found, expected in zip(fast, slow, strict=True):
        scale = expected.abs().max().item() + 1e-3
        torch.testing.assert_close(found, expected, atol=1e-8 * scale, rtol=0)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize(("name", "engine"), ENGINES)
def test_gradcheck(name: str, engine: Engine, length: int) -> None:
    torch.manual_seed(1)
    cell = make(name)
    x, initial, starts, real = random_text(2, length, 3, padded=True)

    def run(x: Tensor, initial: Tensor, *weights: Tensor) -> Tensor:
        return carry(
            cell, x, initial, engine=engine, starts=starts, real=real, weights=weights,
            tolerance=1e-13, max_sweeps=100,
        ).contexts  # fmt: skip

    leaves = [w.detach().clone().requires_grad_() for w in cell.weights()]
    inputs = (x.requires_grad_(), initial.requires_grad_(), *leaves)
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("engine", ["scan", "gate-scan"])
def test_float32_is_near_the_loop(engine: Engine) -> None:
    """Contexts to 1e-5, every gradient to 1e-4 relative, at a size of use."""
    torch.manual_seed(0)
    cell = ConvexCell(64, 48, 80).eval()
    x, initial = torch.randn(2, 257, 48), torch.zeros(2, 64)
    starts = torch.rand(2, 257) < 0.02
    run = lambda *given, **masks: carry(*given, engine=engine, **masks).contexts  # noqa: E731
    fast = outcome(cell, run, x, initial, starts=starts)
    slow = outcome(cell, by_steps, x, initial, starts=starts)
    torch.testing.assert_close(fast[0], slow[0], atol=1e-5, rtol=0)
    for found, expected in zip(fast[1:], slow[1:], strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()


def test_bfloat16_inputs_keep_float32_contexts() -> None:
    for name in ("convex", "layerwise"):
        cell = make(name).float()
        x, initial = torch.randn(2, 20, E), torch.zeros(2, C)
        exact = by_steps(cell, x, initial)
        with torch.autocast("cpu", torch.bfloat16):
            for engine in ("scan", "gate-scan" if name == "convex" else "jacobi"):
                contexts = carry(cell, x, initial, engine=engine, tolerance=1e-3).contexts
                assert contexts.dtype == torch.float32
                torch.testing.assert_close(contexts, exact, atol=0.05, rtol=0)


def test_dropout_in_the_scan_is_dropout() -> None:
    """As many hidden units are dropped, as large are those left, the same ones in the gradient."""
    torch.manual_seed(0)
    cell = SequentialCell(C, E, 4000, num_layers=1, dropout=0.25, initialisation="torch").double()
    x, initial = torch.randn(1, 2, E).double(), torch.zeros(1, C).double()
    drawn = [scan(cell, x, initial) for _ in range(2)]
    assert not torch.allclose(drawn[0], drawn[1])
    torch.testing.assert_close(
        torch.stack([scan(cell, x, initial) for _ in range(200)]).mean(dim=0),
        torch.stack([by_steps(cell, x, initial) for _ in range(200)]).mean(dim=0),
        atol=0.05, rtol=0,
    )  # fmt: skip

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(5)
        return carry(small, x, initial, engine="scan", weights=weights).contexts

    small = LayerwiseCell(C, E, H, num_layers=2, dropout=0.5, initialisation="torch").double()
    leaves = [w.detach().clone().requires_grad_() for w in small.weights()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *leaves), atol=1e-8)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 63), (3, 300)])
def test_sweeps_end_at_the_scan(batch: int, length: int) -> None:
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


def test_the_record_says_how_far_the_recurrence_is() -> None:
    cell = ConvexCell(32, 16, 32).double().eval()
    x, zero = torch.randn(1, 300, 16).double(), torch.zeros(1, 32).double()
    exact = scan(cell, x, zero)
    for tolerance in (1e-2, 1e-4, 1e-6):
        found = carry(
            cell, x, zero, engine="gate-scan", tolerance=tolerance, max_sweeps=60, chunk=64
        )
        distance = ((found.contexts - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
        assert distance <= found.sweeps.distance <= tolerance
        assert 0.0 < found.sweeps.rate < 1.0
        assert not found.fell_back and not found.proved
    assert carry(cell, x, zero, engine="scan").sweeps.distance == 0.0


def test_a_rate_remembers_sweeps_that_were_slow() -> None:
    """A hard place of a text slows now and then; two fast sweeps do not promise a third."""
    settings = _Settings(tolerance=1e-5, max_sweeps=12, chunk=64, bound=None)
    progress = _Progress(settings)
    for change in (1.0, 0.6, 0.36, 0.1, 0.03):
        progress.look(torch.full((1, 1, 2), change), torch.zeros(1, 1, 2), "contexts")
    assert progress.rate == pytest.approx(0.6)
    for change in (0.009, 0.0027):
        progress.look(torch.full((1, 1, 2), change), torch.zeros(1, 1, 2), "contexts")
    assert progress.rate == pytest.approx(0.3, abs=0.01)


def test_a_rate_over_two_sweeps_has_seen_both_shrink() -> None:
    """The first change is the gradient itself: how the third compares with it says little."""
    settings = _Settings(tolerance=1e-5, max_sweeps=12, chunk=64, bound=None)
    progress = _Progress(settings, in_turn=True)
    rates = []
    for change in (1.0, 0.006, 0.01, 0.003):
        progress.look(torch.full((1, 1, 2), change), torch.zeros(1, 1, 2), "gradients")
        rates.append(progress.rate)
    assert rates[2] > 1.0
    assert rates[3] == pytest.approx(0.5**0.5)


def test_a_proved_rate_bounds_the_distance() -> None:
    cell = ConvexCell(16, 16, 16, coupling_limit=0.04).double().eval()
    bound = proved_rate(cell, cell.weights())
    assert bound is not None and bound == pytest.approx(cell.coupling()["q_inf"])
    x, zero = torch.randn(2, 100, 16).double(), torch.zeros(2, 16).double()
    found = carry(cell, x, zero, engine="gate-scan", tolerance=1e-5)
    exact = scan(cell, x, zero)
    distance = ((found.contexts - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
    assert found.proved
    assert distance <= found.sweeps.distance <= 1e-5
    assert found.sweeps.rate <= bound
    assert proved_rate(make("layerwise"), ()) is None


def furthest(found: Tensor, exact: Tensor) -> float:
    """Return the largest relative distance of any position."""
    return ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


@pytest.mark.parametrize("chunk", [16, None])
def test_a_proved_distance_bounds_what_chunks_inherit(chunk: int | None) -> None:
    """Each chunk takes its start as given: errors of many chunks in a row come to more than one."""
    beyond = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        cell = ConvexCell(1, 1, 1, coupling_limit=0.5, certified=True).double()
        with torch.no_grad():
            cell.to_forget.bias.fill_(1.0)
        cell.eval()
        x, zero = torch.randn(1, 512, 1).double(), torch.zeros(1, 1).double()
        for tolerance in (1e-2, 1e-5):
            found = carry(cell, x, zero, engine="gate-scan", tolerance=tolerance, chunk=chunk)
            exact = scan(cell, x, zero)
            size = exact.abs().clamp(min=2e-3 * exact.abs().amax())
            distance = ((found.contexts - exact).abs() / size).max().item()
            assert found.proved and distance <= found.sweeps.distance
            beyond = max(beyond, distance / tolerance)
    if chunk:
        assert beyond > 1.0


def test_a_proved_distance_does_not_grow_with_the_text() -> None:
    torch.manual_seed(0)
    cell = ConvexCell(16, 16, 16, coupling_limit=0.5, certified=True).double().eval()
    x, zero = torch.randn(1, 400, 16).double(), torch.zeros(1, 16).double()
    short, long = (
        carry(cell, x.repeat(1, times, 1), zero, engine="gate-scan", chunk=16).sweeps
        for times in (1, 10)
    )
    assert short.distance <= long.distance <= 2 * short.distance


def test_what_rested_before_a_fall_back_keeps_its_distance() -> None:
    torch.manual_seed(0)
    cell = ConvexCell(32, 16, 32).double().eval()
    x, zero = torch.randn(1, 200, 16).double(), torch.zeros(1, 32).double()
    exact = scan(cell, x, zero).detach()
    guess = exact + 1e-6 * torch.randn_like(exact)
    guess[:, 100:] = 0.0
    for chunk in (16, 200):
        # in chunks of 16 the second half goes to the scan at once
        found = carry(cell, x, zero, engine="gate-scan", guess=guess, max_sweeps=1, chunk=chunk)
        assert found.sweeps.fallbacks["scan"]
        distance = furthest(found.contexts, exact)
        assert 1e-9 < distance <= found.sweeps.distance <= 1e-5


def test_a_single_sweep_measures_no_rate() -> None:
    cell = ConvexCell(8, 4, 8, coupling_limit=0.0).eval()
    found = carry(cell, torch.randn(1, 20, 4), torch.zeros(1, 8), engine="gate-scan")
    assert found.sweeps.num_sweeps == 1
    assert found.sweeps.rate == 0.0


def test_a_good_guess_saves_sweeps() -> None:
    cell = ConvexCell(32, 16, 32).eval()
    x, zero = torch.randn(2, 50, 16), torch.zeros(2, 32)
    solved = carry(cell, x, zero, engine="gate-scan", tolerance=1e-6)
    again = carry(cell, x, zero, engine="gate-scan", guess=solved.contexts)
    assert again.sweeps.num_sweeps == 1 < solved.sweeps.num_sweeps
    torch.testing.assert_close(again.contexts, solved.contexts, atol=1e-5, rtol=0)


def test_what_rests_is_not_computed_again() -> None:
    """The first half of the guess is right: only the other half is swept more than once."""
    cell = ConvexCell(32, 16, 32).eval()
    x, zero = torch.randn(1, 200, 16), torch.zeros(1, 32)
    guess = scan(cell, x, zero).detach()
    guess[:, 100:] = 0.0
    found = carry(cell, x, zero, engine="gate-scan", guess=guess, chunk=200)
    sweeps = found.sweeps
    assert 3 <= sweeps.num_sweeps
    assert sweeps.work <= 200 + 101 * (sweeps.num_sweeps - 1)
    torch.testing.assert_close(found.contexts, scan(cell, x, zero), atol=1e-5, rtol=0)


def test_chunks_bound_what_is_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ConvexCell(32, 16, 32).eval()
    x, zero = torch.randn(1, 300, 16), torch.zeros(1, 32)
    seen: list[int] = []
    search_map = cell.search_map

    def watched(context: Tensor, projected: Tensor, weights: Weights) -> Tensor:
        seen.append(len(context))
        return search_map(context, projected, weights)

    monkeypatch.setattr(cell, "search_map", watched)
    found = carry(cell, x, zero, engine="gate-scan", chunk=64)
    assert max(seen) == 64
    torch.testing.assert_close(found.contexts, scan(cell, x, zero), atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ["gate-scan", "jacobi"])
def test_an_expanding_cell_falls_back_and_says_so(engine: Engine) -> None:
    torch.manual_seed(0)
    cell = expanding()
    assert cell.coupling()["q2"] > 5
    x, initial, starts, _ = random_text(2, 200, 0, padded=False)
    record = []

    def run(cell: ContextCell, x: Tensor, initial: Tensor, **masks: Any) -> Tensor:
        record.append(carry(cell, x, initial, engine=engine, **masks))
        return record[0].contexts

    fast = outcome(cell, run, x, initial, starts=starts)
    slow = outcome(cell, by_steps, x, initial, starts=starts)
    found = record[0]
    assert found.fell_back and found.sweeps.fallbacks["scan"]
    torch.testing.assert_close(fast[0], slow[0], atol=1e-9, rtol=0)
    for got, expected in zip(fast[1:], slow[1:], strict=True):
        assert (got - expected).norm() < 1e-4 * expected.norm()


def test_slow_contraction_takes_more_sweeps_then_smaller_chunks() -> None:
    cell = ConvexCell(32, 16, 32).eval()
    x, zero = torch.randn(1, 256, 16), torch.zeros(1, 32)
    expected = scan(cell, x, zero)
    more = carry(cell, x, zero, engine="gate-scan", max_sweeps=6)
    assert more.sweeps.fallbacks["more sweeps"] == 1 and not more.fell_back
    cut = carry(cell, x, zero, engine="gate-scan", max_sweeps=2)
    assert cut.sweeps.fallbacks["smaller chunks"] and cut.fell_back
    for found in (more, cut):
        torch.testing.assert_close(found.contexts, expected, atol=1e-5, rtol=0)


def test_the_gradient_has_its_own_record() -> None:
    cell = ConvexCell(32, 16, 32).eval()
    found = carry(cell, torch.randn(1, 100, 16), torch.zeros(1, 32), engine="gate-scan")
    assert found.adjoint.num_sweeps == 0
    found.contexts.square().sum().backward()
    assert 1 < found.adjoint.num_sweeps <= 12
    assert found.adjoint.distance <= 1e-5
    assert not found.adjoint.fallbacks


def slow_reads_fast(coupling: float) -> ConvexCell:
    """Return a cell of one slow and one fast coordinate, each of which reads the other alone."""
    cell = ConvexCell(2, 2, 2, coupling_limit=coupling, certified=True).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.from_context.weight.copy_(coupling**0.5 * torch.eye(2))
        cell.to_delta.weight.copy_(coupling**0.5 * torch.eye(2).roll(1, 0))
        cell.from_token.bias.fill_(3.0)
        cell.from_token.weight.normal_(std=0.1)
        cell.to_share.bias.fill_(20.0)
        cell.to_forget.bias.copy_(torch.logit(torch.tensor([0.99895, 1e-3]) / cell.forget_max))
    return cell.eval()


@pytest.mark.parametrize(
    ("coupling", "tolerance"), [(0.5, 1e-2), (0.5, 1e-5), (0.7, 1e-5), (0.9, 1e-4)]
)
def test_a_gradient_that_changes_now_little_and_now_much(coupling: float, tolerance: float) -> None:
    """The loss reads the slow coordinate: every other sweep moves only the fast one, by little."""
    torch.manual_seed(0)
    cell = slow_reads_fast(coupling)
    x, zero = torch.randn(1, 2048, 2).double(), torch.zeros(1, 2).double()
    weight = torch.tensor([1.0, 0.0]).double()
    grads = []
    for engine in ("scan", "gate-scan"):
        leaf = x.clone().requires_grad_()
        found = carry(cell, leaf, zero, engine=engine, tolerance=tolerance)
        (found.contexts * weight).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    exact, swept = grads
    assert (swept - exact).norm() / exact.norm() <= 4 * found.adjoint.distance <= 4 * tolerance
    assert not found.adjoint.fallbacks["scan"] and found.adjoint.rate < 1.0


def test_a_gradient_that_was_scanned_keeps_the_distance_of_what_rested() -> None:
    torch.manual_seed(0)
    cell = slow_reads_fast(0.7)
    x = torch.randn(1, 500, 2).double()
    zero = torch.zeros(1, 2).double()
    found = carry(cell, x, zero, engine="gate-scan", tolerance=1e-3, max_sweeps=2)
    found.contexts.sum().backward()
    assert found.adjoint.fallbacks["scan"]
    assert 0.0 < found.adjoint.distance <= 1e-3


def test_sequential_has_no_separate_gate() -> None:
    cell = make("sequential")
    x, initial, _, _ = random_text(1, 4, 0, padded=False)
    with pytest.raises(ValueError, match="separate gate"):
        sweep(cell, x, initial, gate_exact=True)
    with pytest.raises(ValueError, match="separate gate"):
        carry(cell, x, initial, engine="gate-scan")


def test_running_out_of_sweeps_is_a_result() -> None:
    cell = ConvexCell(8, 4, 8).eval()
    swept = sweep(cell, torch.randn(1, 40, 4), torch.zeros(1, 8), tolerance=1e-9, max_sweeps=2)
    assert not swept.converged
    assert swept.num_sweeps == 2


@pytest.mark.parametrize("engine", ["gate-scan", "jacobi"])
def test_not_a_number_is_an_error(engine: Engine) -> None:
    cell = make("convex")
    x, initial, _, _ = random_text(1, 4, 0, padded=False)
    x[0, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="sweep"):
        carry(cell, x, initial, engine=engine)
