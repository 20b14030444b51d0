"""Dialogues to tokens: both parts of the data, and segments in a resumable order.

Axes: `B` lanes, `T` positions of a segment.
"""

import heapq
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import DataConfig
from .dialogues import ReadReport, read_dialogues, source_files
from .errors import CheckpointError
from .files import read_sealed
from .preparation import FORMAT_VERSION, Preparation, discard, unchanged
from .preparation import dialogue_hash as dialogue_hash
from .preparation import is_held_out as is_held_out
from .store import TokenStore, write_store
from .tokenizer import ChatTokenizer

# ids that every verdict holds out: this share, and at least this many times C
_HELD_OUT_SHARE, _HELD_OUT_WIDTHS = 0.1, 4
# what is written when all else is
_DONE = "prepared.json"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tokenised data of a run."""

    train: TokenStore
    valid: TokenStore
    tokenizer: ChatTokenizer
    report: dict[str, Any]
    """Rows read, bad, short, and dialogues left out of training."""


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    progress: Callable[[str, int], None] = lambda what, count: None,
) -> Prepared:
    """Read, split and tokenise dialogues once; later calls open what is there.

    Without `valid`, a dialogue is held out by its hash, so that equal ones are never in both parts;
    with it, dialogues that are also held out are left out of training. One call that was killed,
    and the same call again, leave the bytes that one alone would have left.

    Raises:
        DataError: dialogues cannot be read, none is left, or fewer tokens than one sequence.
        StoppedError: the disk was full, or dialogues could not be reached any more; the same call
            goes on later.
    """
    files = source_files(config.source) + (source_files(config.valid) if config.valid else [])
    if not (folder / _DONE).exists():
        Preparation(config, folder, files, progress).run()
    prepared = open_prepared(folder, files)
    # what is left where it was killed at its very end
    discard(folder)
    return prepared


def open_prepared(folder: Path, files: list[Path] | None = None) -> Prepared:
    """Open what `prepare` left, and check that it was made from these files if they are given.

    Raises:
        CheckpointError: it is missing, damaged, or the dialogues have changed.
    """
    done = folder / _DONE
    remedy = f"delete {folder} and run the same command again"
    record = read_sealed(done, "tokenised data", version=FORMAT_VERSION, remedy=remedy)
    if files is not None and not unchanged(files, record["files"]):
        raise CheckpointError(
            f"the dialogues that {folder} was made from have changed since; choose a new --out"
        )
    parts = {name: TokenStore.open(folder / name) for name in ("train", "valid")}
    tokenizer = ChatTokenizer.load(folder / "tokenizer")
    found = {name: part.fingerprint for name, part in parts.items()}
    for name, given in {**found, "tokenizer": tokenizer.fingerprint}.items():
        if given != record["parts"][name]:
            raise CheckpointError(
                f"{folder / name} must be the one that {done} speaks of, "
                f"{record['parts'][name]}, got {given}; {remedy}"
            )
    return Prepared(**parts, tokenizer=tokenizer, report=record["report"])


@contextmanager
def temporary_store(
    source: str,
    split: str,
    tokenizer: ChatTokenizer,
    *,
    on_bad_row: str = "error",
    report: ReadReport | None = None,
) -> Iterator[TokenStore]:
    """Yield all dialogues of a source as a store that is gone afterwards.

    `report` takes count of what was left out.

    Raises:
        DataError: the dialogues cannot be read.
    """
    rows = read_dialogues(
        source, split=split, on_bad_row=on_bad_row, max_dialogues=None,
        report=ReadReport() if report is None else report,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="new-llm-") as folder:
        yield write_store(Path(folder) / "store", rows, tokenizer)


def held_out_ids(vocab_size: int, context_width: int) -> np.ndarray:
    """Return the token ids that Phase 1 never trains on, sorted: 10 % by hash, at least 4C.

    Half of the vocabulary at most, where it is small.

    >>> len(held_out_ids(50_259, 256)), len(held_out_ids(4096, 256)), len(held_out_ids(300, 256))
    (5026, 1024, 150)
    """
    wanted = max(round(_HELD_OUT_SHARE * vocab_size), _HELD_OUT_WIDTHS * context_width)
    # splitmix64: every bit of the hash depends on every bit of the id
    mixed = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
    return np.sort(order[: min(wanted, vocab_size // 2)])


@dataclass(frozen=True, kw_only=True)
class Segment:
    """T tokens of each of B lanes, all arrays `[B, T]`."""

    tokens: np.ndarray
    """Inputs, int64."""
    targets: np.ndarray
    """Next tokens, int64."""
    counts: np.ndarray
    """Whether there is a target: the next token is of the same dialogue."""
    assistant: np.ndarray
    """Whether the target is said by the assistant."""
    starts: np.ndarray
    """Whether the input is the first token of its dialogue."""
    real: np.ndarray
    """False at padding, behind a lane's end."""
    rows: np.ndarray
    """Where the input stands in the store, int64; 0 at padding."""


class SegmentStream:
    """The dialogues of a store as B lanes of about equal length, cut into segments of T.

    A dialogue goes to a lane whole, so that a context is carried through all segments of a long
    one: the longest first, each to the lane that is shortest by then, so that all lanes end at
    about the same time. Within a lane they stand in an order that each epoch permutes. Nothing is
    dropped. Any segment can be asked for, so training resumes anywhere.

    Source: Graham 1969, "Bounds on multiprocessing timing anomalies".
    """

    def __init__(
        self, store: TokenStore, *, batch_size: int, segment_length: int, seed: int | None
    ) -> None:
        self.store = store
        self.batch_size = batch_size
        self.segment_length = segment_length
        self.seed = seed
        self._counts: list[int] = []
        self._epoch = -1
        self._lanes: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self.num_segments = self._count(0)

    def locate(self, step: int) -> tuple[int, int]:
        """Return epoch and segment of a step counted from the first epoch's first segment."""
        epoch = 0
        while step >= self._count(epoch):
            step -= self._count(epoch)
            epoch += 1
        return epoch, step

    def _count(self, epoch: int) -> int:
        """Return the segments of an epoch; a few more or less, as the longest lane falls out."""
        while len(self._counts) <= epoch:
            self._lay_out(len(self._counts))
            longest = max(int(ends[-1]) for ends in self._ends if len(ends))
            self._counts.append(-(-longest // self.segment_length))
        return self._counts[epoch]

    def _lay_out(self, epoch: int) -> None:
        """Give the dialogues of an epoch to the lanes."""
        if epoch == self._epoch:
            return
        order = np.arange(self.store.num_dialogues)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        lengths = np.diff(self.store.offsets)
        lanes: list[list[int]] = [[] for _ in range(self.batch_size)]
        heap = [(0, lane) for lane in range(self.batch_size)]
        for place in np.argsort(-lengths[order], kind="stable").tolist():
            length, lane = heap[0]
            lanes[lane].append(place)
            heapq.heapreplace(heap, (length + int(lengths[order[place]]), lane))
        self._lanes = [order[np.sort(np.array(lane, dtype=np.int64))] for lane in lanes]
        self._ends = [np.cumsum(lengths[lane]) for lane in self._lanes]
        self._epoch = epoch

    def segment(self, epoch: int, index: int, lanes: slice = slice(None)) -> Segment:
        """Return one segment of an epoch, of all lanes or of some."""
        self._lay_out(epoch)
        store = self.store
        mine = list(zip(self._lanes, self._ends, strict=True))[lanes]
        shape = (len(mine), self.segment_length)
        rows = np.zeros(shape, dtype=np.int64)
        real, starts, counts = (np.zeros(shape, dtype=bool) for _ in range(3))
        wanted = np.arange(index * self.segment_length, (index + 1) * self.segment_length)
        for lane, (dialogues, ends) in enumerate(mine):
            inside = wanted[wanted < (ends[-1] if len(ends) else 0)]
            if not len(inside):
                continue
            place = np.searchsorted(ends, inside, side="right")
            dialogue = dialogues[place]
            # counted from the end, so that no second array of starts is kept
            left = ends[place] - inside
            row = store.offsets[dialogue + 1] - left
            part = slice(0, len(inside))
            rows[lane, part], real[lane, part] = row, True
            starts[lane, part] = row == store.offsets[dialogue]
            counts[lane, part] = left > 1
        following = np.minimum(rows + 1, store.num_tokens - 1)
        return Segment(
            tokens=np.where(real, store.tokens[rows], 0).astype(np.int64),
            targets=np.where(counts, store.tokens[following], 0).astype(np.int64),
            counts=counts,
            assistant=counts & store.assistant[following],
            starts=starts,
            real=real,
            rows=rows,
        )
