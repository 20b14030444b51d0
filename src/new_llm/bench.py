"""Benchmarks by name: what `bench` does."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .ablations import Ablations
from .checkpoint import resolve
from .config import fingerprint
from .console import Console
from .errors import ConfigError
from .files import held, sha256, understood
from .quality import Long, Quality
from .results import finished, read_kept, require_page, tables, write_kept, write_page
from .speed import (
    Bench,
    Rows,
    document,
    engines,
    flatness,
    generation,
    memory,
    recurrence,
    sweeps,
    token_scope,
    unsuited,
)
from .tasks import LongMemory


def quality(bench: Bench) -> Rows:
    """Train ours and its peers on the same tokens, then for the same time; hours."""
    asked = Quality(
        console=bench.console,
        out=_folder("quality", bench),
        data=_corpus("quality", bench),
        width=bench.width,
        num_workers=bench.num_workers,
        device=bench.device,
    )
    if bench.tokens is not None:
        asked = replace(asked, tokens=bench.tokens, tuning_tokens=max(1, bench.tokens // 2))
    return asked.run()


def long(bench: Bench) -> Rows:
    """Train the default on all cores for about an hour, counts of the same tokens beside it."""
    asked = Long(console=bench.console, out=_folder("long", bench), data=_corpus("long", bench))
    return (asked if bench.tokens is None else replace(asked, tokens=bench.tokens)).run()


def ablations(bench: Bench) -> Rows:
    """Train the default with one thing changed at a time: phases, scope, coupling; hours."""
    asked = Ablations(
        console=bench.console,
        out=_folder("ablations", bench),
        data=_corpus("ablations", bench),
        num_workers=bench.num_workers,
        device=bench.device,
    )
    return (asked if bench.tokens is None else replace(asked, tokens=bench.tokens)).run()


def tasks(bench: Bench) -> Rows:
    """Train ours and its peers on tasks that ask for the distant past; hours."""
    return LongMemory(
        console=bench.console,
        out=_folder("tasks", bench),
        num_workers=bench.num_workers,
        device=bench.device,
    ).run()


def _folder(name: str, bench: Bench) -> Path:
    if bench.out is None:
        raise ConfigError(
            f"bench {name} trains for hours and keeps what is finished, no folder was given; "
            "add --out DIR"
        )
    return bench.out


def _corpus(name: str, bench: Bench) -> Path | None:
    data = None if bench.data is None else Path(bench.data)
    if data is not None and not (data / "train.jsonl").is_file():
        raise ConfigError(
            f"bench {name} needs a folder with train.jsonl and valid.jsonl, got {data}; "
            "or leave --data out"
        )
    return data


BENCHES: dict[str, Callable[[Bench], Rows]] = {
    "engines": engines,
    "recurrence": recurrence,
    "sweeps": sweeps,
    "token-scope": token_scope,
    "generation": generation,
    "flatness": flatness,
    "document": document,
    "memory": memory,
    "quality": quality,
    "long": long,
    "ablations": ablations,
    "tasks": tasks,
}
# which options each takes; all else is fixed
TAKEN = {
    "engines": ("checkpoint", "lengths", "batches", "width", "device", "threads"),
    "recurrence": ("lengths", "batches", "width", "device", "threads"),
    "sweeps": ("checkpoint", "data", "lengths", "width", "device", "threads"),
    "token-scope": ("width", "tokens", "threads"),
    "generation": ("checkpoint", "width", "threads"),
    "flatness": ("checkpoint", "width", "tokens", "device", "threads"),
    "document": ("checkpoint", "data", "width", "tokens", "device", "threads"),
    "memory": ("lengths", "width", "device", "threads"),
    "quality": ("data", "width", "tokens", "device", "workers"),
    "long": ("data", "tokens"),
    "ablations": ("data", "tokens", "device", "workers"),
    "tasks": ("device", "workers"),
}
# keep their trials themselves, and take hours
LONG = ("quality", "long", "ablations", "tasks")


def run_bench(
    name: str,
    *,
    console: Console,
    out: Path | None = None,
    page: Path | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Run one benchmark or all, print their tables and return their rows, versions and threads.

    Args:
        name: of the benchmark, or `all`, which is all but those that train for hours.
        console: for progress and tables.
        out: folder that keeps finished benchmarks; they are not run again.
        page: file for the tables, as Markdown.
        settings: of `Bench`.

    Raises:
        ConfigError: there is no such benchmark or device, an option is not obeyed by it, or the
            checkpoint is of no use to it.
        CheckpointError: another process works in `out`.
    """
    if name not in (*BENCHES, "all"):
        raise ConfigError(f"a benchmark is one of {', '.join(BENCHES)} or all; got {name!r}")
    bench = Bench(console=console, out=out, **settings)
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that PyTorch sees, there is none; use cpu")
    if page is not None:
        require_page(page)
    asked = [one for one in BENCHES if one not in LONG] if name == "all" else [name]
    _refuse_others(name, asked, bench)
    threads = torch.get_num_threads()
    if bench.threads is not None:
        torch.set_num_threads(bench.threads)
    try:
        with held(out):
            results = _results(asked, bench)
    finally:
        torch.set_num_threads(threads)
    if page is not None:
        # a page of what took hours holds all that its folder holds
        shown = results if out is None or name not in LONG else finished(out, LONG)
        write_page(page, shown)
    return results


def _results(asked: list[str], bench: Bench) -> dict[str, dict[str, Any]]:
    """Measure, or read what is kept, and print; return the results by name."""
    results: dict[str, dict[str, Any]] = {}
    for name in asked:
        # of `all`, what is for the CPU alone
        own = bench if "device" in TAKEN[name] else replace(bench, device="cpu")
        why = None if name in LONG else unsuited(name, own)
        if why is not None and len(asked) == 1:
            raise ConfigError(f"bench {name}: {why}")
        if why is not None:
            bench.console.show(f"{name} is left out: {why}")
            continue
        results[name] = _result(name, own)
        for title, columns, cells in tables(name, results[name]):
            bench.console.table(title, columns, cells)
    return results


def _result(name: str, bench: Bench) -> dict[str, Any]:
    """Measure, or read what is kept of the same weights, dialogues and settings."""
    about, kept = _about(bench), None
    if bench.out is not None:
        mark = "" if name in LONG else "-" + fingerprint([about, _contents(bench)])[:12]
        kept = bench.out / f"{name}{mark}.json"
    if kept is not None and kept.exists() and name not in LONG:
        result = read_kept(kept)
        result.setdefault("command", _command(name, bench))
        with understood(kept, "the result of a benchmark"):
            list(tables(name, result))
        return result
    torch.manual_seed(0)
    rows = BENCHES[name](bench)
    if name in LONG:
        about |= _of_trainings(rows)
    result = {"rows": rows, **about, "command": _command(name, bench)}
    if kept is not None:
        write_kept(kept, result)
    return result


def _of_trainings(rows: Rows) -> dict[str, Any]:
    """Return what is so of the trainings behind rows, and not of the process that shows them."""
    places = dict.fromkeys(row["trained on"] for row in rows if row.get("trained on"))
    threads = {row.get("threads", 1) for row in rows if row.get("trained on")} or {1}
    return {"device": ", ".join(places), "threads": max(threads)}


def _contents(bench: Bench) -> dict[str, Any]:
    """Return the settings, and what files hold in place of their names."""
    found = _settings(bench)
    if bench.checkpoint is not None:
        # the config seals all other files
        found["checkpoint"] = sha256(resolve(bench.checkpoint) / "config.json")
    if bench.data is not None and Path(bench.data).is_file():
        found["data"] = sha256(Path(bench.data))
    return {name: str(value) for name, value in found.items()}


def _settings(bench: Bench) -> dict[str, Any]:
    parts = ("checkpoint", "data", "lengths", "batches", "width", "tokens", "device", "threads")
    return {part: getattr(bench, part) for part in parts} | {"workers": bench.num_workers}


def _asked(bench: Bench) -> dict[str, Any]:
    """Return the settings that are not as they are by default."""
    usual = _settings(Bench(console=bench.console, device="cpu"))
    return {part: value for part, value in _settings(bench).items() if value != usual[part]}


def _refuse_others(name: str, asked: list[str], bench: Bench) -> None:
    """Refuse what would be printed beside a table and not be obeyed."""
    taken = [*dict.fromkeys(part for one in asked for part in TAKEN[one])]
    for part in _asked(bench):
        if part not in taken:
            raise ConfigError(
                f"bench {name} takes {', '.join(f'--{one}' for one in taken)}, got --{part}, which "
                "it cannot obey; leave it out"
            )
    if bench.data is not None and bench.checkpoint is None and "checkpoint" in taken:
        raise ConfigError(
            f"bench {name} reads --data by the tokenizer of a --checkpoint, got none; without a "
            "model it takes random ids, leave --data out"
        )


def _command(name: str, bench: Bench) -> str:
    """Return what makes a table again; folders by their names, since they lie elsewhere."""
    words = []
    for part, value in _asked(bench).items():
        if part not in TAKEN[name] or part == "workers":
            continue  # of others of `all`, or without a part in the numbers
        if part in ("checkpoint", "data"):
            value = Path(value).name
        words.append(f"--{part} " + (" ".join(map(str, value)) if isinstance(value, tuple)
                                     else str(value)))  # fmt: skip
    if name in LONG:
        words.append("--out DIR")
    return " ".join(["new-llm bench", name, *words])


def _about(bench: Bench) -> dict[str, Any]:
    versions = {}
    for package in ("torch", "transformers", "torchdeq", "new-llm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
    return {"versions": versions, "threads": torch.get_num_threads(), "device": device}
