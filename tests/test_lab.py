"""The laboratory: trials at a size that a test allows, and the tables that are made of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from new_llm import claims, evaluate, experiments, lab, laboratory, trials
from new_llm.cell import SequentialCell
from new_llm.config import Phase1Config, SolverConfig
from new_llm.console import Console
from new_llm.dialogues import ReadReport
from new_llm.doctor import THRESHOLDS
from new_llm.errors import ConfigError, DataError
from new_llm.experiments import EXPERIMENTS, Row
from new_llm.laboratory import Laboratory, Text
from new_llm.phase1 import train_residual_literal
from new_llm.specimens import KINDS, examine

QUIET = Console(quiet=True)
TEXT = Text(
    source="a test",
    train=[list(range(start, start + 512)) for start in range(10)],
    held_out=[list(range(start, start + 512)) for start in range(600, 610)],
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One random seed; few ids and iterations for the doctor."""
    few = replace(THRESHOLDS, max_iterations=40)
    monkeypatch.setattr(evaluate, "THRESHOLDS", few)
    monkeypatch.setattr(experiments, "NUM_SEEDS", 1)
    monkeypatch.setattr(trials, "SEED_VOCAB_SIZE", 3000)
    monkeypatch.setattr(trials, "_VERDICT_IDS", 16)
    monkeypatch.setattr(laboratory, "read_text", lambda source, report: TEXT)


@pytest.fixture
def alone(small: None) -> Iterator[Laboratory]:
    with Laboratory(console=QUIET, num_workers=1) as one:
        yield one


def by_name(rows: list[Row]) -> dict[str, Row]:
    found = {row.quantity: row for row in rows}
    assert len(found) == len(rows), "a quantity has one row"
    return found


def test_lab_agrees_on_the_final_table_and_names_the_collapse(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A slice of `scaling`: 10 tokens Sequential take 3 iterations, as the documents say."""
    monkeypatch.setattr(experiments, "_SCALING", {"sequential": (3.0,), "layerwise": (2.0,)})
    monkeypatch.setattr(experiments, "_BEYOND", ())

    def rows() -> list[dict[str, Any]]:
        return lab.run_lab("scaling", data=None, out=tmp_path, console=QUIET, num_workers=1)[
            "scaling"
        ]

    found = {row["quantity"]: row for row in rows()}
    assert found["sequential, 10 tokens: converged, MSE < 0.01"]["ours_mean"] == 1.0
    assert found["sequential, 10 tokens: converged, MSE < 0.01"]["verdict"] != "healthy"
    assert found["sequential, 10 tokens: iterations"]["agrees"]
    assert found["layerwise, 10 tokens: iterations"]["ours_mean"] == 2.0
    # what is kept is not computed again, and what else is asked for is
    kept = sorted((tmp_path / "trials").iterdir())
    calls = []
    monkeypatch.setattr(trials, "literal", renamed(lambda **given: calls.append(given)))
    assert list(found.values()) == rows()
    kept[0].unlink()
    with pytest.raises(TypeError):
        rows()
    assert len(calls) == 1


def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = "literal"
    return function


@pytest.mark.parametrize("cell", laboratory.CELLS)
def test_one_trajectory_tells_what_every_search_finds(small: None, cell: str) -> None:
    groups = [[5], [3, 5, 8, 8]]
    rules = [
        {**experiments._L2, "tolerance": 0.5, "warmup": 3, "max_iterations": 30},
        {**experiments._MSE, "max_iterations": 30},
        {**experiments._MSE, "metric": "residual", "tolerance": 0.05, "max_iterations": 30},
    ]
    found = trials.frozen(cell=cell, groups=groups, seed=1, rules=rules)
    model = trials.random_model(trials.seed_config(cell), 1)
    for rule, numbers in zip(rules, found["searches"], strict=True):
        for group, of_group in zip(groups, numbers, strict=True):
            point = model.search(torch.tensor(group), SolverConfig(**rule)).blocks[0]
            assert of_group["convergence_rate"] == point.convergence_rate
            assert of_group["mean_iterations"] == pytest.approx(point.mean_iterations)


def test_random_weights_pass_one_metric_and_fail_the_other(
    alone: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_COUNTS", (1, 10))
    found = by_name(experiments.untrained(alone))
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
    alone: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_TRAINED", 4)
    found = by_name(experiments.depth(alone))
    assert {name.split(":")[0] for name in found} == {
        f"{cell}, 4 tokens, num_layers {n}" for cell in laboratory.CELLS for n in (1, 2, 3, 4)
    }
    # one layer is the same cell in both
    for quantity in ("iterations", "norm of contexts", "effective rank"):
        one, other = (
            found[f"{cell}, 4 tokens, num_layers 1: {quantity}"] for cell in laboratory.CELLS
        )
        assert one.ours_mean == pytest.approx(other.ours_mean)
    with_dropout = by_name(experiments.dropout(alone))
    norms = [
        with_dropout[f"sequential, 4 tokens, dropout {p}: norm of contexts"].ours_mean
        for p in (0.0, 0.1)
    ]
    assert norms[0] != norms[1]


def test_a_warm_up_moves_what_stopped_at_once(
    alone: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_TRAINED", 40)
    found = by_name(experiments.warmup(alone))
    at_once, later = (
        found[f"sequential, 40 tokens, warm-up {n}: norm of contexts"].ours_mean for n in (0, 100)
    )
    assert at_once is not None and later is not None
    assert at_once < later


def test_metrics_and_clipping_speak_of_the_same_contexts(
    alone: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "_TRAINED", 10)
    found = by_name(experiments.metrics(alone))
    assert found["sequential, untrained: converged by mse < 0.01"].ours_mean == 1.0
    assert found["sequential, untrained: converged by l2 < 0.01"].ours_mean == 0.0
    times = found["L2 of an MSE of 0.01 in 256 dimensions, over the L2 threshold 0.01"]
    assert times.ours_mean == pytest.approx(160.0) and times.agrees is False
    monkeypatch.setattr(experiments, "_CLIPPED_TOKENS", 8)
    clipped = by_name(experiments.clipping(alone))
    assert clipped["sequential, 8 tokens, with and without: difference of convergence"].agrees


def test_repetition_is_read_on_phrases_that_were_not_trained_on(
    alone: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = {"cycle_length": 3, "num_cycles": 3, "max_steps": 4, "batch_size": 8}
    monkeypatch.setattr(experiments, "_REPETITION", brief)
    monkeypatch.setattr(experiments, "_CYCLES", 5)
    monkeypatch.setattr(experiments, "_PHRASES", 8)
    monkeypatch.setattr(experiments, "_MANY", 12)
    monkeypatch.setattr(experiments, "_TRAINED", 10)
    found = by_name(experiments.repetition(alone))
    name = "sequential, phrases of 4 tokens, {} training: MSE from the first cycle to the second"
    before, after = (found[name.format(when)].ours_mean for when in ("before", "after"))
    assert before is not None and after is not None
    assert 0.0 < after < before
    searched = by_name(experiments.trained_search(alone))
    rates = [row.ours_mean for name, row in searched.items() if name.endswith("converged")]
    assert len(rates) == 2 * 2 * 3 * 3 and all(rate is not None for rate in rates)


def test_real_text_is_trained_and_held_out(
    alone: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(source="", train=[[5, 6, 5]], held_out=[[9, 7]])
    alone.__dict__["text"] = text
    found = by_name(experiments.dialogue_512(alone))
    name = "sequential, 2 layers, 1 dialogue of 3 tokens"
    assert found[f"{name}: converged, MSE < 0.01"].ours_mean == 1.0
    held_out = found[f"{name}: converged on held-out dialogues"]
    assert held_out.seed_value == 0.95 and held_out.agrees is (held_out.ours_mean == 1.0)


DOCTOR = {"verdict": "healthy", "factor_p99": 1.5, "forget_mean": 0.5}
SEARCH = {"convergence_rate": 1.0, "mean_iterations": 2.0, "mean_change": 0.001,
              "norm": 16.0, "cosine": 0.1, "rank": 3.0}  # fmt: skip
PHRASES = {"rate": 1.0, "change": [0.1, 0.2], "cosine": 0.0, "cosine_spread": 0.06,
               "rank": 9.0, "norm": 16.0}  # fmt: skip


class Imagined(Laboratory):
    """A laboratory whose trials take no time and give what their arguments ask for."""

    def run(
        self, title: str, trial: Callable[..., Any], arguments: Any, cost: Any = None
    ) -> list[Any]:
        json.dumps(arguments)  # what a process and a file can take
        return [getattr(self, trial.__name__)(**given) for given in arguments]

    def literal(self, *, rules: Any = (1,), **given: Any) -> Any:
        epoch = {"mean_loss": 0.001, "mean_iterations": 2.0}
        return {"epochs": [epoch] * 5, "seconds": 1.0, "searches": [SEARCH] * len(rules),
                "held_out": SEARCH, "doctor": DOCTOR}  # fmt: skip

    def frozen(self, *, rules: Any, groups: Any, **given: Any) -> Any:
        searches = [[SEARCH] * len(groups)] * len(rules)
        return {"searches": searches, "norm": 16.0, "last_move": 0.03, "turn": 1.0,
                "doctor": DOCTOR}  # fmt: skip

    def clipped(self, **given: Any) -> Any:
        return {"rate_difference": 0.0, "largest_difference": 1.0}

    def residual_checkpoint(self, *, rules: Any, groups: Any, **given: Any) -> Any:
        return {"searches": [[SEARCH] * len(groups)] * len(rules), "doctor": DOCTOR}

    def specimen(self, *, kind: str, seed: int) -> Any:
        return {"verdict": KINDS[kind].verdict if seed % 2 else "healthy"}

    def repetition(self, *, rules: Any, groups: Any, **given: Any) -> Any:
        searched = self.residual_checkpoint(rules=rules, groups=groups)
        return {**searched, "before": PHRASES, "after": PHRASES}


def test_every_claim_rests_on_rows_that_the_experiments_make() -> None:
    one = Imagined(console=QUIET)
    one.__dict__["text"] = TEXT
    results = {name: function(one) for name, function in EXPERIMENTS.items()}
    assert all(by_name(rows) for rows in results.values())
    confusion = by_name(results["confusion"])
    assert len(KINDS) * len(experiments._SPECIMENS) >= 50
    assert confusion["zero, Convex: named zero_collapse"].why == "2 healthy, 2 zero_collapse"
    assert confusion["contraction, Convex: named healthy"].agrees
    decided = by_name(claims.decide(results))
    assert {row.verdict for row in decided.values()} == {"true", "false", "contradicted"}
    word = decided["phase1_convergence_fixed.md: If MSE = 0.01 then L2 = 1.6"]
    assert word.verdict == "true" and word.agrees
    strict = "phase1_convergence_fixed.md: An L2 threshold of 0.01 is 256 times too strict"
    assert decided[strict].verdict == "false"
    assert {claim.document for claim in claims.CLAIMS} >= {
        "token_scaling_experiment.md",
        "phase1_training_comparison.md",
        "phase1_convergence_fixed.md",
        "analysis_sequential_failure.md",
        "phase1_training_spec.md",
    }


def test_processes_find_what_one_process_finds(tmp_path: Path) -> None:
    given = [
        {"cell": "sequential", "ids": [1, 2], "seed": seed, "clip": 0.5, "rule": experiments._MSE}
        for seed in range(2)
    ]
    with Laboratory(console=QUIET, num_workers=2, out=tmp_path) as several:
        together = several.run("clipping", trials.clipped, given, cost=lambda one: one["seed"])
    with Laboratory(console=QUIET, num_workers=1) as alone:
        apart = alone.run("clipping", trials.clipped, given)
    assert together != together[::-1]
    for ours, theirs in zip(together, apart, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_step_may_wait_for_the_last_inner_iteration() -> None:
    torch.manual_seed(0)
    cell, twin = (SequentialCell(4, 3, 5, initialisation="torch") for _ in range(2))
    twin.load_state_dict(cell.state_dict())
    vectors = torch.randn(6, 3)
    config = Phase1Config(
        residual_loss="last", max_iterations=4, threshold=1e-30, epochs=2, warmup_iterations=1
    )
    epochs = train_residual_literal(
        cell, lambda ids: vectors[ids], [torch.arange(6).numpy()], config
    )
    optimiser = torch.optim.Adam(twin.parameters(), lr=config.literal_learning_rate)
    for _ in range(2):
        for x in vectors:
            context = torch.zeros(4)
            with torch.no_grad():
                for _ in range(3):
                    context = twin(context, x)
            optimiser.zero_grad()
            F.mse_loss(twin(context, x), context).backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), config.gradient_clip)
            optimiser.step()
    for ours, theirs in zip(cell.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert epochs[0].mean_iterations == 4.0


def test_a_warm_up_of_training_delays_the_threshold() -> None:
    cell = SequentialCell(4, 3, 5)
    config = Phase1Config(max_iterations=9, threshold=1e6, epochs=1, warmup_iterations=3)
    (epoch,) = train_residual_literal(
        cell, lambda ids: torch.ones(len(ids), 3), [torch.arange(2).numpy()], config
    )
    assert epoch.mean_iterations == 4.0 and epoch.convergence_rate == 1.0
    with pytest.raises(ConfigError, match=r"warmup_iterations must be in \[0, max_iterations\)"):
        Phase1Config(warmup_iterations=50)


def test_text_needs_long_dialogues(tmp_path: Path) -> None:
    source = tmp_path / "short.jsonl"
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    source.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match=r"20 dialogues of at least 512 tokens expected.* has 0"):
        laboratory.read_text(str(source), ReadReport())


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("cured")])
def test_the_doctor_names_models_that_were_made_to_have_a_verdict(name: str) -> None:
    for seed in (3, 11):  # one draw may be lucky
        assert examine(name, seed=seed) == KINDS[name].verdict


def test_an_unknown_experiment_is_named() -> None:
    with pytest.raises(ConfigError, match=r"dialogue-512.*claims or all; got 'scalings'"):
        lab.run_lab("scalings", data=None, out=None, console=QUIET)
