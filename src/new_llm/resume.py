"""What an interrupted training needs to go on: its state, and when that is kept.

A training that goes on ends with the same bits as one that was never interrupted: weights, the
optimisers' tensors, random state, position and history are kept together, or not at all.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import WEIGHTS, load_tensors, load_weights, save_tensors, weight_tensors
from .distributed import World, divided_as, whole
from .errors import CheckpointError, NonFiniteError
from .files import (
    atomic_folder,
    read_manifest,
    recover_folder,
    require_space,
    understood,
    write_manifest,
)
from .watch import first_bad

FORMAT_VERSION = 4
_KIND = "the state of a training"
_VALUES = "state.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Tensors by name, and plain values, beside weights, optimisers and random state."""

    values: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Clock:
    """Seconds of a training, over all processes that it took."""

    begun: float
    before: float = 0.0
    """Seconds that led to the state that it goes on from."""


Trained = tuple[nn.Module | None, Sequence[torch.optim.Optimizer]]
"""A model, None where its weights were loaded before, and what moves them."""


class Keeper:
    """Keeps the state of a training in a folder: now and then, and when it is asked to stop.

    Args:
        folder: of the state; without one nothing is kept, and Ctrl-C ends at once.
        seconds: between two states.
        world: processes that train together; all keep and stop after the same step.
        owner: whose state it is; that of another run is refused.
        length: length of the history in bytes, once it is safe on disk; a training that goes on
            cuts off what came after its state.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        seconds: float = 120.0,
        world: World | None = None,
        owner: str = "",
        length: Callable[[], int] = lambda: 0,
    ) -> None:
        self.folder = folder
        self.seconds = seconds
        self.world = world or World()
        self.owner = owner
        self.length = length
        self.kept_at: str | None = None
        self._asked = False
        self._saved = time.monotonic()
        self._clock = _Clock(begun=self._saved)

    def alone(self) -> "Keeper":
        """Return a keeper for what one process trains while the others wait."""
        keeper = Keeper(self.folder, seconds=self.seconds, owner=self.owner, length=self.length)
        keeper._clock = self._clock
        return keeper

    def begin(self, at: float | None = None) -> None:
        """Let another training begin, now or at a time of `time.monotonic`."""
        self._clock.begun = time.monotonic() if at is None else at
        self._clock.before = 0.0

    def spent(self) -> float:
        """Return the seconds of the training, those before an interruption included."""
        return self._clock.before + time.monotonic() - self._clock.begun

    def weights(self) -> Path:
        """Return the file of the weights that are kept."""
        assert self.folder is not None
        return self.folder / WEIGHTS

    def values(self) -> dict[str, Any] | None:
        """Return the plain values of what is kept; None where there is nothing.

        Raises:
            CheckpointError: it is damaged, or of another run.
        """
        folder = self.folder
        if folder is None:
            return None

        def read() -> dict[str, Any] | None:
            recover_folder(folder)
            if not folder.is_dir():
                return None
            remedy = f"delete {folder} to begin that phase again"
            values = read_manifest(folder / _VALUES, _KIND, version=FORMAT_VERSION, remedy=remedy)
            if values["owner"] != self.owner:
                raise CheckpointError(
                    f"the state of the run {self.owner} expected, {folder} is of "
                    f"{values['owner']}; {remedy}"
                )
            return values

        # one process looks, so that all go the same way
        return self.world.told(read)

    def load(
        self, trained: tuple[nn.Module | None, Sequence[torch.optim.Optimizer]]
    ) -> TrainingState:
        """Put weights, optimisers and random state back, once `values` has said what is kept.

        Raises:
            CheckpointError: a file is damaged, or does not fit.
        """
        assert self.folder is not None
        values = self.values()
        assert values is not None
        model, optimisers = trained
        if model is not None:
            load_weights(self.weights(), model)
        path = self.folder / "optimiser.safetensors"
        saved = load_tensors(path, _KIND)
        with understood(path, _KIND):
            _load_optimisers(saved, optimisers)
        extra = load_tensors(self.folder / "extra.safetensors", _KIND)
        random = {name: extra.pop(name) for name in list(extra) if name.startswith("random.")}
        for device in _drawing(optimisers):
            mine = random.get(f"random.{device.type}.{self.world.rank}")
            if mine is not None:
                _set_random_state(device, mine)
        self.kept_at = values["at"]
        self._clock.before = values["spent"]
        tensors = {name.removeprefix("extra."): value for name, value in extra.items()}
        return TrainingState(tensors=tensors, values=values)

    def save(self, phase: str, at: str, trained: Trained, state: TrainingState) -> None:
        """Keep a state in place of the one before, `at` which step in words.

        Raises:
            NonFiniteError: a weight is NaN or infinite; what was kept is as it was.
            DiskFullError: there is no room; what was kept is as it was.
        """
        if self.folder is None:
            return
        folder, (model, optimisers) = self.folder, trained
        assert model is not None
        weights = {name: whole(value) for name, value in weight_tensors(model).items()}
        bad = first_bad(weights)
        if bad:
            # the step that would find it has not come yet; all processes have these weights
            error = NonFiniteError(f"weights must stay finite, got others after {at}{bad}")
            error.said = not self.world.is_main
            raise error
        moments = _optimiser_tensors(optimisers)
        extra = {f"extra.{name}": value for name, value in state.tensors.items()}
        for device in _drawing(optimisers):
            now = _random_state(device)
            random = torch.zeros((self.world.size, len(now)), dtype=torch.uint8)
            random[self.world.rank] = now
            for rank, row in enumerate(self.world.total(random)):
                extra[f"random.{device.type}.{rank}"] = row.clone()
        values = state.values | {
            "phase": phase, "at": at, "owner": self.owner, "history": self.length(),
            "spent": self.spent(),
        }  # fmt: skip

        def write() -> None:
            parts = (weights, moments, extra)
            sizes = (value.nbytes for part in parts for value in part.values())
            require_space(folder.parent, sum(sizes))
            with atomic_folder(folder) as part:
                save_tensors(part / WEIGHTS, weights)
                save_tensors(part / "optimiser.safetensors", moments)
                save_tensors(part / "extra.safetensors", extra)
                write_manifest(part / _VALUES, values, version=FORMAT_VERSION)

        self.world.told(write)
        self.kept_at = at
        self._saved = time.monotonic()

    def after_step(self, save: Callable[[], None]) -> None:
        """Keep the state where it is time to, or where a process was asked to stop.

        Raises:
            KeyboardInterrupt: it was asked to stop; the state is kept.
        """
        if self.folder is None:
            return
        due = self.world.is_main and time.monotonic() - self._saved > self.seconds
        stop, due = self.world.total(torch.tensor([float(self._asked), float(due)])).tolist()
        if stop or due:
            save()
        if stop:
            raise KeyboardInterrupt

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the first Ctrl-C, or request to end, until a step is whole; a second ends at once.

        A launcher hands a Ctrl-C to its processes once more: what follows within a second is one.
        """
        main_thread = threading.current_thread() is threading.main_thread()
        if self.folder is None or not main_thread:
            yield
            return
        asked_at = 0.0

        def ask(*_: Any) -> None:
            nonlocal asked_at
            now = time.monotonic()
            if self._asked and (self.world.size == 1 or now - asked_at > 1.0):
                raise KeyboardInterrupt
            self._asked, asked_at = True, asked_at or now

        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, ask) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def last_good(self) -> str:
        """Return in words what is kept."""
        if self.folder is None or self.kept_at is None:
            return "no state was kept before it"
        return f"the last good state, {self.kept_at}, is in {self.folder}"


def _drawing(optimisers: Sequence[torch.optim.Optimizer]) -> list[torch.device]:
    """Return where numbers are drawn: on the CPU, and for dropout where the weights are."""
    of_weights = [p.device for each in optimisers for g in each.param_groups for p in g["params"]]
    return [torch.device("cpu"), *(device for device in of_weights[:1] if device.type != "cpu")]


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(*_which(device))


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, *_which(device))


def _which(device: torch.device) -> list[torch.device]:
    # there is one of this kind, and it is not named
    return [] if device.type == "mps" else [device]


def _optimiser_tensors(optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"{which}.{index}.{name}": whole(value).detach().cpu().clone().contiguous()
        for which, optimiser in enumerate(optimisers)
        for index, slots in optimiser.state_dict()["state"].items()
        for name, value in slots.items()
        if isinstance(value, Tensor)
    }


def _load_optimisers(saved: dict[str, Tensor], optimisers: Sequence[torch.optim.Optimizer]) -> None:
    for which, optimiser in enumerate(optimisers):
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.items():
            of, index, slot = name.split(".", 2)
            if int(of) == which:
                like = parameters[int(index)]
                fits = value.shape == like.shape
                slots.setdefault(int(index), {})[slot] = (
                    divided_as(value.to(like.device), like) if fits else value
                )
        optimiser.load_state_dict(optimiser.state_dict() | {"state": slots})


def synced_length(path: Path) -> int:
    """Return the length of a file in bytes once it is safe on disk; 0 where there is none.

    >>> synced_length(Path("no such file"))
    0
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)
