"""How far the losses of one, two and four processes come apart, step by step.

    python benchmarks/processes.py --out runs/processes --steps 50 --processes 1 2 4

Each runs the same command by torchrun, over gloo, with one thread a process, in a folder of its own
that is kept: called again, only what is missing is run. What is compared are all rows of the
histories: every step of Phase 1, and every tenth step and the validations of Phase 2.
`--noise 1e-7` adds a row of one process whose gradients carry noise of that relative size, at each
step: how far any change of rounding takes a training, with no second process in it.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from new_llm import cli
from new_llm.records import read_history

WAYS = {
    "convex (default preset)": ["convex"],
    "convex, Muon in float32": ["convex", "--phase2.muon-precision", "float32"],
    "convex, AdamW": ["convex", "--phase2.optimiser", "adamw"],
    "layerwise": ["layerwise"],
    "seed-layerwise, dropout 0": ["seed-layerwise", "--model.dropout", "0",
                                  "--phase1.literal-dialogues", "0"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    parser.add_argument("--data", help="dialogues; none is the default package")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--noise", type=float, help="relative, in the gradients of one process")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, gloo, 1 thread a process, first {given.steps} steps")
    print("| way | processes | seconds | Phase 1 | Phase 2 |\n| --- | --- | --- | --- | --- |")
    for way in given.ways:
        first = None
        counts: list[int | float] = [*given.processes]
        if given.noise is not None:
            counts.append(given.noise)
        for count in counts:
            out = given.out / f"{re.sub(r'[^a-z0-9]+', '-', way.lower()).strip('-')}-{count}"
            seconds = run(out, WAYS[way], count, given)
            found = losses(out, given.steps)
            first = first or found
            apart = [
                max(abs(a - b) / abs(a) for a, b in zip(first[k], found[k], strict=True))
                for k in range(2)
            ]
            print(
                f"| {way} | {said(count)} | {seconds:.0f} | {apart[0]:.1e} | {apart[1]:.1e} |",
                flush=True,
            )


def said(count: float) -> str:
    return str(count) if isinstance(count, int) else f"1, noise of {count:g}"


def be_noisy(size: float, arguments: list[str]) -> None:
    """Be the command line, with noise in each gradient that an optimiser sees."""
    generator = torch.Generator().manual_seed(7)

    def disturb(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.grad.add_(drawn * parameter.grad.square().mean().sqrt() * size)

    register_optimizer_step_pre_hook(disturb)
    sys.exit(cli.main(arguments))


def run(out: Path, way: list[str], count: float, given: argparse.Namespace) -> float:
    """Run a preset in so many processes, or with noise, unless that was done.

    Returns seconds, NaN where it was done before.
    """
    if (out / "result.json").exists():
        return float("nan")
    shutil.rmtree(out, ignore_errors=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    steps = str(given.steps)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count),
                "--master-port", str(port), "-m", "new_llm"]  # fmt: skip
    if isinstance(count, float):
        launcher = [__file__, "--be-noisy", str(count)]
    command = [
        sys.executable, *launcher, "run", *way, "--out", str(out),
        "--gate", "seed", "--data.max-dialogues", "700", "--phase1.max-steps", steps,
        "--phase2.max-steps", steps, "--phase2.min-steps", "0", "--phase2.evaluations", "2",
        "--track", "none", "--quiet",
        *(["--data", given.data] if given.data else []),
    ]  # fmt: skip
    begun = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - begun


def losses(out: Path, steps: int) -> tuple[list[float], list[float]]:
    """Return the losses of both phases up to a step of each block."""
    rows = [row for row in read_history(out / "history.jsonl") if row.get("step", 0) <= steps]
    phase1 = [row["loss"] for row in rows if row["stage"].startswith("phase1")]
    return phase1, [row["loss"] for row in rows if row["stage"] in ("phase2", "validation")]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--be-noisy"]:
        be_noisy(float(sys.argv[2]), sys.argv[3:])
    main()
