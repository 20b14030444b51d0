"""Memory and time a token of a long generation: flat, because the context is the only memory.

    python benchmarks/generation.py runs/demo --tokens 100000

Time is the median over a window's tokens, memory the process' peak so far (ru_maxrss). The speed
of a shared machine drifts by more than 5 % in minutes, so after every 1,000 tokens of the long text
the first 100 of a new one are timed: the ratio of both is what age costs.
"""

import json
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from new_llm.checkpoint import load_checkpoint
from new_llm.config import SampleConfig
from new_llm.console import Console
from new_llm.generate import read, stream

# tokens of the long text, then of a new one, by turns
_BLOCK, _FRESH = 1000, 100


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
    prompt = torch.tensor([loaded.tokenizer.encode_prompt([{"role": "user", "content": "Hello!"}])])

    def new_stream(num_tokens: int) -> Iterator[int]:
        return stream(model, read(model, prompt), SampleConfig(max_new_tokens=num_tokens))

    def timed(tokens: Iterator[int], count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            before = time.perf_counter()
            next(tokens)
            seconds.append(time.perf_counter() - before)
        return seconds

    timed(new_stream(_FRESH), _FRESH)  # warm-up
    tokens = new_stream(options.tokens)
    size = options.tokens // options.windows
    block = min(_BLOCK, size)
    rows = []
    for window in range(1, options.windows + 1):
        old, new = [], []
        for _ in range(size // block):
            old += timed(tokens, block)
            new += timed(new_stream(_FRESH), _FRESH)
        time_old, time_new = (statistics.median(seconds) * 1e6 for seconds in (old, new))
        rows.append(
            {
                "tokens": window * size,
                "us_a_token": time_old,
                "us_a_fresh_token": time_new,
                "to_fresh": time_old / time_new,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    rows = watch(options)
    console = Console()
    console.table(
        f"generation, {options.threads} thread(s), torch {torch.__version__}",
        ["tokens", "us a token, median", "of a new text", "ratio", "peak MiB"],
        [list(row.values()) for row in rows],
    )
    first, last = rows[0], rows[-1]
    for name in ("us_a_token", "to_fresh", "peak_mib"):
        console.show(f"{name}: last window / first = {last[name] / first[name]:.4f}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
