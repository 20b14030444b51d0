"""What is changed in each row, and that rows are trained, judged and kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from new_llm import ablations, quality
from new_llm.ablations import Ablations
from new_llm.config import ModelConfig, PeerConfig, Phase2Config, from_dict, preset
from new_llm.console import Console
from new_llm.model import num_parameters
from new_llm.quality import build, prepare_corpus
from new_llm.runner import Runner

CHOSEN = ("default", "frozen after Phase 1", "one block, token scope", "0", "minGRU")


def test_each_row_changes_the_default_in_what_it_names() -> None:
    config = preset("convex")
    rows = {(one.table, one.name): one.arguments(config, 10, 0, 4096)
            for one in ablations.ablations()}  # fmt: skip
    assert rows["phases", "no Phase 1"]["phase1"] is None
    assert rows["phases", "Phase 1 by `residual`"]["phase1"]["objective"] == "residual"
    limits = [given["model"]["coupling_limit"] for (table, _), given in rows.items()
              if table == "coupling"]  # fmt: skip
    assert limits == [0.0, 0.25, 0.5, 1.0, 2.0, 100.0, 0.0]
    # two blocks, each with a matrix from the context and one for the token's share of it
    idle = 2 * config.model.hidden_width * (256 + 257)
    bare, full = (
        num_parameters(build(rows["coupling", name]["model"], 4096))
        for name in ("0", "0, its idle weights given to the MLPs")
    )
    assert abs(full - bare - idle) < 2000
    default = rows["phases", "default"]
    assert default["phase2"]["max_steps"] == default["phase2"]["min_steps"] == 10
    lstm = rows["recipe", "LSTM, its gates begun as usual, AdamW"]
    assert lstm["model"]["longest_timescale"] is None and lstm["phase1"] is None
    assert lstm["phase2"]["optimiser"] == "adamw"
    sizes = [num_parameters(build(given["model"], 4096)) for (table, _), given in rows.items()
             if table == "recipe"]  # fmt: skip
    assert max(sizes) < 1.05 * min(sizes)
    for given in rows.values():
        # every one is a config that a run would accept
        from_dict(PeerConfig if "kind" in given["model"] else ModelConfig, given["model"])
        from_dict(Phase2Config, given["phase2"])
    # no two rows are the same training
    assert len({json.dumps(given, sort_keys=True) for given in rows.values()}) == len(rows)


@pytest.mark.slow
def test_rows_are_trained_judged_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("convex")
    widths = dict.fromkeys(("context_width", "embedding_width", "hidden_width", "mlp_width"), 16)
    small = replace(
        config,
        model=replace(config.model, **widths),
        phase1=replace(config.phase1, max_steps=3),
        phase2=replace(config.phase2, batch_size=4),
        data=replace(config.data, sequence_length=64),
    )
    every = [one for one in ablations.ablations() if one.name in CHOSEN]
    for module in (ablations, quality):
        monkeypatch.setattr(module, "preset", lambda name: small)
    monkeypatch.setattr(ablations, "ablations", lambda: iter(every))
    monkeypatch.setattr(
        quality, "prepare_corpus",
        lambda folder, data: prepare_corpus(folder, data, vocab_size=400, max_dialogues=60),
    )  # fmt: skip
    asked = Ablations(
        console=Console(quiet=True), out=tmp_path, tokens=2000, num_seeds=2, num_workers=1
    )
    rows = {row["model"]: row for row in asked.run()}
    assert set(rows) == set(CHOSEN)
    # contexts that are read from a cache take time to write, and the cell does not move
    assert rows["frozen after Phase 1"]["cache, s"] > 0.0
    assert rows["one block, token scope"]["sweeps"] is None
    assert rows["0"]["jacobian norm"] == 0.0
    # a peer has no fixed points
    assert rows["minGRU"]["verdicts"] is None and rows["minGRU"]["sweeps"] is None
    # what did not happen took no time
    assert rows["minGRU"]["Phase 1, s"] is None and rows["default"]["cache, s"] is None
    assert rows["default"]["Phase 1, s"] > 0.0
    assert rows["default"]["trained on"].startswith("CPU with ")
    assert rows["default"]["sweeps"] >= 1.0 and rows["default"]["spread"] > 0.0
    kept = [json.loads(path.read_text()) for path in (tmp_path / "trials").iterdir()]
    assert len(kept) == 2 * len(CHOSEN)
    monkeypatch.setattr(Runner, "_computed", lambda self, trial, left: iter(()))
    assert {row["model"]: row for row in asked.run()} == rows
