"""The founding documents' experiments, at a size that a test allows."""

from pathlib import Path

import pytest
import torch

from new_llm import experiments, lab
from new_llm.console import Console
from new_llm.experiments import EXPERIMENTS, Row

QUIET = Console(quiet=True)


def by_name(rows: list[Row]) -> dict[str, Row]:
    found = {row.quantity: row for row in rows}
    assert len(found) == len(rows), "a quantity has one row"
    return found


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "NUM_SEEDS", 1)


def test_lab_agrees_on_the_final_table_and_names_the_collapse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A slice of `scaling`: 10 tokens Sequential take 3 iterations, as the documents say."""
    monkeypatch.setattr(experiments, "_SCALING", {"sequential": (3.0,), "layerwise": (2.0,)})
    rows = lab.run_lab("scaling", data=None, out=tmp_path, console=QUIET)["scaling"]
    found = {row["quantity"]: row for row in rows}
    assert found["sequential, 10 tokens: converged, MSE < 0.01"]["ours_mean"] == 1.0
    assert found["sequential, 10 tokens: iterations"]["agrees"]
    assert found["layerwise, 10 tokens: iterations"]["ours_mean"] == 2.0
    # a kept result is not computed again
    monkeypatch.setitem(EXPERIMENTS, "scaling", None)
    torch.manual_seed(5)
    again = lab.run_lab("scaling", data=None, out=tmp_path, console=QUIET)["scaling"]
    assert again == rows


def test_random_weights_pass_one_metric_and_fail_the_other(
    one_seed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_COUNTS", (1, 10))
    monkeypatch.setattr(experiments, "_SEARCHES", (experiments._L2, experiments._MSE))
    monkeypatch.setattr(experiments, "_DEEPER", (2, (1, 10)))
    found = by_name(experiments.untrained(QUIET))
    by_l2 = found["sequential, 2 layers, 10 tokens, l2 < 0.01, warm-up 100: converged"]
    assert (by_l2.seed_value, by_l2.ours_mean, by_l2.agrees) == (0.0, 0.0, True)
    by_mse = found["sequential, 2 layers, 10 tokens, mse < 0.01, warm-up 0: converged"]
    assert by_mse.ours_mean == 1.0
    # the documents say that it oscillates
    turn = found["sequential, 2 layers, after 200 iterations: cosine of the last two moves"]
    assert turn.ours_mean is not None and turn.ours_mean > 0.99
    norm = found["layerwise, 2 layers, after 200 iterations: norm"]
    assert norm.agrees and norm.ours_std is None


def test_settings_are_those_that_were_asked_for(
    one_seed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_TRAINED_IDS", list(range(4)))
    rows = experiments.depth(QUIET)
    assert {row.quantity.split(":")[0] for row in rows} == {
        f"{cell}, 4 tokens, num_layers {n}" for cell in experiments.CELLS for n in (1, 2, 3, 4)
    }
    # one layer is the same cell in both
    found = by_name(rows)
    for quantity in ("iterations", "norm of contexts", "effective rank"):
        one, other = (
            found[f"{cell}, 4 tokens, num_layers 1: {quantity}"] for cell in experiments.CELLS
        )
        assert one.ours_mean == pytest.approx(other.ours_mean)
    with_dropout = by_name(experiments.dropout(QUIET))
    norms = [
        with_dropout[f"sequential, 4 tokens, dropout {p}: norm of contexts"].ours_mean
        for p in (0.0, 0.1)
    ]
    assert norms[0] != norms[1]


def test_a_warm_up_moves_what_stopped_at_once(
    one_seed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_TRAINED_IDS", list(range(40)))
    found = by_name(experiments.warmup(QUIET))
    at_once, later = (
        found[f"sequential, 40 tokens, warm-up {n}: norm of contexts"].ours_mean for n in (0, 100)
    )
    assert at_once is not None and later is not None
    assert at_once < later


def test_metrics_and_clipping_speak_of_the_same_contexts(
    one_seed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_TRAINED_IDS", list(range(10)))
    found = by_name(experiments.metrics(QUIET))
    assert found["sequential, untrained: converged by mse < 0.01"].ours_mean == 1.0
    assert found["sequential, untrained: converged by l2 < 0.01"].ours_mean == 0.0
    times = found["L2 of an MSE of 0.01 in 256 dimensions, over the L2 threshold 0.01"]
    assert times.ours_mean == pytest.approx(160.0) and times.agrees is False
    monkeypatch.setattr(experiments, "_CLIPPED_TOKENS", 8)
    clipped = by_name(experiments.clipping(QUIET))
    assert clipped["sequential, 8 tokens, with and without: difference of convergence"].agrees
