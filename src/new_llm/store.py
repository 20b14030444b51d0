"""Tokenised dialogues on disk: written as they come, in files that only grow; opened as arrays.

Axes: `N` tokens of a store, `D` its dialogues.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from .config import fingerprint
from .dialogues import Messages
from .errors import CheckpointError, DataError
from .files import atomic_folder, read_manifest, understood, write_manifest
from .tokenizer import ChatTokenizer, EncodedDialogues

FORMAT_VERSION = 2
# what is tokenised together ends behind so many dialogues, or characters
_BATCH, _BATCH_CHARACTERS = 320, 2_000_000
_ARRAYS = {"tokens": "<i4", "assistant": "|b1", "offsets": "<i8", "num_content_bytes": "<i8"}
T = TypeVar("T")


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

    def cut(self, first: int, last: int) -> "TokenStore":
        """Return the dialogues `first` to `last`, without the last, as a store."""
        begin, end = int(self.offsets[first]), int(self.offsets[last])
        return replace(
            self,
            tokens=self.tokens[begin:end],
            assistant=self.assistant[begin:end],
            offsets=self.offsets[first : last + 1] - begin,
            num_content_bytes=self.num_content_bytes[first:last],
        )

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
        remedy = f"delete {folder.parent} and run the same command again"
        path = folder / "store.json"
        meta = read_manifest(path, "tokenised data", version=FORMAT_VERSION, remedy=remedy)
        with understood(path, "tokenised data"):
            arrays = {
                name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
                for name, dtype in _ARRAYS.items()
            }
            checksums = {name: meta["files"][f"{name}.bin"] for name in _ARRAYS}
        store = cls(**arrays, fingerprint=fingerprint(checksums))
        offsets = store.offsets
        if not (
            offsets[0] == 0
            and offsets[-1] == len(store.tokens) == len(store.assistant)
            and (np.diff(offsets) > 0).all()
            and len(store.num_content_bytes) == store.num_dialogues > 0
        ):
            raise CheckpointError(
                f"tokenised data expected, the arrays in {folder} do not fit together; {remedy}"
            )
        return store


@contextmanager
def growing_file(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    """Yield a file to write behind its first bytes; whatever stands behind them is cut off."""
    with path.open("ab") as file:
        file.truncate(num_bytes)
        yield file


def sync_file(file: BinaryIO) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


class StoreWriter:
    """A store that is being written; what is behind its first dialogues can be cut off again."""

    def __init__(self, folder: Path, *, num_tokens: int = 0, num_dialogues: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_tokens = num_tokens
        self.num_dialogues = num_dialogues
        self._open = ExitStack()
        self._files = {
            name: self._open.enter_context(growing_file(path, size))
            for path, name, size in self._sizes(folder, num_tokens, num_dialogues)
        }
        if num_dialogues == 0:
            self._files["offsets"].write(np.zeros(1, dtype="<i8").tobytes())

    @staticmethod
    def _sizes(
        folder: Path, num_tokens: int, num_dialogues: int
    ) -> Iterator[tuple[Path, str, int]]:
        # before the first dialogue there is no offset either
        counts = {
            "tokens": num_tokens,
            "assistant": num_tokens,
            "offsets": num_dialogues + 1 if num_dialogues else 0,
            "num_content_bytes": num_dialogues,
        }
        for name, count in counts.items():
            yield folder / f"{name}.bin", name, count * np.dtype(_ARRAYS[name]).itemsize

    @classmethod
    def holds(cls, folder: Path, *, num_tokens: int, num_dialogues: int) -> bool:
        """Return whether a writer left at least so much."""
        return all(
            size == 0 or (path.is_file() and path.stat().st_size >= size)
            for path, _, size in cls._sizes(folder, num_tokens, num_dialogues)
        )

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def append(self, dialogues: EncodedDialogues) -> None:
        """Write dialogues behind those that are there."""
        ends = self.num_tokens + np.cumsum(dialogues.lengths)
        written = {
            "tokens": dialogues.tokens,
            "assistant": dialogues.assistant,
            "offsets": ends,
            "num_content_bytes": dialogues.num_content_bytes,
        }
        for name, values in written.items():
            self._files[name].write(values.astype(_ARRAYS[name], copy=False).tobytes())
        self.num_tokens += len(dialogues.tokens)
        self.num_dialogues += len(dialogues.lengths)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for file in self._files.values():
            sync_file(file)

    def seal(self) -> None:
        """Write the checksums with which `TokenStore.open` takes it.

        Raises:
            DataError: there is no dialogue.
        """
        if not self.num_dialogues:
            raise DataError(
                "at least one dialogue expected in each part, got none; give more dialogues, "
                "or held-out ones by --valid"
            )
        self.sync()
        self._open.close()
        write_manifest(self.folder / "store.json", {}, version=FORMAT_VERSION)


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
    batches = ((batch, None) for batch in iter(lambda: take_batch(dialogues), []))
    with atomic_folder(folder) as part, StoreWriter(part) as writer:
        for encoded, _ in encode_ahead(batches, tokenizer):
            writer.append(encoded)
            progress(len(encoded.lengths))
        writer.seal()
    return TokenStore.open(folder)


def take_batch(dialogues: Iterator[Messages]) -> list[Messages]:
    """Return the next dialogues that are tokenised together; none at the end.

    >>> len(take_batch(iter([[{"role": "user", "content": "x" * 1_000_000}]] * 9)))
    2
    """
    batch: list[Messages] = []
    left = _BATCH_CHARACTERS
    for messages in dialogues:
        batch.append(messages)
        left -= sum(len(message["content"]) for message in messages)
        if len(batch) == _BATCH or left <= 0:
            break
    return batch


def encode_ahead(
    batches: Iterable[tuple[list[Messages], T]], tokenizer: ChatTokenizer
) -> Iterator[tuple[EncodedDialogues, T]]:
    """Yield each batch encoded, with what came beside it.

    While one batch is encoded, on all cores and without Python's lock, the caller works on the one
    before it and the one behind it is read: at most three are in memory.
    """
    waiting: deque[tuple[list[Messages], T, Future[list[Any]]]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def first() -> tuple[EncodedDialogues, T]:
        dialogues, beside, contents = waiting.popleft()
        return tokenizer.lay_out(dialogues, contents.result()), beside

    try:
        for dialogues, beside in batches:
            encoding = pool.submit(tokenizer.encode_contents, dialogues)
            waiting.append((dialogues, beside, encoding))
            if len(waiting) > 1:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)
