"""Every verdict names a subject that was made to have it, and accuses no healthy one."""

from collections.abc import Callable

import torch
from torch import Tensor

from new_llm.doctor import (
    TokenSubject,
    diagnose_tokens,
    with_memory,
    worst,
)
from new_llm.fixed_point import solve

N, C = 128, 32


def subject(apply: Callable[[Tensor, Tensor], Tensor], *, convex: bool = False) -> TokenSubject:
    found = solve(apply, torch.zeros(N, C), metric="mse", tolerance=0.01, max_iterations=50)
    return TokenSubject(
        delivered=found.context,
        apply=apply,
        settle=lambda start: solve(apply, start, tolerance=1e-4, max_iterations=1000),
        convex=convex,
    )


def verdict(apply: Callable[[Tensor, Tensor], Tensor], *, convex: bool = False) -> str:
    return diagnose_tokens(subject(apply, convex=convex)).verdict


PLACES = torch.randn(N, C, generator=torch.Generator().manual_seed(7))
ROTATION = torch.linalg.qr(torch.randn(C, C, generator=torch.Generator().manual_seed(8)))[0]


def healthy(context: Tensor, rows: Tensor) -> Tensor:
    return 0.5 * context @ ROTATION + PLACES[rows]


def test_healthy_ones_are_not_accused() -> None:
    diagnosis = diagnose_tokens(subject(healthy, convex=True))
    assert diagnosis.verdicts == ("healthy",)
    assert all(row.passed is not False for row in diagnosis.measurements.values())


def test_zero() -> None:
    assert verdict(lambda c, rows: 0.1 * c + 1e-3 * PLACES[rows]) == "zero_collapse"


def test_zero_for_most_tokens_is_zero() -> None:
    # the others are long enough to hide them in the mean square of all
    kept = (torch.arange(N) % 3 == 0).float()[:, None]
    assert verdict(lambda c, rows: 0.1 * c + kept[rows] * PLACES[rows]) == "zero_collapse"
    kept = (torch.arange(N) % 3 != 0).float()[:, None]
    assert verdict(lambda c, rows: 0.1 * c + kept[rows] * PLACES[rows]) == "healthy"


def test_identity() -> None:
    # what it gives from zero is not zero, so that only the map itself betrays it
    def update(context: Tensor, rows: Tensor) -> Tensor:
        at_zero = (context.norm(dim=-1, keepdim=True) == 0).float()
        return context * 1.001 + at_zero * PLACES[rows]

    assert verdict(update) == "identity_map"


def test_one_constant_vector() -> None:
    assert verdict(lambda c, rows: 0.3 * c + PLACES[:1] + 0.01 * PLACES[rows]) == "global_attractor"


def test_expansion() -> None:
    def update(context: Tensor, rows: Tensor) -> Tensor:
        return torch.tanh(3.0 * context @ ROTATION + PLACES[rows])

    diagnosis = diagnose_tokens(subject(update))
    assert diagnosis.verdict == "expanding"
    assert "not_converged" in diagnosis.verdicts


def test_two_attractors() -> None:
    def update(context: Tensor, rows: Tensor) -> Tensor:
        side = torch.sign(context[:, :1] + 1e-6)
        return (
            0.5 * context @ ROTATION * 0.0 + side * (1 + PLACES[rows].abs()) * PLACES[rows].sign()
        )

    assert "multi_stable" in diagnose_tokens(subject(update)).verdicts


def test_slow_ones_have_not_converged() -> None:
    rate = 0.9995

    def update(context: Tensor, rows: Tensor) -> Tensor:
        return rate * context + (1 - rate) * PLACES[rows] * 100

    assert "not_converged" in diagnose_tokens(subject(update)).verdicts


def test_few_directions() -> None:
    flat = PLACES.clone()
    flat[:, C // 8 :] = 0.0
    assert verdict(lambda c, rows: 0.3 * c + flat[rows]) == "low_rank"


def test_a_linear_recurrence_in_disguise() -> None:
    assert verdict(lambda c, rows: 0.01 * c + PLACES[rows], convex=True) == "decoupled"
    assert verdict(lambda c, rows: 0.01 * c + PLACES[rows], convex=False) == "healthy"


def test_not_a_number() -> None:
    broken = TokenSubject(
        delivered=torch.full((N, C), float("nan")),
        apply=healthy,
        settle=lambda start: solve(healthy, start),
        convex=False,
    )
    diagnosis = diagnose_tokens(broken)
    assert diagnosis.verdict == "non_finite"
    assert diagnosis.to_dict()["verdicts"] == ["non_finite"]


def test_a_stack_has_the_verdict_of_its_worst_block() -> None:
    good = diagnose_tokens(subject(healthy))
    bad = diagnose_tokens(subject(lambda c, rows: 0.1 * c + 1e-3 * PLACES[rows]))
    both = worst([good, bad])
    assert both.verdict == "zero_collapse"
    assert "block 2: rms" in both.measurements
    assert worst([good, good]).verdict == "healthy"


def test_amnesia_is_judged_only_after_training() -> None:
    good = diagnose_tokens(subject(healthy))
    for gain, trained, verdict in (
        (0.001, True, "amnesic"),
        (0.001, False, "healthy"),
        (0.5, True, "healthy"),
    ):
        found = with_memory(good, gain_nats=gain, context_length=3.0, trained=trained)
        assert found.verdict == verdict
