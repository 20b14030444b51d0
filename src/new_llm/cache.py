"""The cache of fixed points: written once, memory-mapped, checksummed, refused when stale.

Token scope has one row a vocabulary id, `[V, K, C]`, whatever the corpus; sequence scope one row a
position, `[N, K, C]`, for training a read-out on frozen contexts. Float32, little-endian.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import weights_fingerprint
from .config import fingerprint, to_dict
from .console import Advance
from .data import SegmentStream, TokenStore
from .errors import CheckpointError, DamagedCacheError, StaleCacheError
from .files import atomic_folder, read_json, require_space, sha256, understood, write_json
from .model import NewLLM

CONTEXTS = "contexts.f32"
# ids solved at once: bounds memory at any vocabulary
TOKEN_BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class ContextCache:
    """An open cache."""

    contexts: np.ndarray
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


def write_token_cache(folder: Path, model: NewLLM, advance: Advance) -> ContextCache:
    """Solve every vocabulary id once and keep the delivered contexts, a row an id."""
    model.eval()

    def parts() -> Iterator[np.ndarray]:
        device = model.embedding.weight.device
        for start in range(0, model.vocab_size, TOKEN_BATCH):
            end = min(start + TOKEN_BATCH, model.vocab_size)
            ids = torch.arange(start, end, device=device)
            yield model.search(ids).contexts.cpu().numpy()
            advance(end - start)

    return _write(folder, token_key(model), _shape(model, model.vocab_size), parts())


def write_sequence_cache(
    folder: Path, model: NewLLM, store: TokenStore, advance: Advance
) -> ContextCache:
    """Read every dialogue from its start and keep the context after each position, in store order.

    Raises:
        DiskFullError: the rows would not fit; nothing was written.
    """
    model.eval()

    def parts() -> Iterator[np.ndarray]:
        stream = SegmentStream(store, batch_size=1, segment_length=4096, seed=None)
        context = model.initial_context(1)
        device = context.device
        for index in range(stream.num_segments):
            segment = stream.segment(0, index)
            ids = torch.from_numpy(segment.tokens).to(device)
            starts = torch.from_numpy(segment.starts).to(device)
            with torch.no_grad():
                _, contexts = model.stream_contexts(ids, context, starts=starts)
            rows = torch.stack(contexts, dim=2)[0]
            context = rows[None, -1]
            yield rows[torch.from_numpy(segment.real[0])].cpu().numpy()
            advance(int(segment.real.sum()))

    shape = _shape(model, store.num_tokens)
    return _write(folder, sequence_key(model, store), shape, parts())


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
    folder: Path, key: str, shape: tuple[int, int, int], parts: Iterator[np.ndarray]
) -> ContextCache:
    require_space(folder.parent, 4 * int(np.prod(shape)))
    with atomic_folder(folder) as part:
        num_rows = 0
        with (part / CONTEXTS).open("wb") as file:
            for rows in parts:
                file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
                num_rows += len(rows)
        if num_rows != shape[0]:
            raise AssertionError(f"cache of {shape[0]} rows was given {num_rows}")
        meta = {"key": key, "shape": list(shape), "sha256": sha256(part / CONTEXTS)}
        write_json(part / "cache.json", meta)
    return open_cache(folder, key)


def open_cache(folder: Path, key: str) -> ContextCache:
    """Open a cache that must have been built for `key`.

    Raises:
        StaleCacheError: it was built by other weights, another solver or other data.
        DamagedCacheError: a file is missing, truncated or changed.
    """
    try:
        meta: Any = read_json(folder / "cache.json", "a cache")
        with understood(folder / "cache.json", "a cache"):
            num_rows, num_blocks, width = map(operator.index, meta["shape"])
            found, checksum = meta["key"], meta["sha256"]
    except CheckpointError as error:
        raise DamagedCacheError(f"{error}; delete {folder} and run new-llm cache again") from None
    shape = (num_rows, num_blocks, width)
    if found != key:
        raise StaleCacheError(
            f"cache of model and data {key} expected, {folder} was built for {found}; "
            "run new-llm cache again"
        )
    path = folder / CONTEXTS
    size = path.stat().st_size if path.is_file() else 0
    if min(shape) < 1 or size != 4 * math.prod(shape) or sha256(path) != checksum:
        raise DamagedCacheError(
            f"{path} must be {4 * math.prod(shape)} bytes with the checksum of cache.json, "
            f"got {size} bytes or other content; delete {folder} and run new-llm cache again"
        )
    contexts = np.memmap(path, dtype="<f4", mode="r", shape=shape)
    return ContextCache(contexts=contexts, key=key)
