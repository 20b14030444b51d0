"""A run of several processes is the run of one: started by torchrun, on real chats."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import QUICK, write_dialogues
from new_llm import cli
from new_llm.distributed import World
from new_llm.records import read_history

FIFTY = [*QUICK, "--phase2.max-steps", "50", "--phase2.evaluations", "2", "--track", "none"]
EXACT = ["--phase2.muon-precision", "float32"]
# preset and options of each way through the phases, and how far losses may come apart; dropout
# draws other numbers in each process. An untrained Layer-wise cell lets differences grow for 24
# iterations; Muon in bfloat16, where a CPU is fast at it, lifts other rounding.
WAYS = {
    "contractive": ("convex", 1e-5, ["--phase1.max-steps", "50", *EXACT]),
    "as by default": ("convex", 3e-5, ["--phase1.max-steps", "5", "--gate", "seed"]),
    "hinge": ("layerwise", 1e-4, ["--phase1.max-steps", "5", "--gate", "seed"]),
    "residual, token scope": (
        "seed-layerwise",
        1e-5,
        ["--data.tokenizer", "bpe", "--model.dropout", "0", "--phase1.literal-dialogues", "1",
         "--phase1.max-steps", "50", "--phase1.epochs", "1"],
    ),
    "frozen": ("convex", 1e-5, ["--phase2.freeze-context", "--phase1.max-steps", "20", *EXACT]),
    "adamw": ("convex", 1e-5, ["--phase2.optimiser", "adamw", "--phase1.max-steps", "5",
                         "--gate", "seed"]),
    "without coupling": ("convex", 1e-5, ["--model.coupling-limit", "0", "--phase1.max-steps", "5",
                         "--gate", "seed", *EXACT]),
}  # fmt: skip

# the others are of the long form, `make faults`
LONG = bool(os.environ.get("NEW_LLM_FAULTS"))
long_form = pytest.mark.skipif(not LONG, reason="of the long form: make faults")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of enough chats for fifty steps."""
    return write_dialogues(tmp_path_factory.mktemp("data") / "talks.jsonl", 60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def accelerate(processes: int, *module: str) -> list[str]:
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
        str(processes), "--main_process_port", str(free_port()), *module,
    ]  # fmt: skip


def torchrun(processes: int, *module: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--master-port", str(free_port()), *module,
    ]  # fmt: skip


def start(command: list[str], **options: Any) -> "subprocess.Popen[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **options
    )


def launch(
    processes: int, arguments: list[str], launcher: Callable[..., list[str]] = torchrun
) -> str:
    """Run the command line in several processes, and return what they said."""
    process = start(launcher(processes, "-m", "new_llm", *arguments))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def losses(out: Path) -> list[tuple[Any, ...]]:
    rows = read_history(out / "history.jsonl")
    return [(row["stage"], row.get("step", row.get("epoch")), row["loss"]) for row in rows]


def same(first: Path, second: Path, tolerance: float) -> None:
    """Compare every loss of two histories, relative to its size."""
    ours, theirs = losses(first), losses(second)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert math.isclose(one[2], other[2], rel_tol=tolerance, abs_tol=tolerance), (one, other)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS if LONG else ["contractive"])
def test_several_processes_train_as_one_does(way: str, talks: Path, tmp_path: Path) -> None:
    name, tolerance, options = WAYS[way]
    arguments = [name, "--data", str(talks), *FIFTY, *options]
    assert cli.main(["run", *arguments, "--out", str(tmp_path / "1")]) == 0
    counts = (2, 4) if way == "contractive" and LONG else (2,)
    for count in counts:
        out = tmp_path / str(count)
        said = launch(count, ["run", *arguments, "--out", str(out)])
        assert said.count("checkpoint: ") == 1
        same(tmp_path / "1", out, tolerance)
        results = [json.loads((f / "result.json").read_text()) for f in (tmp_path / "1", out)]
        assert results[0]["tokens_seen"] == results[1]["tokens_seen"]
        found = [result["evaluation"] for result in results]
        assert found[0]["num_tokens"] == found[1]["num_tokens"]
        assert math.isclose(found[0]["loss"], found[1]["loss"], rel_tol=tolerance)
        names = [sorted(p.name for p in folder.rglob("*")) for folder in (tmp_path / "1", out)]
        assert names[0] == names[1]


@pytest.mark.slow
def test_a_divided_model_trains_as_a_whole_one_and_is_saved_whole(
    talks: Path, tmp_path: Path
) -> None:
    arguments = ["--data", str(talks), *FIFTY, "--phase1.max-steps", "5", "--gate", "seed"]
    launch(2, ["run", *arguments, "--out", str(tmp_path / "whole")])
    divided = ["run", *arguments, "--out", str(tmp_path / "divided"), "--fsdp"]
    launch(2, divided, launcher=accelerate)
    same(tmp_path / "whole", tmp_path / "divided", 1e-5)
    assert cli.main(["generate", str(tmp_path / "divided"), "--prompt", "hello"]) == 0


SHARDED = """
import sys
from new_llm import cache, cli
cache.SHARD_BYTES = 200_000
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_all_processes_write_the_shards_of_one_cache(talks: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    arguments = ["--data", str(talks), *QUICK, "--phase1.max-steps", "5", "--gate", "seed",
                 "--phase2.freeze-context", "--track", "none", "--out"]  # fmt: skip
    assert cli.main(["phase1", *arguments, str(tmp_path / "1")]) == 0
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    for count in (1, 2):
        process = start(
            torchrun(count, str(script), "cache", *arguments, str(tmp_path / str(count)))
        )
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "cache").iterdir()}
        for name in "12"
    )
    assert len(first) > 5
    assert first == second


def children(process: "subprocess.Popen[str]") -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()]


# sums of three are rounded by where a number stands in what is sent
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3] if LONG else [2])
def test_a_process_that_dies_ends_the_run_and_the_same_command_goes_on(
    count: int, talks: Path, tmp_path: Path
) -> None:
    steps, seconds = ("300", "1") if LONG else ("100", "0.2")
    arguments = ["--data", str(talks), *QUICK, "--phase1.max-steps", "5", "--gate", "seed",
                 "--phase2.max-steps", steps, "--phase2.evaluations", "0",
                 "--phase2.checkpoint-seconds", seconds, "--track", "none"]  # fmt: skip
    launch(count, ["run", *arguments, "--out", str(tmp_path / "whole")])
    out = tmp_path / "broken"
    process = start(torchrun(count, "-m", "new_llm", "run", *arguments, "--out", str(out)))
    while not (out / "stages" / "cache.json").exists() or not (out / "training").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.kill(children(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    said = process.communicate(timeout=100)[0]
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert f"{count} processes must stay alive, process 0 lost another one" in said, said
    assert "give the same command again" in said
    launch(count, ["run", *arguments, "--out", str(out)])
    assert losses(tmp_path / "whole") == losses(out)
    weights = [(f / "checkpoint" / "model.safetensors").read_bytes()
               for f in (tmp_path / "whole", out)]  # fmt: skip
    assert weights[0] == weights[1]


NOT_A_NUMBER = """
import math, os, sys
from new_llm import cli, errors, phase2
forward, mine = phase2._Objective.forward, os.environ["RANK"] == "1"
def bad(self, segment, context, step, num_wanted):
    if mine and step == 4 and sys.argv[1] == "solver":
        raise errors.NonFiniteError("contexts must stay finite, got NaN in sweep 3")
    loss, kept, nats, after = forward(self, segment, context, step, num_wanted)
    if mine and step == 4:
        after[0, 1, 2] = math.nan
    return loss, kept, nats, after
phase2._Objective.forward = bad
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["context", "solver"] if LONG else ["context"])
def test_a_number_of_one_process_that_is_not_finite_is_named(
    where: str, talks: Path, tmp_path: Path
) -> None:
    script = tmp_path / "bad.py"
    script.write_text(NOT_A_NUMBER)
    arguments = ["run", "--data", str(talks), *QUICK, "--phase1.max-steps", "2", "--gate", "seed",
                 "--track", "none", "--out", str(tmp_path / "x")]  # fmt: skip
    process = start(torchrun(2, str(script), where, *arguments))
    said = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert said.count("must stay finite") == 1, said
    wanted = "sweep 3" if where == "solver" else "in step 5 (the context of block 2: 1 of "
    assert "Phase 2 stopped after step 4" in said and wanted in said, said


@long_form
@pytest.mark.slow
def test_another_number_of_processes_may_go_on(talks: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(talks), *FIFTY, "--phase1.max-steps", "5", "--gate", "seed",
                 "--phase2.checkpoint-seconds", "0", *EXACT]  # fmt: skip
    assert cli.main(["run", *arguments, "--out", str(tmp_path / "1")]) == 0
    out = tmp_path / "2"
    process = start(torchrun(2, "-m", "new_llm", "run", *arguments, "--out", str(out)))
    while not (out / "stages" / "cache.json").exists() or not (out / "training").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    # what a terminal does: all of the group hear it
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert not (out / "result.json").exists()
    assert cli.main(["run", *arguments, "--out", str(out)]) == 0
    same(tmp_path / "1", out, 1e-5)


@pytest.mark.slow
def test_what_all_processes_find_is_said_once(talks: Path, tmp_path: Path) -> None:
    cases = [
        (["--phase1.max-steps", "1", "--gate", "strict"], "the strict gate needs the verdict"),
        (["--phase2.batch-size", "1"], "a lane for each of 2 processes expected, got 1"),
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ]
    for options, words in cases if LONG else cases[:1]:
        arguments = ["layerwise", "--data", str(talks), *QUICK, "--gate", "seed", *options]
        command = torchrun(2, "-m", "new_llm", "run", *arguments, "--out", str(tmp_path / "x"))
        process = start(command)
        said = process.communicate(timeout=100)[0]
        assert process.returncode != 0
        assert said.count("new-llm: ") == 1 and said.count(words) == 1, said
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


def test_shares_are_all_of_it_in_order() -> None:
    for size in range(1, 6):
        for count in range(12):
            parts = [World(rank=rank, size=size).share(count) for rank in range(size)]
            assert [i for part in parts for i in range(count)[part]] == list(range(count))
            lengths = [part.stop - part.start for part in parts]
            assert max(lengths) - min(lengths) <= 1


def test_a_world_of_one_sends_nothing() -> None:
    world = World()
    part = torch.ones(3, requires_grad=True)
    assert world.gathered(part, 3) is part and world.scaled(part) is part
    assert world.told(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
    module = torch.nn.Linear(2, 2)
    assert world.replicated(module, sharded=True) is module
