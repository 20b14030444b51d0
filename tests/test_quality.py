"""The comparison with peers, at a size of seconds; who wins is not tested here."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import count as counting
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import small_model, store_of, write_dialogues
from new_llm import phase2, quality, resume
from new_llm.checkpoint import load_checkpoint
from new_llm.cli import main
from new_llm.config import preset, to_dict
from new_llm.console import Console
from new_llm.errors import CheckpointError, DataError, NonFiniteError
from new_llm.evaluate import evaluate, ratio_interval, rebuilt_gains
from new_llm.files import write_sealed
from new_llm.model import NewLLM, num_parameters, token_losses
from new_llm.quality import (
    Corpus,
    Long,
    Quality,
    build,
    counted,
    matched,
    mixed_loss,
    prepare_corpus,
)
from new_llm.results import MARK, finished, write_kept
from new_llm.runner import Runner

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("quality") / "corpus"
    return prepare_corpus(folder, None, vocab_size=400, max_dialogues=80)


def test_a_corpus_holds_no_dialogue_twice_and_is_made_once(corpus: Corpus) -> None:
    (held_out,) = corpus.held_out.values()
    known = {tuple(held_out.dialogue(i)) for i in range(held_out.num_dialogues)}
    assert known
    assert not known & {tuple(corpus.train.dialogue(i)) for i in range(corpus.train.num_dialogues)}
    again = prepare_corpus(corpus.folder, None, vocab_size=400, max_dialogues=80)
    assert again.fingerprint == corpus.fingerprint
    with pytest.raises(CheckpointError, match="new --out"):
        prepare_corpus(corpus.folder, None, vocab_size=500, max_dialogues=80)


def test_another_folder_of_the_same_name_is_another_corpus(tmp_path: Path) -> None:
    for place, count in (("a", 6), ("b", 7)):
        (tmp_path / place / "same").mkdir(parents=True)
        for part in ("train.jsonl", "valid.jsonl"):
            write_dialogues(tmp_path / place / "same" / part, count)
    given = {"vocab_size": 400, "max_dialogues": 60}
    prepare_corpus(tmp_path / "corpus", tmp_path / "a" / "same", **given)
    with pytest.raises(CheckpointError, match="new --out"):
        prepare_corpus(tmp_path / "corpus", tmp_path / "b" / "same", **given)


@pytest.mark.parametrize("kind", quality.PEERS)
def test_peers_have_as_many_parameters_as_the_default(kind: str) -> None:
    config = preset("convex")
    entrants = Quality(console=QUIET, out=Path("unused"))._entrants(4096)
    with torch.device("meta"):
        wanted = num_parameters(NewLLM(config.model, 4096))
        (shapes,) = [one.shapes for one in entrants if one.name == kind]
        totals = [num_parameters(build(given, 4096)) for given in shapes]
    assert all(abs(total / wanted - 1.0) < 0.05 for total in totals)
    assert all(given["num_blocks"] == config.model.num_blocks for given in shapes)
    # those that pay for width by its square may carry less, and have wider MLPs
    wide = [(given["width"], given["mlp_width"]) for given in shapes]
    assert len(wide) == (2 if kind in ("lstm", "gru", "mingru") else 1)
    assert [*sorted(wide, reverse=True)] == wide
    assert [*sorted(wide, key=lambda both: both[1])] == wide


def test_ours_is_compared_as_it_stands() -> None:
    asked = Quality(console=QUIET, out=Path("unused"))
    assert asked._entrants(4096)[0].shapes == (to_dict(preset("convex").model),)
    # another vocabulary or width is another size, and so is one that was asked for
    for changed, vocab_size in ((asked, 400), (replace(asked, width=64), 4096),
                                (replace(asked, parameters=3_000_000), 4096)):  # fmt: skip
        with torch.device("meta"):
            sizes = [num_parameters(build(shape, vocab_size))
                     for one in changed._entrants(vocab_size) for shape in one.shapes]  # fmt: skip
        assert max(sizes) / min(sizes) < 1.05
    assert abs(sizes[0] / 3_000_000 - 1.0) < 0.01


def test_matched_finds_the_width_that_fits() -> None:
    shape = {"kind": "gru", "embedding_width": 8, "width": 8, "mlp_width": 0}
    wanted = num_parameters(build(shape | {"mlp_width": 37}, 50))
    assert matched(shape, wanted, 50)["mlp_width"] == 37
    assert matched(shape, 10, 50)["mlp_width"] == 0


def test_counts_are_scored_on_every_part_and_on_the_mix(corpus: Corpus) -> None:
    bigram, *more = counted(corpus)
    assert [row["model"].split()[1] for row in more] == ["trigram", "4-gram", "5-gram"]
    assert bigram["mix"] == pytest.approx(bigram["chats"])
    assert all(0.0 < row["chats, bits a byte"] < 8.0 for row in more)
    (held_out,) = corpus.held_out.values()
    said = quality._said(held_out)
    assert len(said) == held_out.num_tokens - held_out.num_dialogues
    assert math.isfinite(bigram["chats, assistant"])


def test_the_mix_weighs_tokens() -> None:
    scores = {"a": {"loss": 1.0, "num_tokens": 10}, "b": {"loss": 2.0, "num_tokens": 30}}
    assert mixed_loss(scores) == pytest.approx(1.75)


def test_a_context_rebuilt_from_the_last_tokens_is_what_it_says() -> None:
    torch.manual_seed(0)
    model = NewLLM(small_model(), 40).eval()
    generator = np.random.default_rng(0)
    store = store_of([generator.integers(40, size=n).tolist() for n in (30, 5, 41)])
    found = rebuilt_gains(model, store, (2, 8), num_dialogues=2, num_positions=10_000)

    def nats(ids: torch.Tensor, target: int) -> float:
        features = model(ids[None]).features[0, -1:]
        one = torch.ones(1)
        return token_losses(
            features, model.readout.weight, torch.tensor([target]), one, chunk=4
        ).nats.item()

    for reach in (2, 8):
        gains = []
        for index in (2, 0):  # the longest first; the shortest has too little past
            ids = torch.from_numpy(store.dialogue(index).astype(np.int64))
            for at in range(9, len(ids)):
                kept = nats(ids[at - reach : at], int(ids[at]))
                gains.append(kept - nats(ids[:at], int(ids[at])))
        assert found[reach]["mean"] == pytest.approx(np.mean(gains), abs=1e-4)
        assert found[reach]["low"] <= found[reach]["mean"] <= found[reach]["high"]
    with pytest.raises(DataError, match="more than 101"):
        rebuilt_gains(model, store, (100,))


def test_ours_and_a_peer_learn_from_the_same_tokens(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quality, "PEERS", ("gru",))
    monkeypatch.setattr(quality, "_PACED_STEPS", 2)
    monkeypatch.setattr(quality, "_PACED_TURNS", 1)
    monkeypatch.setattr(quality, "PAST_POSITIONS", 50)
    monkeypatch.setattr(quality, "prepare_corpus", lambda folder, data: corpus)
    small = replace(preset("convex"), phase1=replace(preset("convex").phase1, max_steps=3))
    monkeypatch.setattr(quality, "preset", lambda name: small)
    asked = Quality(
        console=QUIET, out=tmp_path, tokens=12_000, tuning_tokens=4_000, num_seeds=2,
        learning_rates=(4e-3,), width=16, num_workers=1,
    )  # fmt: skip
    rows = asked.run()
    named = {(row["table"], row["model"]): row for row in rows
             if row["table"] in ("tokens", "time")}  # fmt: skip
    assert set(named) == {
        ("tokens", "convex"), ("tokens", "gru"), ("time", "convex"), ("time", "gru"),
    } | {("tokens", row["model"]) for row in counted(corpus)}  # fmt: skip
    ours, peer = named["tokens", "convex"], named["tokens", "gru"]
    assert ours["tokens"] == peer["tokens"] and ours["seeds"] == 2
    remembered = [row for row in rows if row["table"] == "memory"]
    assert {row["model"] for row in remembered} == {"convex", "gru"}
    assert all(row["low"] <= row["gain"] <= row["high"] for row in remembered)
    assert ours["spread"] > 0.0 and ours["mix"] < math.log(corpus.vocab_size)
    # what is kept is not trained again, and holds its exact config
    kept = sorted((tmp_path / "trials").iterdir())
    records = [json.loads(path.read_text()) for path in kept]
    assert {record["trial"] for record in records} == {"tried", "paced"}
    for record in records:
        if record["trial"] != "paced":
            assert set(record["arguments"]["phase2"]) == set(to_dict(small.phase2))
            assert record["arguments"]["phase2"]["muon_precision"] == "float32"
    assert not any((tmp_path / "unfinished").glob("*"))
    leads = {(row["equal"], row["part"]): row for row in rows if row["table"] == "leads"}
    assert set(leads) == {(equal, part) for equal in ("tokens", "time")
                          for part in ("mix", *corpus.held_out)}  # fmt: skip
    for (equal, part), row in leads.items():
        apart = named[equal, "gru"][part] - named[equal, "convex"][part]
        assert row["above ours"] == pytest.approx(apart, abs=1e-4) and row["seeds"] == 2
        assert row["low"] < row["above ours"] < row["high"] and row["spread of seeds"] > 0.0
    monkeypatch.setattr(quality, "tried", None)
    monkeypatch.setattr(quality.Runner, "_computed", lambda self, trial, left: iter(()))
    monkeypatch.setattr(quality.Runner, "key", lambda self, trial, given: _key(given, kept))
    assert asked.run() == rows


def test_a_step_size_that_diverges_is_not_chosen(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def scored(**given: Any) -> dict[str, Any]:
        if given["phase2"]["learning_rate"] > 0.01:
            raise NonFiniteError("the loss is NaN")
        loss = given["phase2"]["learning_rate"] + given["model"].get("width", 0)
        return {"scores": {"a": {"loss": loss, "num_tokens": 1}}}

    monkeypatch.setattr(quality, "trained", scored)
    monkeypatch.setattr(quality, "PEERS", ("gru",))
    asked = Quality(console=QUIET, out=tmp_path, learning_rates=(0.02, 0.004, 0.002), num_workers=1)
    with Runner(console=QUIET, folder=tmp_path / "trials", num_workers=1) as runner:
        chosen, rates, rows = asked._tuned(corpus, runner, asked._entrants(400))
    assert rates == {"convex": 0.002, "gru": 0.002}
    # the shape is chosen too
    assert [(one.name, [shape.get("width") for shape in one.shapes]) for one in chosen] == [
        ("convex", [None]), ("gru", [192]),
    ]  # fmt: skip
    assert [row["loss"] for row in rows] == [
        None, 0.004, 0.002, None, 256.004, 256.002, None, 192.004, 192.002,
    ]  # fmt: skip
    assert [row["kept"] for row in rows] == [False, False, True, *(5 * [False]), True]
    # its table can be kept
    write_kept(tmp_path / "quality.json", {"rows": rows})


def test_a_kept_result_of_an_older_layout_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / "quality.json", {"rows": [{"table": "memory"}]}, version=1)
    with pytest.raises(CheckpointError, match=r"format 2 expected.* has 1; delete it"):
        finished(tmp_path, ("quality",))


def test_a_step_is_timed_past_the_first_ones(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock, asked = [0.0], []

    def predict(model: Any, corpus: Any, known: Any, config: Any, *rest: Any) -> None:
        # what is set up takes a while, and the first steps, whose window fills, take less
        asked.append(config.max_steps)
        clock[0] += 100.0 + 2.0 * config.max_steps - min(config.max_steps, quality._PACED_AFTER)

    monkeypatch.setattr(quality, "_predict", predict)
    monkeypatch.setattr(quality.time, "perf_counter", lambda: clock[0])
    one = Quality(console=QUIET, out=tmp_path, width=16)._entrants(corpus.vocab_size)[1]
    given = Quality(console=QUIET, out=tmp_path)._arguments(one, 4e-3, 20, 0)
    found = quality.paced(asked=[given], folder=str(corpus.folder))
    assert found["step"] == [pytest.approx(2.0)] and found["phase1"] == [0.0]
    assert set(asked) == {quality._PACED_AFTER, quality._PACED_AFTER + quality._PACED_STEPS}
    assert "CPU" in found["device"]


def test_steps_are_timed_with_widths_that_processors_like() -> None:
    for width, even in ((513, 512), (171, 176), (336, 336), (0, 0)):
        one = quality.Entrant(name="a", shapes=({"mlp_width": width},), phase1=None)
        assert quality._evened(one).shapes == ({"mlp_width": even},)


def test_a_seed_that_diverges_is_left_out_and_told(corpus: Corpus) -> None:
    def scored(nats: float) -> dict[str, Any]:
        (part,) = corpus.held_out.values()
        counts = np.diff(part.offsets) - 1
        scores = {"loss": nats, "bits_per_byte": 1.0, "loss_assistant": nats, "num_tokens": 9}
        return {
            "parameters": 3, "parameters_inner": 2, "tokens_seen": 9, "seconds": 1.0,
            "seconds_phase1": 0.0, "seconds_cache": 0.0, "scores": {"chats": scores},
            "nats": {"chats": (nats * counts).tolist()},
        }  # fmt: skip

    one = quality.Entrant(name="gru", shapes=({},), phase1=None)
    found = [scored(2.0), {"diverged": "NaN"}, scored(3.0)]
    row = quality._row("tokens", one, 0.1, found, corpus)
    assert (row["seeds"], row["diverged"], row["mix"]) == (2, 1, 2.5)
    ours = [scored(1.5), scored(1.5), scored(1.5)]
    mix, chats = quality._leads(found, ours, corpus)
    assert mix["above ours"] == chats["above ours"] == pytest.approx(1.0)
    # every dialogue is as far apart
    assert mix["low"] == pytest.approx(1.0) == mix["high"]
    assert mix["spread of seeds"] == pytest.approx(2**-0.5)
    lost = 3 * [{"diverged": "NaN"}]
    assert quality._row("tokens", one, 0.1, lost, corpus)["seeds"] == 0
    assert [*quality._leads(lost, ours, corpus)] == []


def test_nats_of_dialogues_are_those_of_each_read_alone() -> None:
    torch.manual_seed(0)
    model = NewLLM(small_model(), 40).eval()
    generator = np.random.default_rng(0)
    store = store_of([generator.integers(40, size=n).tolist() for n in (30, 5, 41, 2, 17)])
    each = np.zeros(store.num_dialogues)
    whole = evaluate(model, store, batch_size=2, segment_length=8, by_dialogue=each)
    assert each.sum() / whole.num_tokens == pytest.approx(whole.loss)
    for index, nats in enumerate(each):
        alone = evaluate(model, store.cut(index, index + 1))
        assert nats == pytest.approx(alone.loss * alone.num_tokens, rel=1e-5)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), count=st.integers(2, 30), level=st.floats(-3.0, 3.0))
def test_intervals_move_with_what_they_are_of(seed: int, count: int, level: float) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 50, size=count)
    sums = generator.normal(size=count) * counts
    low, high = ratio_interval(sums, counts)
    ratios = sums / counts
    assert ratios.min() - 1e-9 <= low <= high <= ratios.max() + 1e-9
    moved = ratio_interval(sums + level * counts, counts)
    assert moved == pytest.approx((low + level, high + level))
    # of one kind of dialogue alone nothing is uncertain
    assert ratio_interval(level * counts, counts) == pytest.approx((level, level))


def test_equal_time_counts_phase_1() -> None:
    entrants = [quality.Entrant(name=name, shapes=({},), phase1=None) for name in "ab"]
    paces = {"a": (10.0, 2.0), "b": (0.0, 1.0)}
    assert quality._equal_time(entrants, paces, 100) == {"a": 100, "b": 210}


def stopped_at_the_fourth_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a training die once; return the list that each step it takes is added to."""
    step, done = phase2._Training.take_step, []

    def stopped(self: phase2._Training) -> dict[str, float]:
        done.append(self.step)
        if len(done) == 4:
            raise RuntimeError
        return step(self)

    monkeypatch.setattr(phase2._Training, "take_step", stopped)
    return done


def test_a_trial_that_was_stopped_goes_on(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quality, "PEERS", ("gru",))
    asked = Quality(console=QUIET, out=tmp_path, width=16, num_seeds=1)
    one = asked._entrants(corpus.vocab_size)[1]
    given = asked._arguments(one, 4e-3, 6, 0)
    given["phase2"]["checkpoint_seconds"] = 0.0
    place: Any = {"folder": str(corpus.folder)}
    wanted = quality.trained(**given, **place)
    done = stopped_at_the_fourth_step(monkeypatch)
    for attempt in range(2):
        with Runner(console=QUIET, folder=tmp_path / "trials", num_workers=1) as runner:
            try:
                found = runner.run("one", quality.trained, [given], places=place,
                                   unfinished=tmp_path / "unfinished")  # fmt: skip
            except RuntimeError:
                assert attempt == 0 and any((tmp_path / "unfinished").iterdir())
                continue
            assert done == [0, 1, 2, 3, 3, 4, 5]
            assert found[0]["scores"] == wanted["scores"]
    assert not any((tmp_path / "unfinished").iterdir())


def test_what_older_code_kept_is_not_taken_for_todays(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(console=QUIET, basis="corpus")
    now = runner.key(quality.trained, {"seed": 0})
    monkeypatch.setattr("new_llm.runner.RECIPE", 1)
    assert runner.key(quality.trained, {"seed": 0}) != now


def _key(given: dict[str, object], kept: list[Path]) -> str:
    for path in kept:
        record = json.loads(path.read_text())
        if record["arguments"] == json.loads(json.dumps(given)):
            return path.stem
    raise AssertionError("this was not trained")


def test_a_long_training_goes_on_and_leaves_its_model(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quality, "prepare_corpus", lambda folder, data: corpus)
    monkeypatch.setattr(quality, "PAST_POSITIONS", 50)
    small = preset("convex")
    narrow = replace(small.model, context_width=16, embedding_width=16, hidden_width=16)
    small = replace(small, model=narrow, phase1=replace(small.phase1, max_steps=3))
    monkeypatch.setattr(quality, "preset", lambda name: small)
    # every step is saved, since a minute has always passed
    ticks = counting(step=100)
    monkeypatch.setattr(resume.time, "monotonic", lambda: float(next(ticks)))
    done = stopped_at_the_fourth_step(monkeypatch)
    asked = Long(console=QUIET, out=tmp_path, tokens=6 * 2048)
    with pytest.raises(RuntimeError):
        asked.run()
    # what another training left is not gone on from
    replace(asked, tokens=2 * 2048).run()
    assert done == [0, 1, 2, 3, 0, 1]
    del done[4:]
    rows = asked.run()
    assert done == [0, 1, 2, 3, 3, 4, 5]
    (ours,) = [row for row in rows if row["model"] == "convex" and row["table"] == "losses"]
    assert {row["model"] for row in rows} >= {"Kneser-Ney bigram", "Kneser-Ney trigram"}
    model = load_checkpoint(tmp_path / "long" / "checkpoint").model
    (held_out,) = corpus.held_out.values()
    assert evaluate(model, held_out).loss == pytest.approx(ours["mix"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.ultrachat
def test_the_command_on_real_dialogues(
    tmp_path: Path, ultrachat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "PEERS", ("mingru",))
    monkeypatch.setattr(quality, "_PACED_STEPS", 2)
    monkeypatch.setattr(quality, "_PACED_TURNS", 1)
    monkeypatch.setattr(quality, "PAST_POSITIONS", 200)
    one = partial(Quality, learning_rates=(4e-3,), num_seeds=1)
    monkeypatch.setattr("new_llm.bench.Quality", one)
    few = partial(prepare_corpus, vocab_size=600, max_dialogues=30)
    monkeypatch.setattr(quality, "prepare_corpus", few)
    given = "bench quality --tokens 4000 --width 16 --workers 1 --quiet".split()
    places = {"--data": ultrachat, "--out": tmp_path / "q", "--page": tmp_path / "results.md",
              "--json": tmp_path / "q.json"}  # fmt: skip
    assert main([*given, *(str(part) for pair in places.items() for part in pair)]) == 0
    rows = json.loads((tmp_path / "q.json").read_text())["quality"]["rows"]
    (ours,) = [row for row in rows if row["table"] == "tokens" and row["model"] == "convex"]
    assert {"chats", "ultrachat", "ultrachat, bits a byte", "ultrachat, assistant"} <= set(ours)
    page = (tmp_path / "results.md").read_text()
    assert "| convex |" in page and "--data ultrachat --width 16 --tokens 4000" in page
    # what another benchmark left in the folder stands on the page too, and what a person wrote
    assert page.startswith("# Results\n")
    (tmp_path / "results.md").write_text("# What we read in it\n\n" + page[page.index(MARK) :])
    write_kept(tmp_path / "q" / "tasks.json",
               {"rows": [{"task": "parity"}], "threads": 1, "versions": {}, "device": "cpu",
                "command": "new-llm bench tasks"})  # fmt: skip
    assert main([*given, *(str(part) for pair in places.items() for part in pair)]) == 0
    again = (tmp_path / "results.md").read_text()
    assert "| parity |" in again and again.startswith("# What we read in it\n\n" + MARK)
    assert again.count(MARK) == 1
    figure = tmp_path / "results-memory.svg"
    assert any(row.get("by past") for row in rows)
    assert "tokens before" in figure.read_text()
