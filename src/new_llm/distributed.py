"""Several processes of one run: who takes which share, and what all of them know.

The only module that talks to `torch.distributed` and to accelerate's launcher. A run of one process
is a world of its own, in which nothing is sent; all code above is written for a world of any size.

    torchrun --nproc-per-node 2 -m new_llm run ...
    accelerate launch -m new_llm run ...
"""

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import errors
from .errors import ConfigError, LostProcessError, NewLLMError

Value = TypeVar("Value")
# a process that died is noticed at once; this is for one whose machine is silent
_STEP_MINUTES = 10
# how long others wait for what one process does alone, such as tokenising a large corpus
_ALONE_DAYS = 7
# what a collective says of a process that is no longer there
_GONE = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "gloo", "nccl",
         "unreachable", "watchdog")  # fmt: skip


def num_processes() -> int:
    """Return how many processes the launcher began; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them.

    What is divided is divided in order: the parts of all processes, one after another, are the
    whole, so that a result does not depend on how many there are.

    >>> World().share(5), World(rank=1, size=2).share(5)
    (slice(0, 5, None), slice(3, 5, None))
    """

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """Processes."""
    patient: Any = None
    """Group of processes that wait long for each other; None where there is one."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return which of `count` things are this process's; shares differ by one at most."""
        every, more = divmod(count, self.size)
        begin = self.rank * every + min(self.rank, more)
        return slice(begin, begin + every + (self.rank < more))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes; it has no gradient."""
        if self.size == 1:
            return values
        summed = values.detach().clone()
        with self.guarded():
            torch.distributed.all_reduce(summed, group=self._group(summed))
        return summed

    def _group(self, tensor: Tensor) -> Any:
        """Return who takes a tensor: where GPUs talk by NCCL, that knows no other memory."""
        plain = tensor.device.type == "cpu" and torch.distributed.get_backend() != "gloo"
        return self.patient if plain else None

    def gathered(self, part: Tensor, count: int) -> Tensor:
        """Return all `[count, ...]` of which each process has its `share`.

        Every process computes the same of what it gets, so the gradient that flows back is that of
        its own share: `scaled` losses have the gradient of one process that holds all.
        """
        if self.size == 1:
            return part
        return _Gather.apply(part, self, count)  # pyright: ignore[reportReturnType]

    def scaled(self, loss: Tensor) -> Tensor:
        """Return a loss, or this share of a sum, times what the mean over processes takes away."""
        return loss if self.size == 1 else loss * self.size

    def told(self, make: Callable[[], Value]) -> Value:
        """Return what the main process makes, a JSON value, on all; the others wait.

        Raises:
            NewLLMError: `make` raised it; it is raised everywhere, and said once.
        """
        if self.size == 1:
            return make()
        outcome: Any = None
        mine: BaseException | None = None
        if self.is_main:
            try:
                outcome = ["value", make()]
            except (NewLLMError, KeyboardInterrupt) as error:
                outcome, mine = ["error", type(error).__name__, str(error)], error
        kind, *rest = self._broadcast(outcome)
        if mine is not None:
            raise mine
        if kind == "error" and rest[0] == "KeyboardInterrupt":
            raise KeyboardInterrupt
        if kind == "error":
            error = getattr(errors, rest[0], NewLLMError)(rest[1])
            error.said = True
            raise error
        return rest[0]

    def _broadcast(self, value: Any, source: int = 0) -> Any:
        """Send a JSON value of one process to all; nothing is pickled."""
        data = json.dumps(value).encode() if self.rank == source else b""
        with self.guarded():
            length = torch.tensor([len(data)])
            torch.distributed.broadcast(length, source, group=self.patient)
            sent = torch.empty(int(length), dtype=torch.uint8)
            if self.rank == source:
                sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            torch.distributed.broadcast(sent, source, group=self.patient)
        return json.loads(sent.numpy().tobytes())

    def earliest(self, place: int, text: str) -> str:
        """Return the text of the process whose place is the smallest; all must ask."""
        if self.size == 1:
            return text
        places = torch.zeros(self.size, dtype=torch.int64)
        places[self.rank] = place
        # the first of equal ones
        return self._broadcast(text, int(self.total(places).argmin()))

    def send(self, module: nn.Module) -> None:
        """Give the main process's parameters and buffers to all others."""
        if self.size == 1:
            return
        with torch.no_grad(), self.guarded():
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, 0, group=self._group(tensor))

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.size > 1:
            with self.guarded():
                torch.distributed.barrier(group=self.patient)

    def replicated(
        self, module: nn.Module, *, sharded: bool = False, partly: bool = False
    ) -> nn.Module:
        """Return a module whose gradients are the mean over processes.

        Args:
            module: the loss as a module; only parameters that need a gradient are looked at.
            sharded: divide parameters, gradients and all that an optimiser made from them keeps
                (FSDP2); else each process has all (DDP).
            partly: some parameters may have no part in the loss.
        """
        if self.size == 1:
            return module
        with self.guarded():
            if sharded:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                # the launcher's first choice may be another kind of device
                kind = next(module.parameters()).device.type
                fully_shard(module, mesh=init_device_mesh(kind, (self.size,)))
                return module
            with warnings.catch_warnings():
                # newer versions have another word for it, which older ones do not know
                warnings.simplefilter("ignore", FutureWarning)
                # buffers are computed alike everywhere
                replicas = nn.parallel.DistributedDataParallel(
                    module, broadcast_buffers=False, find_unused_parameters=partly
                )
            replicas.register_comm_hook(self.size, _mean_of_each)
            return replicas

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what a collective says of a lost process into one error.

        Raises:
            LostProcessError: another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.size > 1 and any(word in text for word in _GONE):
                raise self.lost() from error
            raise

    def lost(self) -> LostProcessError:
        """Return the error for a process that no longer answers."""
        return LostProcessError(
            f"all {self.size} processes must stay alive, process {self.rank} lost another one; "
            "look for its own message, then give the same command again: it goes on from the last "
            "state"
        )


class _Gather(torch.autograd.Function):
    """Each process's rows at their place; backward, the gradient of one's own rows."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        part, world, count = inputs
        ctx.share = world.share(count)
        # a sum with zeros is exact, and takes uneven shares on any backend
        whole = part.new_zeros((count, *part.shape[1:]))
        whole[ctx.share] = part
        with world.guarded():
            torch.distributed.all_reduce(whole, group=world._group(whole))
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][ctx.share], None, None


def _mean_of_each(
    size: int,
    bucket: torch.distributed.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[Tensor]:
    """Take the mean of a bucket's gradients over processes, each gradient by itself.

    How a sum of three is rounded depends on where a number stands in what is sent, and buckets are
    laid out anew after the first step: a training that goes on would have other bits.
    """
    bucket.buffer().div_(size)
    sums = []
    for gradient in bucket.gradients():
        work: Any = torch.distributed.all_reduce(gradient, async_op=True)
        sums.append(work.get_future())

    def summed(done: Any) -> Tensor:
        for part in done.value():
            # a process that is gone is an error of one of them
            part.value()
        return bucket.buffer()

    return torch.futures.collect_all(sums).then(summed)


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be divided."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def is_divided(tensor: Tensor) -> bool:
    """Return whether a tensor is divided among processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be divided among processes; all must ask."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def divided_as(full: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process has, divided as another one of its shape is."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mesh, like.placements, src_data_rank=None)  # pyright: ignore


@contextmanager
def undivided(module: nn.Module) -> Iterator[None]:
    """Let a sharded module's parameters be whole in a block, for work outside of its forward."""
    unshard = getattr(module, "unshard", None)
    if unshard is None:
        yield
        return
    unshard()
    try:
        yield
    finally:
        module.reshard()  # pyright: ignore[reportCallIssue]


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device | None]]:
    """Yield the world of this process, and the device that a launcher gave it.

    Raises:
        ConfigError: the processes cannot reach each other.
        LostProcessError: another process is gone.
    """
    if num_processes() == 1:
        yield World(), None
        return
    from accelerate import PartialState

    with warnings.catch_warnings():
        # it names a number of threads that launchers have set already
        warnings.simplefilter("ignore")
        try:
            plain = device == "cpu" or not torch.accelerator.is_available()
            state = PartialState(cpu=plain, timeout=timedelta(minutes=_STEP_MINUTES))
            patient = torch.distributed.new_group(
                backend="gloo", timeout=timedelta(days=_ALONE_DAYS)
            )
        except (RuntimeError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"{num_processes()} processes that reach each other expected, got none ({first}); "
                "check MASTER_ADDR and MASTER_PORT, or start one process without a launcher"
            ) from None
    world = World(rank=state.process_index, size=state.num_processes, patient=patient)
    # a launcher ends the others where one process has died
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def ended(*_: Any) -> None:
        raise world.lost()

    signal.signal(signal.SIGTERM, ended)
    try:
        with world.guarded():
            yield world, state.device
        state.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)
