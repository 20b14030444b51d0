"""Where trials run: side by side in processes of one thread each, and kept once they are done.

A trial is a function of JSON values that returns plain numbers and draws all that is random from
its own seed, so that it can run in any process and be kept on disk.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from .config import fingerprint
from .console import Console
from .errors import StoppedError
from .files import read_sealed, remove_folder, write_sealed

# of the result of a trial
FORMAT_VERSION = 1
# of the code that trains: raised where the same arguments would give other numbers (2: a smaller
# coupling at the start; 3: gates that share a matrix are turned apart, lanes end together), so that
# what an older version kept is not taken for them
RECIPE = 3
Numbers = dict[str, Any]


class Runner:
    """Runs trials and remembers them.

    Args:
        console: for progress.
        folder: keeps what is finished, a file a trial; it is not computed again.
        basis: what decides the numbers beside a trial's name and arguments.
        num_workers: processes; 1 computes in this one. None takes a process a core.
    """

    def __init__(
        self,
        *,
        console: Console,
        folder: Path | None = None,
        basis: Any = None,
        num_workers: int | None = None,
    ) -> None:
        self.console = console
        self.folder = folder
        self.basis = basis
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._known: dict[str, Numbers] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=False, cancel_futures=True)
        if error[0] is not None:
            # what they work on is lost to a run that stops, and may take minutes
            for process in multiprocessing.active_children():
                process.terminate()

    def run(
        self,
        title: str,
        trial: Callable[..., Numbers],
        arguments: Sequence[dict[str, Any]],
        cost: Callable[[dict[str, Any]], float] = lambda given: 1.0,
        *,
        places: dict[str, Any] | None = None,
        unfinished: Path | None = None,
    ) -> list[Numbers]:
        """Return what a trial gives for each of many arguments, in their order.

        Args:
            title: for the progress bar.
            trial: a function of a module.
            arguments: its keyword arguments, JSON values.
            cost: work of arguments, in any unit; the most work begins first.
            places: further arguments that do not decide the numbers, such as folders and threads.
            unfinished: where each trial may keep its state, in a folder that is its argument `kept`
                and is taken away once the trial is done.

        Raises:
            StoppedError: a process was killed, or a loss became NaN.
        """
        keys = [self.key(trial, given) for given in arguments]
        left = {
            key: given
            for key, given in zip(keys, arguments, strict=True)
            if not self._remembers(key)
        }
        order = sorted(left, key=lambda key: -cost(left[key]))
        with self.console.track(title, sum(map(cost, arguments))) as advance:
            advance(sum(cost(given) for given in arguments) - sum(map(cost, left.values())))
            given_all = {key: left[key] | (places or {}) for key in order}
            if unfinished is not None:
                for key, given in given_all.items():
                    given["kept"] = str(unfinished / key)
            for key, numbers in self._computed(trial, given_all):
                self._known[key] = numbers
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    record = {"trial": trial.__name__, "arguments": left[key], "numbers": numbers}
                    write_sealed(self.folder / f"{key}.json", record, version=FORMAT_VERSION)
                if unfinished is not None:
                    remove_folder(unfinished / key)
                advance(cost(left[key]))
        return [self._known[key] for key in keys]

    def key(self, trial: Callable[..., Numbers], arguments: dict[str, Any]) -> str:
        """Return the name that a trial's numbers are kept by."""
        return fingerprint([trial.__name__, arguments, self.basis, RECIPE])

    def _remembers(self, key: str) -> bool:
        kept = None if self.folder is None else self.folder / f"{key}.json"
        if key not in self._known and kept is not None and kept.exists():
            record = read_sealed(
                kept,
                "the result of a trial",
                version=FORMAT_VERSION,
                remedy="delete it to compute it again",
            )
            self._known[key] = record["numbers"]
        return key in self._known

    def _computed(
        self, trial: Callable[..., Numbers], arguments: dict[str, dict[str, Any]]
    ) -> Iterator[tuple[str, Numbers]]:
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
        futures = {self._pool.submit(trial, **given): key for key, given in arguments.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise StoppedError(
                "a process was killed, perhaps for memory; what is finished is "
                "kept in --out: give the same command again, with fewer --workers"
            ) from None
