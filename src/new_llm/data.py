"""Dialogues to tokens: split, memory-mapped store, and segments in a resumable order.

Axes: `N` tokens of a part, `D` its dialogues, `B` lanes, `T` positions of a segment.
"""

import hashlib
import heapq
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .config import DataConfig, fingerprint
from .dialogues import Messages, ReadReport, read_dialogues, source_files
from .errors import CheckpointError, DataError
from .files import atomic_folder, read_json, sha256, understood, write_json
from .tokenizer import ChatTokenizer

# dialogues tokenised together, and characters of text that a vocabulary is trained on
_BATCH = 1000
_TOKENIZER_CHARACTERS = 50_000_000
# ids that every verdict holds out: this share, and at least this many times C
_HELD_OUT_SHARE, _HELD_OUT_WIDTHS = 0.1, 4
_ARRAYS = {"tokens": "<i4", "assistant": "|b1", "offsets": "<i8", "num_content_bytes": "<i8"}


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """One part of the data, memory-mapped."""

    tokens: np.ndarray
    """int32 `[N]`."""
    assistant: np.ndarray
    """Whether a token is said by the assistant, bool `[N]`."""
    offsets: np.ndarray
    """First token of each dialogue, and N, int64 `[D + 1]`."""
    num_content_bytes: np.ndarray
    """UTF-8 bytes of each dialogue's contents, int64 `[D]`."""
    fingerprint: str
    """16 hex digits over all of it."""

    @property
    def num_tokens(self) -> int:
        """Tokens, role tokens included."""
        return len(self.tokens)

    @property
    def num_dialogues(self) -> int:
        """Dialogues."""
        return len(self.offsets) - 1

    def dialogue(self, index: int) -> np.ndarray:
        """Return the token ids of one dialogue."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Return how often each id occurs, int64 `[V]`.

        Raises:
            CheckpointError: one is not of this vocabulary.
        """
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, self.num_tokens, 1 << 22):
            part = self.tokens[start : start + (1 << 22)]
            if part.min() < 0 or part.max() >= vocab_size:
                raise CheckpointError(
                    f"tokens of a vocabulary of {vocab_size} expected, the tokenised data was made "
                    "by another one; use a new --out"
                )
            counts += np.bincount(part, minlength=vocab_size)
        return counts

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Map a store that `write_store` left.

        Raises:
            CheckpointError: a file is missing, truncated or changed.
        """
        meta = read_json(folder / "store.json", "tokenised data")
        arrays = {}
        with understood(folder / "store.json", "tokenised data"):
            checksums = {name: meta["sha256"][name] for name in _ARRAYS}
        for name, dtype in _ARRAYS.items():
            path = folder / f"{name}.bin"
            if not path.is_file() or sha256(path) != checksums[name]:
                raise CheckpointError(
                    f"{path} must match the checksum in store.json, but it is missing, truncated "
                    f"or changed; delete {folder.parent} and run the same command again"
                )
            with understood(path, "tokenised data"):
                arrays[name] = np.memmap(path, dtype=dtype, mode="r")
        store = cls(**arrays, fingerprint=fingerprint(checksums))
        offsets = store.offsets
        if not (
            offsets[0] == 0
            and offsets[-1] == len(store.tokens) == len(store.assistant)
            and (np.diff(offsets) > 0).all()
            and len(store.num_content_bytes) == store.num_dialogues > 0
        ):
            raise CheckpointError(
                f"tokenised data expected, the arrays in {folder} do not fit together; "
                f"delete {folder.parent} and run the same command again"
            )
        return store


def write_store(
    folder: Path,
    dialogues: Iterator[Messages],
    tokenizer: ChatTokenizer,
    progress: Callable[[int], None] = lambda count: None,
) -> TokenStore:
    """Tokenise dialogues into a store, in memory that does not grow with their number.

    Raises:
        DataError: there is no dialogue.
        DiskFullError: there was no room; nothing is left behind.
    """
    num_tokens, lengths, num_bytes = 0, [0], []
    with atomic_folder(folder) as part:
        with (
            (part / "tokens.bin").open("wb") as tokens,
            (part / "assistant.bin").open("wb") as said,
        ):
            while batch := list(islice(dialogues, _BATCH)):
                for messages, (ids, mask) in zip(
                    batch, tokenizer.encode_dialogues(batch), strict=True
                ):
                    tokens.write(ids.astype("<i4").tobytes())
                    said.write(mask.tobytes())
                    num_tokens += len(ids)
                    lengths.append(num_tokens)
                    num_bytes.append(sum(len(m["content"].encode()) for m in messages))
                progress(len(batch))
        if not num_bytes:
            raise DataError(
                "at least one dialogue expected in each part, got none; give more dialogues, "
                "or held-out ones by --valid"
            )
        np.array(lengths, dtype="<i8").tofile(part / "offsets.bin")
        np.array(num_bytes, dtype="<i8").tofile(part / "num_content_bytes.bin")
        checksums = {name: sha256(part / f"{name}.bin") for name in _ARRAYS}
        write_json(part / "store.json", {"sha256": checksums})
    return TokenStore.open(folder)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tokenised data of a run."""

    train: TokenStore
    valid: TokenStore
    tokenizer: ChatTokenizer
    report: dict[str, Any]
    """Rows read, bad, short, and dialogues left out of training."""


def dialogue_hash(messages: Messages) -> bytes:
    """Return the SHA-256 of a dialogue, the same wherever it stands."""
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def is_held_out(messages: Messages, share: float) -> bool:
    """Return whether a dialogue is among the share that its hash holds out.

    >>> is_held_out([{"role": "user", "content": "hello"}], 1.0)
    True
    """
    return int.from_bytes(dialogue_hash(messages)[:8], "big") / 2.0**64 < share


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    progress: Callable[[str, int], None] = lambda what, count: None,
) -> Prepared:
    """Read, split and tokenise dialogues once; later calls open what is there.

    Without `valid`, a dialogue is held out by its hash, so that equal ones are never in both parts;
    with it, dialogues that are also held out are left out of training.

    Raises:
        DataError: dialogues cannot be read, none is left, or fewer tokens than one sequence.
    """
    files = source_files(config.source) + (source_files(config.valid) if config.valid else [])
    done = folder / "prepared.json"
    if done.exists():
        record = read_json(done, "tokenised data")
        with understood(done, "tokenised data"):
            unchanged, report = _unchanged(files, record["files"]), dict(record["report"])
        if not unchanged:
            raise CheckpointError(
                f"the dialogues that {folder} was made from have changed since; choose a new --out"
            )
        return Prepared(
            train=TokenStore.open(folder / "train"),
            valid=TokenStore.open(folder / "valid"),
            tokenizer=ChatTokenizer.load(folder / "tokenizer"),
            report=report,
        )
    source = _Source(config)
    texts = source.texts(config.valid is None)
    tokenizer = ChatTokenizer.from_name(config.tokenizer, texts, config.vocab_size)
    tokenizer.save(folder / "tokenizer")
    progress("vocabulary", 0)
    valid_report = ReadReport()
    if config.valid is None:
        held_out = (m for m in source.dialogues(ReadReport()) if source.is_held_out(m))
    else:
        held_out = read_dialogues(
            config.valid,
            split=config.valid_split,
            on_bad_row=config.on_bad_row,
            max_dialogues=None,
            report=valid_report,
        )
    valid_hashes: set[bytes] = set()

    def remembered() -> Iterator[Messages]:
        for messages in held_out:
            valid_hashes.add(dialogue_hash(messages))
            yield messages

    valid = write_store(
        folder / "valid", remembered(), tokenizer, lambda n: progress("held-out dialogues", n)
    )
    report = ReadReport()
    train = write_store(
        folder / "train",
        (m for m in source.dialogues(report) if dialogue_hash(m) not in valid_hashes),
        tokenizer,
        lambda n: progress("dialogues", n),
    )
    if train.num_tokens < config.sequence_length:
        raise DataError(
            f"at least one sequence of {config.sequence_length} tokens expected to train on, "
            f"{config.source} gave {train.num_tokens}; give more dialogues "
            "or lower --data.sequence-length"
        )
    counts = {
        **asdict(report),
        "num_bad_valid_rows": valid_report.num_bad_rows,
        "num_train_dialogues": train.num_dialogues,
        "num_valid_dialogues": valid.num_dialogues,
    }
    states = [{**_stat(path), "sha256": sha256(path)} for path in files]
    write_json(done, {"files": states, "report": counts})
    return Prepared(train=train, valid=valid, tokenizer=tokenizer, report=counts)


def _stat(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _unchanged(files: list[Path], states: list[dict[str, Any]]) -> bool:
    """Return whether files hold what they held; those only copied or touched are read to see."""
    if len(files) != len(states):
        return False
    return all(
        (stat := _stat(path)) == {key: state[key] for key in stat}
        or (stat["size"] == state["size"] and sha256(path) == state["sha256"])
        for path, state in zip(files, states, strict=True)
    )


class _Source:
    """The dialogues of a config, readable again and again: a corpus need not fit in memory."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def dialogues(self, report: ReadReport) -> Iterator[Messages]:
        return read_dialogues(
            self.config.source,
            split=self.config.split,
            on_bad_row=self.config.on_bad_row,
            max_dialogues=self.config.max_dialogues,
            report=report,
        )

    def is_held_out(self, messages: Messages) -> bool:
        return is_held_out(messages, self.config.valid_fraction)

    def texts(self, splits: bool) -> Iterator[str]:
        """Yield contents of training dialogues, as many as a vocabulary is trained on."""
        left = _TOKENIZER_CHARACTERS
        for messages in self.dialogues(ReadReport()):
            if splits and self.is_held_out(messages):
                continue
            for message in messages:
                yield message["content"]
                left -= len(message["content"])
            if left <= 0:
                return


@contextmanager
def temporary_store(
    source: str, split: str, tokenizer: ChatTokenizer, *, on_bad_row: str = "error"
) -> Iterator[TokenStore]:
    """Yield all dialogues of a source as a store that is gone afterwards.

    Raises:
        DataError: the dialogues cannot be read.
    """
    rows = read_dialogues(
        source, split=split, on_bad_row=on_bad_row, max_dialogues=None, report=ReadReport()
    )
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

    Each epoch permutes the dialogues; one after another goes to the shortest lane, whole, so that
    a context is carried through all segments of a long dialogue. Nothing is dropped. Any segment
    can be asked for, so training resumes anywhere.
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
        for index in order.tolist():
            length, lane = heap[0]
            lanes[lane].append(index)
            heapq.heapreplace(heap, (length + int(lengths[index]), lane))
        self._lanes = [np.array(lane, dtype=np.int64) for lane in lanes]
        self._ends = [np.cumsum(lengths[lane]) for lane in self._lanes]
        self._epoch = epoch

    def segment(self, epoch: int, index: int) -> Segment:
        """Return one segment of an epoch."""
        self._lay_out(epoch)
        store = self.store
        shape = (self.batch_size, self.segment_length)
        rows = np.zeros(shape, dtype=np.int64)
        real, starts, counts = (np.zeros(shape, dtype=bool) for _ in range(3))
        wanted = np.arange(index * self.segment_length, (index + 1) * self.segment_length)
        for lane, (dialogues, ends) in enumerate(zip(self._lanes, self._ends, strict=True)):
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
