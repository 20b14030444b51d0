"""The cache of fixed points: written once, memory-mapped, checksummed, refused when stale.

Token scope has one row a vocabulary id, `[V, K, C]`, whatever the corpus; sequence scope one row a
position, `[N, K, C]`, for training a read-out on frozen contexts. Float32, little-endian, in shards
whose number depends on the rows alone: several processes write them side by side, and a shard that
is whole is not written again after an interruption.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import weights_fingerprint
from .config import fingerprint, to_dict
from .console import Advance
from .data import SegmentStream, TokenStore
from .distributed import World
from .errors import CheckpointError, DamagedCacheError, StaleCacheError
from .files import (
    atomic_file,
    disk_error,
    read_sealed,
    remove_folder,
    require_space,
    sha256,
    sync_rename,
    write_sealed,
)
from .model import NewLLM

FORMAT_VERSION = 2
_META = "cache.json"
_KIND = "a cache"
# ids solved at once: bounds memory at any vocabulary
TOKEN_BATCH = 8192
# of a shard, which may be one long dialogue more
SHARD_BYTES = 256 << 20
# dialogues are read side by side: one after another they take 1.7 times as long on a CPU
_LANES = 16
_LANE_TOKENS = 8192
Span = tuple[int, int]
"""First row and the row behind the last."""
Part = tuple[np.ndarray, np.ndarray]
"""Row numbers within a span, `[n]`, and the rows, `[n, K, C]`."""


class Rows:
    """Shards one after another, memory-mapped, read as one array `[rows, K, C]`.

    >>> rows = Rows([np.zeros((2, 1, 3)), np.ones((2, 1, 3))])
    >>> rows.shape, rows[np.array([3, 0])][:, 0, 0].tolist()
    ((4, 1, 3), [1.0, 0.0])
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        self.shape = (int(self._ends[-1]), *shards[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """Return rows by their numbers, `[n]` to `[n, K, C]`."""
        wanted = np.arange(len(self))[index] if isinstance(index, slice) else index
        found = np.empty((len(wanted), *self.shape[1:]), dtype=np.float32)
        place = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(place):
            chosen = place == number
            first = self._ends[number] - len(self.shards[number])
            found[chosen] = self.shards[number][wanted[chosen] - first]
        return found

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.concatenate(list(self.shards)).astype(dtype or np.float32, copy=False)


@dataclass(frozen=True, kw_only=True)
class ContextCache:
    """An open cache."""

    contexts: Rows
    """`[rows, K, C]` float32, memory-mapped, read-only."""
    key: str
    """Fingerprint of weights, scope, solver and data."""


def token_key(model: NewLLM) -> str:
    """Return the fingerprint that a token-scope cache of this model must have."""
    return _key(model, "token", None)


def sequence_key(model: NewLLM, store: TokenStore) -> str:
    """Return the fingerprint that a sequence-scope cache of this model and data must have."""
    return _key(model, "sequence", store.fingerprint)


def _key(model: NewLLM, scope: str, data: str | None) -> str:
    parts = [weights_fingerprint(model), scope, to_dict(model.solver), data]
    return fingerprint(parts)


def write_token_cache(
    folder: Path, model: NewLLM, advance: Advance, world: World | None = None
) -> ContextCache:
    """Solve every vocabulary id once and keep the delivered contexts, a row an id.

    Raises:
        DiskFullError: the rows would not fit.
    """
    model.eval()

    def rows(span: Span) -> Iterator[Part]:
        device = model.embedding.weight.device
        for start in range(*span, TOKEN_BATCH):
            ids = torch.arange(start, min(start + TOKEN_BATCH, span[1]))
            yield ids.numpy() - span[0], model.search(ids.to(device)).contexts.cpu().numpy()

    shape = _shape(model, model.vocab_size)
    every = max(TOKEN_BATCH, _rows_of_a_shard(shape) // TOKEN_BATCH * TOKEN_BATCH)
    spans = [(start, min(start + every, shape[0])) for start in range(0, shape[0], every)]
    return _write(folder, token_key(model), shape, spans, rows, advance, world or World())


def write_sequence_cache(
    folder: Path, model: NewLLM, store: TokenStore, advance: Advance, world: World | None = None
) -> ContextCache:
    """Read every dialogue from its start and keep the context after each position, in store order.

    Raises:
        DiskFullError: the rows would not fit.
    """
    model.eval()

    def rows(span: Span) -> Iterator[Part]:
        first, last = np.searchsorted(store.offsets, span)
        part = store.cut(int(first), int(last))
        # no more than there is to read beside the longest
        lanes = min(max(part.num_tokens // int(np.diff(part.offsets).max()), 1), _LANES)
        stream = SegmentStream(
            part, batch_size=lanes, segment_length=_LANE_TOKENS // lanes, seed=None
        )
        context = model.initial_context(lanes)
        device = context.device
        for index in range(stream.num_segments):
            segment = stream.segment(0, index)
            ids = torch.from_numpy(segment.tokens).to(device)
            starts = torch.from_numpy(segment.starts).to(device)
            with torch.no_grad():
                _, contexts = model.stream_contexts(ids, context, starts=starts)
            found = torch.stack(contexts, dim=2)
            context = found[:, -1]
            yield segment.rows[segment.real], found.cpu().numpy()[segment.real]

    shape = _shape(model, store.num_tokens)
    spans = _dialogue_spans(store, _rows_of_a_shard(shape))
    return _write(folder, sequence_key(model, store), shape, spans, rows, advance, world or World())


def _dialogue_spans(store: TokenStore, every: int) -> list[Span]:
    """Divide the rows of a store between dialogues, about `every` of them a span."""
    spans: list[Span] = []
    begin = 0
    while begin < store.num_tokens:
        place = int(np.searchsorted(store.offsets, begin + every))
        end = int(store.offsets[min(place, store.num_dialogues)])
        spans.append((begin, end))
        begin = end
    return spans


def _rows_of_a_shard(shape: tuple[int, int, int]) -> int:
    return max(1, SHARD_BYTES // (4 * shape[1] * shape[2]))


def _shape(model: NewLLM, num_rows: int) -> tuple[int, int, int]:
    return num_rows, model.config.num_blocks, model.config.context_width


def cache_bytes(model: NewLLM, num_rows: int) -> int:
    """Return the size of a cache of so many rows, bytes.

    >>> from new_llm.config import ModelConfig
    >>> model = NewLLM(ModelConfig(num_blocks=1, context_width=256), 300)
    >>> cache_bytes(model, 50_259) / 1e6
    51.465216
    """
    return 4 * int(np.prod(_shape(model, num_rows)))


def _write(
    folder: Path,
    key: str,
    shape: tuple[int, int, int],
    spans: list[Span],
    rows: Callable[[Span], Iterator[Part]],
    advance: Advance,
    world: World,
) -> ContextCache:
    shards = folder.with_name(f".{folder.name}.shards")
    names = [f"contexts-{number + 1:05d}-of-{len(spans):05d}.f32" for number in range(len(spans))]

    def left() -> list[int]:
        kept = [
            _kept(shards, name, key, span, shape) for name, span in zip(names, spans, strict=True)
        ]
        todo = [number for number, is_kept in enumerate(kept) if not is_kept]
        num_bytes = sum(spans[n][1] - spans[n][0] for n in todo) * 4 * shape[1] * shape[2]
        require_space(folder.parent, num_bytes)
        try:
            shards.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, shards) from error
        return todo

    todo = world.told(left)
    advance(shape[0] - sum(spans[number][1] - spans[number][0] for number in todo))
    for number in todo[world.rank :: world.size]:
        _write_shard(shards / names[number], key, spans[number], shape, rows, advance)
    world.wait()

    def finish() -> None:
        found = [
            read_sealed(_side(shards / name), _KIND, version=FORMAT_VERSION, remedy=_again(folder))
            for name in names
        ]
        listed = [{name: row[name] for name in ("file", "rows", "sha256")} for row in found]
        write_sealed(
            shards / _META, {"key": key, "shape": list(shape), "shards": listed},
            version=FORMAT_VERSION,
        )  # fmt: skip
        for path in shards.iterdir():
            if path.name not in (_META, *names):
                path.unlink()
        remove_folder(folder)
        sync_rename(shards, folder)

    world.told(finish)
    return open_cache(folder, key)


def _side(path: Path) -> Path:
    return path.with_suffix(".json")


def _kept(shards: Path, name: str, key: str, span: Span, shape: tuple[int, int, int]) -> bool:
    """Return whether an earlier call has written a shard of this very cache."""
    path = shards / name
    try:
        row = read_sealed(_side(path), _KIND, version=FORMAT_VERSION, remedy="")
    except CheckpointError:
        return False
    size = 4 * (span[1] - span[0]) * shape[1] * shape[2]
    same = row["key"] == key and row["rows"] == list(span)
    return same and path.is_file() and path.stat().st_size == size


def _write_shard(
    path: Path,
    key: str,
    span: Span,
    shape: tuple[int, int, int],
    rows: Callable[[Span], Iterator[Part]],
    advance: Advance,
) -> None:
    # whatever it was, it is not this shard
    _side(path).unlink(missing_ok=True)
    num_rows, row_bytes = 0, 4 * shape[1] * shape[2]
    with atomic_file(path) as part:
        with part.open("wb") as file:
            for numbers, some in rows(span):
                edges = np.flatnonzero(np.diff(numbers) != 1) + 1
                runs = zip(np.split(numbers, edges), np.split(some, edges), strict=True)
                for places, values in runs:
                    file.seek(int(places[0]) * row_bytes)
                    file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
                num_rows += len(some)
                advance(len(some))
        checksum = sha256(part)
    if num_rows != span[1] - span[0]:
        raise AssertionError(f"shard {span} was given {num_rows} rows of {shape}")
    values = {"file": path.name, "key": key, "rows": list(span), "sha256": checksum}
    write_sealed(_side(path), values, version=FORMAT_VERSION)


def _again(folder: Path) -> str:
    return f"delete {folder} and run new-llm cache again"


def open_cache(folder: Path, key: str) -> ContextCache:
    """Open a cache that must have been built for `key`.

    Raises:
        StaleCacheError: it was built by other weights, another solver or other data.
        DamagedCacheError: a file is missing, truncated, changed, or another shard's.
    """
    remedy = _again(folder)
    try:
        meta = read_sealed(folder / _META, _KIND, version=FORMAT_VERSION, remedy=remedy)
    except CheckpointError as error:
        raise DamagedCacheError(str(error)) from None
    if meta["key"] != key:
        raise StaleCacheError(
            f"cache of model and data {key} expected, {folder} was built for {meta['key']}; "
            "run new-llm cache again"
        )
    shards = []
    for row in meta["shards"]:
        path = folder / row["file"]
        shape = (row["rows"][1] - row["rows"][0], *meta["shape"][1:])
        wanted = 4 * int(np.prod(shape))
        size = path.stat().st_size if path.is_file() else 0
        if size != wanted or sha256(path) != row["sha256"]:
            raise DamagedCacheError(
                f"{path} must be {wanted} bytes with the checksum of {_META}, "
                f"got {size} bytes or other content; {remedy}"
            )
        shards.append(np.memmap(path, dtype="<f4", mode="r", shape=shape))
    return ContextCache(contexts=Rows(shards), key=key)
