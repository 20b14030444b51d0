"""What a finished run tells others: the card of its checkpoint, and trackers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import QUICK, saved, write_dialogues
from new_llm import cli
from new_llm.cell import ConvexCell
from new_llm.checkpoint import load_checkpoint, weights_fingerprint
from new_llm.evaluate import memory_gain

ARGUMENTS = ["run", *QUICK, "--gate", "seed", "--phase2.evaluations", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    chats = write_dialogues(folder / "my chats.jsonl", 30)
    run = [*ARGUMENTS, "--data", str(chats), "--out", str(folder / "run"), "--track", "tensorboard"]
    assert cli.main(run) == 0
    return folder / "run"


def test_a_card_says_what_was_trained_and_found(finished: Path) -> None:
    from huggingface_hub import ModelCard

    card: Any = ModelCard.load(finished / "checkpoint" / "README.md")
    result = json.loads((finished / "result.json").read_text())
    for result_of_card in card.data.eval_results:
        expected = result["evaluation"][result_of_card.metric_type]
        assert result_of_card.metric_value == pytest.approx(expected, abs=1e-4)
    about = card.data.to_dict()
    assert (about["pipeline_tag"], about["library_name"]) == ("text-generation", "transformers")
    for scope, diagnosis in result["verdict_final"].items():
        names = ", ".join(diagnosis["verdicts"]).replace("_", " ")
        assert f"| {scope} scope | {names} |" in card.text
    assert f"{result['evaluation']['loss']:.4f}" in card.text
    assert "| trained on | my chats.jsonl |" in card.text
    # nothing of the machine that it was trained on
    assert str(finished.parent) not in card.content
    assert f"seen {result['tokens_seen']:,}" in card.text
    config = json.loads((finished / "checkpoint" / "config.json").read_text())
    for k, found in enumerate(config["contraction"]):
        proved = f"q2 {found['q2']:.3f}, q_inf {found['q_inf']:.1f} (proved)"
        assert f"| contraction of block {k + 1} | {proved}; " in card.text


def test_a_checkpoint_that_was_not_judged_has_a_card_that_says_so(tmp_path: Path) -> None:
    card = (saved(tmp_path / "c") / "README.md").read_text()
    assert "It was not judged yet" in card and "model-index" not in card
    assert "contraction of block 2" in card


@pytest.mark.parametrize(
    ("length", "said"), [(64.0, "about\n  64 tokens"), (256.0, None), (None, None)]
)
def test_a_card_says_how_far_back_it_remembers_only_where_that_was_found(
    length: float | None, said: str | None, finished: Path, tmp_path: Path
) -> None:
    from new_llm.card import write_card
    from new_llm.config import preset

    result = json.loads((finished / "result.json").read_text())
    rows = result["verdict_final"]["sequence"]["measurements"]
    rows["effective_context_length"]["value"] = length
    write_card(tmp_path, contraction=[], num_parameters=1, run=preset("demo"), result=result)
    card = (tmp_path / "README.md").read_text()
    assert "a contraction must forget" in card
    assert (said in card) if said else ("tokens back" not in card)


def test_tensorboard_is_handed_what_the_history_holds(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    (folder,) = (finished / "tracking").iterdir()
    found = EventAccumulator(str(folder)).Reload()
    for tag, stage, name in (
        ("phase2/loss", "phase2", "loss"), ("phase1/block 1/factor", "phase1", "factor"),
        ("validation/bits_per_byte", "validation", "bits_per_byte"),
    ):  # fmt: skip
        expected = [
            (row["step"], row[name])
            for row in rows
            if row["stage"] == stage and name in row and row.get("block", 1) == 1
        ]
        told = [(event.step, event.value) for event in found.Scalars(tag)]
        assert [step for step, _ in told] == [step for step, _ in expected] != []
        assert [v for _, v in told] == pytest.approx([v for _, v in expected], rel=1e-5)


def test_trackers_do_not_decide_the_run(finished: Path, tmp_path: Path) -> None:
    chats = finished.parent / "my chats.jsonl"
    run = [*ARGUMENTS, "--data", str(chats), "--out", str(tmp_path / "run"), "--track", "none"]
    assert cli.main(run) == 0
    assert not (tmp_path / "run" / "tracking").exists()
    first, second = (json.loads((folder / "result.json").read_text())
                     for folder in (finished, tmp_path / "run"))  # fmt: skip
    assert first["evaluation"] == second["evaluation"]
    assert first["fingerprint"] == second["fingerprint"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("paper", "a tracker is auto, none, tensorboard"), ("dvclive", "pip install dvclive")],
)
def test_a_tracker_that_is_not_there_is_said_before_any_work(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "--out", str(tmp_path / "run"), "--track", name]
    assert cli.main(run) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_loaded_model_is_what_was_saved_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "c")
    expected = weights_fingerprint(load_checkpoint(folder).model)
    sharpen = ConvexCell.sharpen

    def rounded_otherwise(cell: ConvexCell) -> None:
        sharpen(cell)
        for name, buffer in cell.named_buffers():
            if name.endswith("_directions"):
                buffer.mul_(1.0 + 1e-7)

    monkeypatch.setattr(ConvexCell, "sharpen", rounded_otherwise)
    assert weights_fingerprint(load_checkpoint(folder).model) == expected


class _Forgets:
    """Predicts worse by an amount that depends on the tokens since its context was zeroed."""

    def __init__(self, lost: dict[int, float], size: int) -> None:
        self.lost, self.readout = lost, torch.nn.Linear(size, size, bias=False)
        with torch.no_grad():
            self.readout.weight.copy_(torch.eye(size))

    def __call__(self, ids: torch.Tensor, *, starts: torch.Tensor, real: torch.Tensor) -> Any:
        del real
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        since = positions - torch.where(starts, positions, 0).cummax(dim=1).values + 1
        sure = torch.full(ids.shape, 9.0)
        for age, amount in self.lost.items():
            sure[since >= age] = 9.0 - amount
        following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        features = (
            torch.nn.functional.one_hot(following, len(self.readout.weight)) * sure[..., None]
        )

        class Output:
            pass

        output: Any = Output()
        output.features = features
        return output


@pytest.mark.parametrize(
    ("lost", "length"),
    [
        ({1: 0.0}, 1.0),
        ({1: 6.0, 8: 0.0}, 8.0),
        # tokens of two or three lose nothing, by chance; older ones do
        ({1: 6.0, 2: 0.0, 4: 6.0, 64: 0.0}, 64.0),
        # 0.015 nats, which those that lose nothing in any case must not thin out
        ({1: 6.0, 32: 1.25, 128: 0.0}, 128.0),
        ({1: 6.0, 257: 0.0}, 256.0),
    ],
)
def test_the_effective_length_is_where_nothing_is_lost_from_then_on(
    lost: dict[int, float], length: float
) -> None:
    ids = torch.randint(50, (2, 1024))
    starts = torch.zeros_like(ids, dtype=torch.bool)
    # one long dialogue, and short ones that begin where contexts are zeroed
    starts[0, 0], starts[1, ::256] = True, True
    model: Any = _Forgets(lost, 50)
    assert memory_gain(model, ids, starts, torch.ones_like(starts))[1] == length


def test_short_dialogues_do_not_tell_how_far_a_context_reaches() -> None:
    ids = torch.randint(50, (2, 256))
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = True
    model: Any = _Forgets({1: 6.0, 8: 0.0}, 50)
    gain, length = memory_gain(model, ids, starts, torch.ones_like(starts))
    assert gain > 1.0 and length is None
