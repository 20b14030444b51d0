"""The benchmarks as a user runs them, at a size of seconds; what they claim is not tested here."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import reseal, saved
from new_llm.baselines import GPTBlock, MinGRU
from new_llm.bench import BENCHES, LONG, TAKEN, _command, run_bench
from new_llm.cli import main
from new_llm.console import Console, format_cell
from new_llm.files import alone, remove_folder
from new_llm.results import write_page
from new_llm.speed import Bench

SMALL = {"lengths": "16 64", "batches": "1 2", "tokens": "12000", "width": "64"}


def small(name: str, **changes: str) -> list[str]:
    """Return the options of a benchmark of seconds, those that it takes."""
    sizes = SMALL | changes
    taken = [part for part in sizes if part in TAKEN[name]]
    return [word for part in taken for word in (f"--{part}", *sizes[part].split())] + ["--quiet"]


@pytest.mark.parametrize(
    "name", sorted(set(BENCHES) - {"token-scope", "document", "memory", *LONG})
)
def test_a_benchmark_writes_rows_versions_and_threads(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    given = ["bench", name, *small(name), "--out", str(tmp_path / "kept"), "--json", str(path)]
    assert main(given) == 0
    found = json.loads(path.read_text())[name]
    assert found["rows"] and found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert name in capsys.readouterr().out
    # what is kept is not measured again
    (kept,) = (tmp_path / "kept").iterdir()
    reseal(kept, device="another")
    assert main(given) == 0
    assert json.loads(path.read_text())[name]["device"] == "another"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token-scope", "document", "memory"])
def test_a_long_benchmark_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # peers that never come to rest go on for minutes
    monkeypatch.setattr("new_llm.speed._MAX_ITERATIONS", 60)
    path = tmp_path / "bench.json"
    sizes = small(name, lengths="1024", tokens="500", width="32")
    assert main(["bench", name, *sizes, "--json", str(path)]) == 0
    assert json.loads(path.read_text())[name]["rows"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["nothing"], "a benchmark is one of"),
        (["engines", "--threads", "0"], "at least 1"),
        (["engines", "--threads", "3000000000"], "at most 4096"),
        (["engines", "--lengths", "0"], "at least 1"),
        (["quality", "--workers", "0"], "at least 1"),
        (["quality"], "add --out DIR"),
        (["ablations", "--out", "q", "--width", "64"], "ablations takes --data"),
        (["tasks", "--out", "q", "--tokens", "9"], "--workers, got --tokens"),
        (["quality", "--out", "q", "--data", "nowhere"], "train.jsonl"),
        (["sweeps", "--checkpoint", "nowhere"], "nowhere"),
        (["sweeps", "--data", "nowhere"], "tokenizer of a --checkpoint"),
        (["engines", "--tokens", "9"], "engines takes --checkpoint"),
        (["long", "--out", "q", "--threads", "1"], "got --threads"),
        (["recurrence", "--width", "12"], "multiple of 8"),
        (["flatness", "--tokens", "500"], "at least 1000 --tokens"),
        pytest.param(
            ["engines", "--device", "cuda"], "GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_clear_error(
    given: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *given, "--quiet"]) == 2
    assert wanted in capsys.readouterr().err


def test_what_is_kept_is_of_one_checkpoint_wherever_it_lies(tmp_path: Path) -> None:
    given = ["--out", str(tmp_path / "kept"), *small("sweeps", lengths="16")]
    for seed in (0, 0, 1):
        # the same place, the same weights twice and then others
        remove_folder(tmp_path / "c")
        saved(tmp_path / "c", seed=seed)
        assert main(["bench", "sweeps", "--checkpoint", str(tmp_path / "c"), *given]) == 0
    assert len([*(tmp_path / "kept").iterdir()]) == 2
    remove_folder(tmp_path / "c")
    assert main(["bench", "sweeps", "--checkpoint", str(tmp_path / "c"), *given]) == 2


@pytest.mark.parametrize(
    ("name", "cell", "scope", "wanted"),
    [
        ("engines", "layerwise", "sequence", "separate gate"),
        ("sweeps", "sequential", "sequence", "separate gate"),
        ("sweeps", "layerwise", "token", "carries its context"),
        ("generation", "convex", "token", "carries its context"),
        ("flatness", "convex", "token", "carries its context"),
    ],
)
def test_a_checkpoint_that_a_benchmark_cannot_use_gets_one_clear_error(
    name: str, cell: str, scope: str, wanted: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    blocks = {"num_blocks": 1} if scope == "token" else {}
    folder = saved(tmp_path / "c", cell=cell, scope=scope, **blocks)
    assert main(["bench", name, "--checkpoint", str(folder), "--quiet"]) == 2
    assert wanted in capsys.readouterr().err


def test_all_leaves_out_what_has_nothing_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(BENCHES) - set(LONG):
        monkeypatch.setitem(BENCHES, name, lambda bench: [{"device": bench.device}])
    folder, out = saved(tmp_path / "c", cell="layerwise"), tmp_path / "b.json"
    given = ["--checkpoint", str(folder), "--json", str(out), "--quiet"]
    assert main(["bench", "all", *given]) == 0
    assert "engines is left out" in capsys.readouterr().out
    assert {*json.loads(out.read_text())} == set(BENCHES) - {*LONG, "engines", "sweeps"}


def test_what_is_for_the_cpu_alone_does_not_move_what_comes_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in set(BENCHES) - set(LONG):
        monkeypatch.setitem(BENCHES, name, lambda bench: [{"device": bench.device}])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    found = run_bench("all", console=Console(quiet=True), device="cuda")
    for name, result in found.items():
        on_gpu = "device" in TAKEN[name]
        assert result["rows"] == [{"device": "cuda" if on_gpu else "cpu"}]
        assert result["device"] == ("a GPU" if on_gpu else "cpu")
    assert {"token-scope", "generation"} == {n for n in found if found[n]["device"] == "cpu"}


def test_threads_are_those_asked_for_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHES, "memory", lambda bench: [{"threads": torch.get_num_threads()}])
    before = torch.get_num_threads()
    found = run_bench("memory", console=Console(quiet=True), device="cpu", threads=before + 1)
    assert found["memory"]["rows"] == [{"threads": before + 1}]
    assert found["memory"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_two_processes_do_not_write_the_same_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(tmp_path):
        assert main(["bench", "memory", "--out", str(tmp_path)]) == 2
        assert main(["lab", "clipping", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("one process at a time") == 2


@pytest.mark.parametrize(
    ("kept", "said"), [(True, "goes on from here"), (False, "nothing was written")]
)
def test_an_interrupted_benchmark_says_what_is_kept(
    kept: bool,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(bench: Bench) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(BENCHES, "memory", interrupted)
    assert main(["bench", "memory", *(["--out", str(tmp_path)] if kept else [])]) == 130
    assert said in capsys.readouterr().err


def test_a_page_that_is_no_text_is_found_out_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BENCHES, "memory", lambda bench: pytest.fail("hours of work"))
    (tmp_path / "page.md").write_bytes(b"\xff\xfe")
    assert main(["bench", "memory", "--page", str(tmp_path / "page.md")]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_the_last_mark_of_flatness_is_the_end_that_was_asked_for() -> None:
    bench = Bench(console=Console(quiet=True), device="cpu", width=16, tokens=2400)
    assert [row["tokens"] for row in BENCHES["flatness"](bench)] == [1000, 2400]


def test_min_gru_is_its_recurrence_with_gradients() -> None:
    torch.manual_seed(0)
    layer = MinGRU(5).double()
    x = torch.randn(2, 70, 5, dtype=torch.float64, requires_grad=True)
    candidate, gate = layer.both(x).chunk(2, dim=-1)
    context, contexts = torch.zeros(2, 5).double(), []
    for t in range(70):
        share = torch.sigmoid(gate[:, t])
        context = (1 - share) * context + share * candidate[:, t]
        contexts.append(context)
    expected, found = torch.stack(contexts, dim=1), layer(x)
    torch.testing.assert_close(found, expected)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    wanted = torch.autograd.grad((expected * weight).sum(), [x, *layer.parameters()])
    got = torch.autograd.grad((found * weight).sum(), [x, *layer.parameters()])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_gpt_block_sees_no_later_position() -> None:
    block, x = GPTBlock(8, num_heads=2), torch.randn(1, 6, 8)
    before = block(x)[:, :4]
    x[:, 4:] += 1.0
    torch.testing.assert_close(block(x)[:, :4], before)


@pytest.mark.parametrize("width", [50, 70, 140, 400])
def test_no_cell_of_a_wide_table_is_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ["model", *(f"a column's name {i}" for i in range(12))]
    rows = [[f"model {k}", *(k + i / 7 for i in range(12))] for k in range(6)]
    Console(quiet=True).table("wide", columns, rows)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    shown = [part.strip() for line in said.splitlines() for part in re.split("[│┃]", line)]
    for text in (format_cell(value) for row in (columns, *rows) for value in row):
        assert text in shown
    # as it is where it fits
    assert ("wide (2)" in said) == (width < 140)


@pytest.mark.parametrize("name", ["engines", "sweeps"])
def test_a_benchmark_measures_the_sizes_that_it_is_given(name: str) -> None:
    bench = Bench(console=Console(quiet=True), device="cpu", lengths=(24, 40), batches=(3,),
                  width=16)  # fmt: skip
    rows = BENCHES[name](bench)
    assert {row["T"] for row in rows} == {24, 40}
    assert name == "sweeps" or {row["B"] for row in rows} == {3}


def test_the_command_beside_a_table_says_what_was_asked() -> None:
    quiet = Console(quiet=True)
    plain = Bench(console=quiet, device="cpu")
    assert _command("memory", plain) == "new-llm bench memory"
    asked = Bench(
        console=quiet, device="cpu", data="/somewhere/ultrachat", lengths=(8, 16), width=16
    )
    expected = "new-llm bench sweeps --data ultrachat --lengths 8 16 --width 16"
    assert _command("sweeps", asked) == expected
    assert _command("quality", replace(asked, lengths=plain.lengths)) == (
        "new-llm bench quality --data ultrachat --width 16 --out DIR"
    )


def test_the_figure_of_memory_tells_its_models_apart(tmp_path: Path) -> None:
    models = {"quality": ["convex", "lstm", "gru", "mingru", "gpt", "mamba"], "long": ["convex"]}
    results = {
        bench: {
            "rows": [
                {"table": "memory", "model": model, "part": part, "tokens kept": kept,
                 "by past": {"16": 0.1 + place / 100, "64": 0.2, "256": 0.3}}
                for place, model in enumerate(names) for part in ("chats", "ultrachat")
                for kept in (16, 128)
            ],
            "threads": 1, "versions": {}, "device": "cpu", "command": f"new-llm bench {bench}",
        }
        for bench, names in models.items()
    }  # fmt: skip
    write_page(tmp_path / "page.md", results)
    figure = (tmp_path / "page-memory.svg").read_text()
    assert "(page-memory.svg)" in (tmp_path / "page.md").read_text()
    named = [*models["quality"], "convex (long)"]
    assert [figure.count(f">{name}</text>") for name in named] == [1] * len(named)
    # a line a model in each of four panels and in the legend, each model in a colour of its own
    lines = re.findall(r"fill: none; ([^\"]*)stroke: (#[0-9a-f]{6}); stroke-width: 1.5", figure)
    counts = Counter(colour for _, colour in lines)
    assert len(counts) == len(named) and {*counts.values()} == {5}
    assert sum("dash" in style for style, _ in lines) == 5
