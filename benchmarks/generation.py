"""Memory and time a token of a long generation: flat, because the context is the only memory.

    python benchmarks/generation.py runs/demo --tokens 100000

Time is the median over a window's tokens, memory the process' peak so far (ru_maxrss).
"""

import json
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from new_llm.checkpoint import load_checkpoint
from new_llm.config import SampleConfig
from new_llm.console import Console
from new_llm.generate import read, stream


@dataclass(frozen=True, kw_only=True)
class Options:
    """Generate without end and watch memory and time."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """Folder of a run or of its checkpoint."""
    tokens: int = 100_000
    """Tokens to generate."""
    windows: int = 10
    """Windows that are compared."""
    threads: int = 1
    """Threads of torch."""
    json: Path | None = None
    """Also write the figures here."""


@torch.no_grad()
def watch(options: Options) -> list[dict[str, Any]]:
    loaded = load_checkpoint(options.checkpoint)
    model = loaded.model.eval()
    prompt = loaded.tokenizer.encode_prompt([{"role": "user", "content": "Hello!"}])
    tokens = stream(
        model, read(model, torch.tensor([prompt])), SampleConfig(max_new_tokens=options.tokens)
    )
    size = options.tokens // options.windows
    rows, seconds = [], []
    before = time.perf_counter()
    for number, _ in enumerate(tokens, start=1):
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
        if number % size == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows.append(
                {"tokens": number, "us_a_token": statistics.median(seconds) * 1e6, "peak_mib": peak}
            )
            seconds = []
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    rows = watch(options)
    console = Console()
    console.table(
        f"generation, {options.threads} thread(s), torch {torch.__version__}",
        ["tokens", "us a token, median", "peak MiB"],
        [list(row.values()) for row in rows],
    )
    first, last = rows[0], rows[-1]
    for name in ("us_a_token", "peak_mib"):
        console.show(f"{name}: last window / first = {last[name] / first[name]:.4f}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
