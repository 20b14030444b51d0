"""A cell of another package: registered by an entry point, used by name like ours."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from contract import C, ContextCellContract, E
from helpers import QUICK, register_cells, saved, small_model, write_dialogues
from new_llm import cli
from new_llm.cell import ContextCell
from new_llm.checkpoint import load_checkpoint
from new_llm.config import CellName, ModelConfig, to_dict
from new_llm.errors import CheckpointError, ConfigError
from new_llm.model import NewLLM, build_cell
from new_llm.recurrence import carry, choose

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "own-cell.md"
# the example of the page, as a reader would copy it
SOURCE = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)[0]
# what the page says may be added to it
SEPARATE = """
class SeparateCell(MyCell):
    separates_gate = True

    def search_map(self, context, projected, weights):
        return torch.tanh(projected.chunk(2, dim=-1)[0] + context @ weights[0].T)


def narrow(config):
    cell = MyCell(config)
    cell.context_width = 3
    return cell
"""
NAMES = {"mycell": "MyCell", "separate": "SeparateCell", "narrow": "narrow", "absent": "Absent",
         "convex": "MyCell"}  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package."""
    folder = tmp_path / "site"
    register_cells(folder, "mycell", NAMES)
    (folder / "mycell.py").write_text(SOURCE + SEPARATE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mycell", raising=False)
    return folder


def example(name: str) -> ContextCell:
    """Return a cell of the page's code, as the tests of the contract want it."""
    namespace: dict[str, Any] = {}
    exec(compile(SOURCE + SEPARATE, str(PAGE), "exec"), namespace)
    return namespace[name](ModelConfig(context_width=C, embedding_width=E))


class TestMyCell(ContextCellContract):
    def make(self) -> ContextCell:
        return example("MyCell")


class TestSeparateCell(ContextCellContract):
    def make(self) -> ContextCell:
        return example("SeparateCell")


def test_the_example_has_under_thirty_lines() -> None:
    assert len([line for line in SOURCE.splitlines() if line.strip()]) < 30


@pytest.mark.slow
def test_a_run_trains_a_registered_cell_and_its_checkpoint_loads_again(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, out = write_dialogues(tmp_path / "chats.jsonl", 24), tmp_path / "run"
    options = "--model.cell mycell --gate seed --phase1.max-steps 40".split()
    given = ["--data", str(chats), "--out", str(out), *options, *QUICK]
    assert cli.main(["run", *given]) == 0, capsys.readouterr().err
    kept = json.loads((out / "config.json").read_text())["config"]["model"]
    assert kept["cell"] == "mycell"
    model = load_checkpoint(out).model
    assert {type(cell).__name__ for cell in model.cells()} == {"MyCell"}
    assert (out / "report.html").is_file()
    result = json.loads((out / "result.json").read_text())
    capsys.readouterr()
    scored = tmp_path / "scored.json"
    assert cli.main(["evaluate", str(out), "--data", str(chats), "--json", str(scored)]) == 0
    assert 0.0 < json.loads(scored.read_text())["loss"] < 7.0
    assert cli.main(["doctor", str(out), "--data", str(chats)]) == 0
    assert result["verdict_final"]["token"]["verdict"] in capsys.readouterr().out
    assert cli.main(["generate", str(out), "--prompt", "hello", "--max-new-tokens", "5"]) == 0

    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[3, 1, 4, 1, 5]])
    theirs = AutoModelForCausalLM.from_pretrained(out / "checkpoint").eval()
    with torch.no_grad():
        expected = model.logits(model(ids).features)
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=0)


def test_a_cell_that_nobody_registers_is_one_error(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--model.cell", "yours", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert "one of sequential, layerwise, convex, absent, mycell, narrow, separate" in said
    assert "got 'yours'" in said and "new_llm.cells" in said
    assert not (tmp_path / "run").exists()


def test_without_the_package_its_checkpoint_says_what_is_missing(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "checkpoint", cell="mycell", num_layers=1)
    assert type(load_checkpoint(folder).model.cells()[0]).__name__ == "MyCell"
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(installed)])
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match=r"got 'mycell'; .*install the package"):
        load_checkpoint(folder)


def test_names_of_ours_cannot_be_taken(installed: Path) -> None:
    assert type(build_cell(ModelConfig(cell="convex"))).__name__ == "ConvexCell"


def test_what_a_package_cannot_give_is_said(installed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mycell:Absent, it cannot be imported \(.*Absent"):
        build_cell(ModelConfig(cell="absent"))
    with pytest.raises(ConfigError, match=r"\(256, 256\) expected, mycell:narrow .* \(3, 256\)"):
        build_cell(ModelConfig(cell="narrow"))
    register_cells(installed, "another", {"mycell": "SeparateCell"})
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="got mycell:MyCell, mycell:SeparateCell"):
        build_cell(ModelConfig(cell="mycell"))


def test_configs_of_our_own_cells_are_written_as_before() -> None:
    assert to_dict(ModelConfig())["cell"] == "convex"
    for name in get_args(CellName):
        assert to_dict(ModelConfig(cell=name))["cell"] == name
    with pytest.raises(ConfigError, match="cell must be text, got 3"):
        ModelConfig(cell=3)  # pyright: ignore[reportArgumentType]


def test_help_names_our_cells(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--help"]) == 0
    assert "{sequential,layerwise,convex}" in capsys.readouterr().out


@pytest.mark.parametrize("masked", [False, True])
def test_a_separate_gate_is_solved_in_parallel_with_its_gradient(masked: bool) -> None:
    cell = example("SeparateCell").double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, E, generator=generator, dtype=torch.float64)
    masks: dict[str, Any] = {}
    if masked:
        masks = {
            "starts": torch.rand(2, 40, generator=generator) < 0.1,
            "real": torch.rand(2, 40, generator=generator) < 0.8,
        }
    found = []
    for engine in ("scan", "gate-scan"):
        cell.zero_grad()
        leaf, start = x.clone().requires_grad_(), torch.full((2, C), 0.3).double().requires_grad_()
        carried = carry(cell, leaf, start, engine=engine, tolerance=1e-10, **masks)
        assert not carried.fell_back
        weight = torch.linspace(-1, 1, x.shape[0] * x.shape[1] * C, dtype=torch.float64)
        (carried.contexts.flatten() * weight).sum().backward()
        grads = [parameter.grad for parameter in (leaf, start, *cell.parameters())]
        found.append([carried.contexts.detach(), *grads])
    for swept, exact in zip(*found, strict=True):
        torch.testing.assert_close(swept, exact, atol=1e-7, rtol=1e-7)
    chosen = choose(cell, device="cuda", batch=1, length=16384, num_sweeps=5)
    assert chosen.engine == "scan" and "ConvexCell only" in chosen.why


def test_phase2_takes_gate_scan_where_it_is_asked_for(installed: Path) -> None:
    config = replace(small_model(), cell="separate")
    model = NewLLM(config, 40).eval()
    ids = torch.randint(40, (2, 50))
    swept = model(ids, engines=["gate-scan"] * 2)
    torch.testing.assert_close(swept.features, model(ids).features, atol=1e-4, rtol=0)
    assert [choice.engine for choice in model.choose_engines(ids)] == ["scan", "scan"]
