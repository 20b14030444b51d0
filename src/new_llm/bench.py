"""Benchmarks by name: what `bench` does."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .ablations import Ablations
from .config import fingerprint
from .console import Console
from .errors import ConfigError
from .files import understood
from .quality import Long, Quality
from .results import finished, read_kept, tables, write_kept, write_page
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
# keep their trials themselves, and take hours: which options they take, all else is fixed
_TAKEN = {
    "quality": ("data", "width", "tokens", "device"),
    "long": ("data", "tokens"),
    "ablations": ("data", "tokens", "device"),
    "tasks": ("device",),
}
LONG = tuple(_TAKEN)


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
        ConfigError: there is no such benchmark, or no such device.
    """
    if name not in (*BENCHES, "all"):
        raise ConfigError(f"a benchmark is one of {', '.join(BENCHES)} or all; got {name!r}")
    bench = Bench(console=console, out=out, **settings)
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that PyTorch sees, there is none; use cpu")
    if name in LONG:
        _refuse_others(name, bench)
    results = {}
    for chosen in [one for one in BENCHES if one not in LONG] if name == "all" else [name]:
        about = _about(bench)
        plain = {key: str(value) for key, value in settings.items()}
        mark = "" if chosen in LONG else "-" + fingerprint([about, plain])[:12]
        kept = None if out is None else out / f"{chosen}{mark}.json"
        if kept is not None and kept.exists() and chosen not in LONG:
            result = read_kept(kept)
            result.setdefault("command", _command(chosen, bench))
            with understood(kept, "the result of a benchmark"):
                list(tables(chosen, result))
        else:
            torch.manual_seed(0)
            result = {"rows": BENCHES[chosen](bench), **about}
            result["command"] = _command(chosen, bench)
            if kept is not None:
                write_kept(kept, result)
        results[chosen] = result
        for title, columns, cells in tables(chosen, result):
            console.table(title, columns, cells)
    if page is not None:
        # a page of what took hours holds all that its folder holds
        shown = results if out is None or name not in LONG else finished(out, LONG)
        write_page(page, shown)
    return results


def _asked(bench: Bench) -> dict[str, Any]:
    """Return the settings that are not as they are by default."""
    usual = Bench(console=bench.console, device="cpu")
    parts = ("checkpoint", "data", "lengths", "batches", "width", "tokens", "device")
    asked = {part: getattr(bench, part) for part in parts}
    return {part: value for part, value in asked.items() if value != getattr(usual, part)}


def _refuse_others(name: str, bench: Bench) -> None:
    """Refuse what would be printed beside a table and not be obeyed."""
    taken = _TAKEN[name]
    for part in _asked(bench):
        if part not in taken:
            raise ConfigError(
                f"bench {name} takes {', '.join(f'--{one}' for one in taken)}, got --{part}, which "
                "it cannot obey; leave it out"
            )


def _command(name: str, bench: Bench) -> str:
    """Return what makes a table again; folders by their names, since they lie elsewhere."""
    words = []
    for part, value in _asked(bench).items():
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
