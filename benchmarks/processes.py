"""How far the losses of one, two and four processes come apart, step by step.

    python benchmarks/processes.py --out runs/processes --steps 50 --processes 1 2 4

Each runs the same command by torchrun, over gloo, with one thread a process, in a folder of its own
that is kept: called again, only what is missing is run. What is compared are all rows of the
histories: every step of Phase 1, and every tenth step and the validations of Phase 2.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from new_llm.records import read_history

WAYS = {
    "convex (default preset)": ["convex"],
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
    given = parser.parse_args()
    print(f"torch {torch.__version__}, gloo, 1 thread a process, first {given.steps} steps")
    print("| way | processes | seconds | Phase 1 | Phase 2 |\n| --- | --- | --- | --- | --- |")
    for way in given.ways:
        first = None
        for count in given.processes:
            out = given.out / f"{WAYS[way][0]}-{len(WAYS[way])}-{count}"
            seconds = run(out, WAYS[way], count, given)
            found = losses(out, given.steps)
            first = first or found
            apart = [
                max(abs(a - b) / abs(a) for a, b in zip(first[k], found[k], strict=True))
                for k in range(2)
            ]
            print(
                f"| {way} | {count} | {seconds:.0f} | {apart[0]:.1e} | {apart[1]:.1e} |", flush=True
            )


def run(out: Path, way: list[str], count: int, given: argparse.Namespace) -> float:
    """Run a preset in so many processes, unless that was done, and return its seconds."""
    if (out / "result.json").exists():
        return float("nan")
    shutil.rmtree(out, ignore_errors=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    steps = str(given.steps)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
        "--master-port", str(port), "-m", "new_llm", "run", *way, "--out", str(out),
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
    main()
