"""Measurements agree with known answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from new_llm.doctor import THRESHOLDS, TokenSubject, diagnose_tokens
from new_llm.fixed_point import solve
from new_llm.measurements import (
    Map,
    draw,
    effective_rank,
    largest_singular_value,
    lyapunov_exponent,
    mean_cosine,
    pair_ratios,
    participation_ratio,
    read_back,
    relative_spread,
    singular_values,
    spectral_radius,
    time_scales,
)

C = 48


def orthogonal(seed: int, width: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def linear(matrix: Tensor) -> Map:
    return lambda context, rows: context @ matrix.T


SPECTRA = {
    "even": torch.linspace(1.0, 0.01, C),
    "flat": torch.ones(C),
    "steep": torch.logspace(0.0, -4.0, C),
    "two close": torch.cat([torch.tensor([1.0, 0.99]), torch.full((C - 2,), 0.5)]),
    "rank one": torch.cat([torch.ones(1), torch.zeros(C - 1)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("largest", [0.05, 0.7, 1.0, 4.0])
def test_contraction_factor_of_linear_maps_within_one_per_cent(
    spectrum: str, largest: float
) -> None:
    matrix = orthogonal(1) @ torch.diag(largest * SPECTRA[spectrum]) @ orthogonal(2)
    contexts = torch.randn(20, C, generator=torch.Generator().manual_seed(3))
    found = largest_singular_value(linear(matrix), contexts)
    torch.testing.assert_close(found, torch.full((20,), largest), rtol=0.01, atol=0)
    # pairs are single directions: never above the largest
    assert pair_ratios(linear(matrix), contexts).max() <= largest * 1.001


def test_contraction_factor_is_of_each_row_at_its_own_context() -> None:
    """The slope of `c^2` is `2 c`: rows neither share directions nor values."""
    contexts = torch.tensor([[0.1, 0.2], [1.0, 3.0], [0.0, 0.0]])
    found = largest_singular_value(lambda context, rows: context.square(), contexts)
    torch.testing.assert_close(found, torch.tensor([0.4, 6.0, 0.0]))


@pytest.mark.parametrize("radius", [0.3, 0.95])
def test_spectral_radius_of_maps_that_are_not_normal(radius: float) -> None:
    """Blocks `[[r, 5], [0, r]]` and turns: one step stretches, the end is the eigenvalue."""
    turn = radius * torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    small = 0.5 * radius * torch.eye(2)
    matrix = torch.block_diag(turn, *[small] * 10) + torch.triu(torch.full((22, 22), 0.02), 2)
    true = torch.linalg.eigvals(matrix).abs().max().item()
    found = spectral_radius(linear(matrix), torch.zeros(4, 22))
    torch.testing.assert_close(found, torch.full((4,), true), rtol=0.01, atol=0)


@given(rank=st.integers(1, 12), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_ranks_of_matrices_with_equal_values(rank: int, scale: float, seed: int) -> None:
    """Of `k` equal singular values both ranks are `k`, in any basis and at any scale."""
    corners = torch.cat([torch.eye(rank), -torch.eye(rank)])
    contexts = scale * torch.nn.functional.pad(corners, (0, 16 - rank)) @ orthogonal(seed, 16)
    assert effective_rank(contexts) == pytest.approx(rank, rel=1e-3)
    assert participation_ratio(contexts) == pytest.approx(rank, rel=1e-3)


def test_participation_ratio_feels_one_strong_direction_more() -> None:
    contexts = torch.cat([torch.eye(16), -torch.eye(16)])
    contexts[:, 0] *= 10.0
    # variances 100 and 15 times 1: 115^2 / 10015
    assert participation_ratio(contexts) == pytest.approx(115**2 / 10015, rel=1e-4)
    assert effective_rank(contexts) > 5 * participation_ratio(contexts)


@given(shift=st.floats(-5, 5), seed=st.integers(0, 100))
def test_ranks_do_not_see_where_the_middle_is(shift: float, seed: int) -> None:
    contexts = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)).double()
    assert effective_rank(contexts + shift) == pytest.approx(effective_rank(contexts), rel=1e-4)
    # but the cosine and the spread do
    if abs(shift) > 3:
        assert mean_cosine(contexts + shift) > 0.8
        assert relative_spread(contexts + shift) < 0.5


def test_lyapunov_exponent_of_known_maps() -> None:
    rates = torch.diag(torch.tensor([0.9, 0.5, 0.1]))
    counted = torch.ones(2, 1000).bool()
    exponent, decay = lyapunov_exponent(lambda c, t: c @ rates, torch.zeros(2, 3), counted)
    # the slowest direction wins
    assert exponent == pytest.approx(torch.tensor(0.9).log().item(), rel=0.03)
    assert decay[50] < decay[5]
    grows, _ = lyapunov_exponent(lambda c, t: 1.1 * c, torch.zeros(2, 3), counted)
    assert grows == pytest.approx(torch.tensor(1.1).log().item(), rel=1e-3)


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, (400,), generator=generator)
    held = torch.randn(8, 32, generator=generator)[ids]
    noise = torch.randn(400, 32, generator=generator)
    read, guessed = read_back(held + 0.1 * noise, ids)
    assert read > 0.95
    assert guessed < 0.3
    blind, _ = read_back(noise, ids)
    assert blind < 0.3
    assert read_back(noise[:1], ids[:1]) == (0.0, 0.0)


def test_time_scales_undo_the_gate() -> None:
    wanted = torch.tensor([0.5, 3.0, 300.0]).double()
    torch.testing.assert_close(time_scales(torch.exp(-1.0 / wanted)), wanted)


def test_gates_are_described_and_drawn() -> None:
    places = torch.randn(200, C, generator=torch.Generator().manual_seed(4))

    def update(context: Tensor, rows: Tensor) -> Tensor:
        return 0.5 * context + places[rows]

    found = solve(update, torch.zeros(200, C))
    subject = TokenSubject(
        delivered=found.context,
        apply=update,
        settle=lambda start: solve(update, start, tolerance=THRESHOLDS.residual),
        convex=False,
        forget=lambda context, rows: torch.full((len(rows), 1, C), 0.995),
    )
    diagnosis = diagnose_tokens(subject)
    rows = diagnosis.measurements
    assert rows["forget_mean"].value == pytest.approx(0.995)
    assert rows["forget_above_0.99"].value == 1.0
    assert rows["timescale_median"].value == pytest.approx(199.5, rel=1e-3)
    assert rows["jacobian_norm"].value == pytest.approx(0.5, rel=1e-3)
    assert rows["spectral_radius"].value == pytest.approx(0.5, rel=1e-3)
    (portrait,) = diagnosis.portraits
    assert portrait.time_scales[50] == pytest.approx(199.5, rel=1e-2)
    assert portrait.factors[0] == pytest.approx(0.5, rel=1e-2)
    assert "portraits" not in diagnosis.to_dict()


def test_a_portrait_shows_the_contexts() -> None:
    generator = torch.Generator().manual_seed(5)
    contexts = torch.randn(1000, C, generator=generator) * torch.linspace(4.0, 0.1, C)
    drawn = draw(contexts, torch.rand(7, 3), torch.rand(50), None)
    assert len(drawn.residual) == 7
    assert len(drawn.places) == len(drawn.rows) <= 512
    assert drawn.rows[0] == 0
    assert drawn.rows[-1] == 999
    # the two coordinates are those of most spread
    spread = torch.tensor(drawn.places).std(dim=0)
    assert spread[0] > spread[1] > 3.0
    values = singular_values(contexts)
    assert drawn.spectrum == pytest.approx((values / values[0]).tolist(), rel=1e-3)
    cosines = torch.tensor(drawn.cosines)
    assert cosines.shape == (48, 48)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(48))
    assert drawn.time_scales == []
