"""Preparation of data against a plain `tokenizers` `encode_batch` of the same text in memory.

    python benchmarks/preparation.py --data train.jsonl --dialogues 20000 200000

Real dialogues are repeated, each made distinct by a number, and written as JSONL in shards. Two
fresh processes a size then run `new_llm.data.prepare` with a vocabulary that is there already: one
says the peak of its memory, before and after; the other holds all contents in memory too and takes
turns between the preparation and `encode_batch` on lists of contents, 1,000 dialogues a call, whose
encodings are thrown away. A preparation's time is all of reading, parsing, hashing, encoding,
writing and checksums, from the moment its vocabulary is there until it returns. Seconds are those
of the wall; on a machine that does other work too, the ratio of processor time says more.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tokenizers
import tyro

from new_llm.config import DataConfig
from new_llm.data import prepare
from new_llm.dialogues import Messages, ReadReport, read_dialogues
from new_llm.tokenizer import ChatTokenizer

SHARD, BATCH = 10_000, 1000
# dialogues that a vocabulary is trained on
VOCABULARY = 20_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure rate and memory of a preparation at several sizes."""

    data: str
    """Real dialogues, which are repeated."""
    dialogues: tuple[int, ...] = (20_000, 200_000)
    """Sizes."""
    tokenizer: str = "bpe"
    """As `--data.tokenizer`; `bpe` is trained before, on the first 20,000 dialogues."""
    repeats: int = 3
    """Turns of the comparison; medians count."""
    folder: Path | None = None
    """Where shards and stores lie while it runs; none is the system's place."""
    part: Literal["memory", "rate"] | None = None
    """Of one process, which the script starts itself."""
    json: Path | None = None
    """Also write the figures here."""


def read(source: str) -> Iterator[Messages]:
    return read_dialogues(
        source, split="", on_bad_row="error", max_dialogues=None, report=ReadReport()
    )


def write_shards(folder: Path, real: list[Messages], count: int) -> int:
    """Write distinct dialogues; return the bytes of their contents."""
    folder.mkdir()
    size = 0
    for first in range(0, count, SHARD):
        with (folder / f"{first:09}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(first, min(first + SHARD, count)):
                opening, *others = real[number % len(real)]
                begun = opening | {"content": f"{number} {opening['content']}"}
                messages = [begun, *others]
                size += sum(len(message["content"].encode()) for message in messages)
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return size


def prepared_seconds(config: DataConfig) -> tuple[float, float]:
    """Return seconds of wall and processor from the vocabulary to the end."""
    begun = (0.0, 0.0)

    def progress(what: str, count: int) -> None:
        nonlocal begun
        if what == "vocabulary":
            begun = (time.perf_counter(), time.process_time())

    with tempfile.TemporaryDirectory(dir=Path(config.source).parent) as out:
        prepare(config, Path(out), progress=progress)
        return time.perf_counter() - begun[0], time.process_time() - begun[1]


def peak_mb() -> float:
    """Return the most memory that this process held; what `getrusage` says is its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def measure_memory(options: Options) -> dict[str, float]:
    ChatTokenizer.load(Path(options.tokenizer))
    before = peak_mb()
    prepared_seconds(DataConfig(source=options.data, tokenizer=options.tokenizer))
    return {"before_mb": before, "peak_mb": peak_mb()}


def measure_rate(options: Options) -> dict[str, list[tuple[float, float]]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(options.tokenizer) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    dialogues = read(options.data)
    batches = [
        [message["content"] for messages in batch for message in messages]
        for batch in iter(lambda: list(islice(dialogues, BATCH)), [])
    ]
    ours, plain = [], []
    for _ in range(options.repeats):
        ours.append(prepared_seconds(DataConfig(source=options.data, tokenizer=options.tokenizer)))
        wall, processor = time.perf_counter(), time.process_time()
        for batch in batches:
            tokenizer.encode_batch(batch, add_special_tokens=False)
        plain.append((time.perf_counter() - wall, time.process_time() - processor))
    return {"ours": ours, "plain": plain}


def apart(options: Options, part: str, source: Path, vocabulary: Path) -> Any:
    """Run one part in a process of its own."""
    command = [
        sys.executable, __file__, "--data", str(source), "--tokenizer", str(vocabulary),
        "--repeats", str(options.repeats), "--part", part,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: Options, folder: Path, real: list[Messages]) -> list[dict[str, float]]:
    rows = []
    vocabulary = folder / "vocabulary"
    for count in options.dialogues:
        source = folder / f"{count}"
        size = write_shards(source, real, count)
        if not vocabulary.exists():
            first = islice(read(str(source)), VOCABULARY)
            contents = (message["content"] for messages in first for message in messages)
            begun = time.perf_counter()
            tokenizer = ChatTokenizer.from_name(
                options.tokenizer, contents, DataConfig().vocab_size
            )
            tokenizer.save(vocabulary)
            seconds = time.perf_counter() - begun
            print(f"vocabulary {options.tokenizer}: {seconds:.1f} s, not counted below")
        memory = apart(options, "memory", source, vocabulary)
        print(f"{count} dialogues: peak RSS {memory['peak_mb']:.1f} MB", flush=True)
        rate = apart(options, "rate", source, vocabulary)
        wall, processor = (
            {name: statistics.median(turn[kind] for turn in turns) for name, turns in rate.items()}
            for kind in (0, 1)
        )
        rows.append(
            {
                "dialogues": count,
                "MB": size / 1e6,
                "RSS before": memory["before_mb"],
                "peak RSS": memory["peak_mb"],
                "MB/s": size / 1e6 / wall["ours"],
                "plain MB/s": size / 1e6 / wall["plain"],
                "ratio": wall["plain"] / wall["ours"],
                "ratio of CPU": processor["plain"] / processor["ours"],
                "CPU ms": 1e3 * processor["ours"] / count,
            }
        )
        print("\n" + " ".join(f"{name:>12}" for name in rows[-1]))
        for row in rows:
            print(" ".join(f"{value:>12,.4g}" for value in row.values()), flush=True)
        for path in source.iterdir():
            path.unlink()
    return rows


def main(options: Options) -> None:
    if options.part == "memory":
        print(json.dumps(measure_memory(options)))
        return
    if options.part == "rate":
        print(json.dumps(measure_rate(options)))
        return
    conditions = {
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "rayon threads": os.environ.get("RAYON_NUM_THREADS", "as many as cores"),
        "turns": options.repeats,
        "load": os.getloadavg()[0],
    }
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    real = list(read(options.data))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = compare(options, Path(folder), real)
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, **conditions}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
