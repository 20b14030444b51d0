"""Where trials run: side by side in processes of one thread each, and kept once they are done."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from . import __version__, trials
from .config import PRESETS, fingerprint, to_dict
from .console import Console
from .dialogues import Messages, ReadReport, read_dialogues
from .errors import DataError, StoppedError
from .files import read_json, write_json
from .tokenizer import ChatTokenizer
from .trials import SEED_RULE, Numbers

CELLS = ("sequential", "layerwise")
TEXT_LENGTH = 512
TEXT_DIALOGUES = 10
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Text:
    """Real dialogues in GPT-2's vocabulary, the first 512 tokens of each."""

    source: str
    train: list[list[int]]
    """Ten dialogues that are trained on."""
    held_out: list[list[int]]
    """Ten others."""


class Laboratory:
    """Runs trials and remembers them.

    Args:
        data: dialogues, in any form that `run` takes; None is the default package.
        out: folder that keeps what is finished; it is not computed again.
        num_workers: processes; 1 computes in this one. None takes a process a core.
        console: for progress.
    """

    def __init__(
        self,
        *,
        console: Console,
        data: str | None = None,
        out: Path | None = None,
        num_workers: int | None = None,
    ) -> None:
        self.console = console
        self.source = "chitchat-dataset" if data is None else data
        self.folder = None if out is None else out / "trials"
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._known: dict[str, Numbers] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Laboratory":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=False, cancel_futures=True)
        if error[0] is not None:
            # what they work on is lost to a run that stops, and may take minutes
            for process in multiprocessing.active_children():
                process.terminate()

    @cached_property
    def text(self) -> Text:
        """The dialogues of the experiments on real text."""
        return read_text(self.source)

    def run(
        self,
        title: str,
        trial: Callable[..., Numbers],
        arguments: Sequence[dict[str, Any]],
        cost: Callable[[dict[str, Any]], float] = lambda given: 1.0,
    ) -> list[Numbers]:
        """Return what a trial gives for each of many arguments, in their order.

        Args:
            title: for the progress bar.
            trial: a function of `trials`.
            arguments: its keyword arguments, JSON values.
            cost: work of arguments, in any unit; the most work begins first.

        Raises:
            StoppedError: a process was killed, or a loss became NaN.
        """
        keys = [_key(trial, given) for given in arguments]
        left = {
            key: given
            for key, given in zip(keys, arguments, strict=True)
            if not self._remembers(key)
        }
        order = sorted(left, key=lambda key: -cost(left[key]))
        with self.console.track(title, sum(map(cost, arguments))) as advance:
            advance(sum(cost(given) for given in arguments) - sum(map(cost, left.values())))
            for key, numbers in self._computed(trial, {key: left[key] for key in order}):
                self._known[key] = numbers
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    record = {"trial": trial.__name__, "numbers": numbers}
                    write_json(self.folder / f"{key}.json", record)
                advance(cost(left[key]))
        return [self._known[key] for key in keys]

    def _remembers(self, key: str) -> bool:
        kept = None if self.folder is None else self.folder / f"{key}.json"
        if key not in self._known and kept is not None and kept.exists():
            self._known[key] = read_json(kept, "the result of a trial")["numbers"]
        return key in self._known

    def _computed(self, trial: Callable[..., Numbers], arguments: dict[str, dict[str, Any]]):
        if self.num_workers == 1 or len(arguments) < 2:
            before = torch.get_num_threads()
            torch.set_num_threads(1)  # as in a process of the pool: sums keep their order
            try:
                for key, given in arguments.items():
                    yield key, trial(**given)
            finally:
                torch.set_num_threads(before)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.num_workers,
                # a copy of a process that has threads may hang
                mp_context=multiprocessing.get_context("spawn"),
                initializer=torch.set_num_threads,
                initargs=(1,),
            )
        futures = {
            self._pool.submit(getattr(trials, trial.__name__), **given): key
            for key, given in arguments.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise StoppedError(
                "a process of the laboratory was killed, perhaps for memory; what is finished is "
                "kept in --out: give the same command again, with fewer --workers"
            ) from None


def _key(trial: Callable[..., Numbers], arguments: dict[str, Any]) -> str:
    """Return what decides a trial's numbers; no trial trains Phase 2."""
    configs = [
        to_dict(part)
        for config in (make() for make in PRESETS.values())
        for part in (config.model, config.solver, config.phase1)
    ]
    return fingerprint([__version__, trial.__name__, arguments, configs, SEED_RULE])


def read_text(source: str) -> Text:
    """Read the first dialogues of a source that are long enough, half of them held out.

    Raises:
        DataError: the source cannot be read, or too few dialogues are long enough.
    """
    tokenizer = ChatTokenizer.gpt2()
    rows = read_dialogues(
        source, split="train_sft", on_bad_row="skip", max_dialogues=None, report=ReadReport()
    )
    found: list[list[int]] = []
    batch: list[Messages] = []

    def take() -> None:
        encoded = (ids.tolist() for ids, _ in tokenizer.encode_dialogues(batch))
        found.extend(ids[:TEXT_LENGTH] for ids in encoded if len(ids) >= TEXT_LENGTH)
        batch.clear()

    for messages in rows:
        batch.append(messages)
        if len(batch) == _BATCH:
            take()
        if len(found) >= 2 * TEXT_DIALOGUES:
            break
    if batch:
        take()
    if len(found) < 2 * TEXT_DIALOGUES:
        raise DataError(
            f"{2 * TEXT_DIALOGUES} dialogues of at least {TEXT_LENGTH} tokens expected, "
            f"{source} has {len(found)}; give longer dialogues to --data"
        )
    return Text(
        source=source,
        train=found[:TEXT_DIALOGUES],
        held_out=found[TEXT_DIALOGUES : 2 * TEXT_DIALOGUES],
    )
