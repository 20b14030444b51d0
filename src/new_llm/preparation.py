"""From dialogues to the stores of both parts in one pass that survives being killed.

    vocabulary -> read, divide -> encode, on all cores -> append to both parts -> seal, move

Everything is written in one hidden folder, with a file that says how far it is. When both parts
are whole they are moved to their places, `prepared.json` is written, and the hidden folder goes.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .config import DataConfig, fingerprint, from_dict, to_dict
from .dialogues import DialogueReader, Messages, Position
from .errors import CheckpointError, DataError
from .files import disk_error, read_sealed, sha256, sync, write_sealed
from .store import StoreWriter, TokenStore, encode_ahead, growing_file, sync_file, take_batch
from .tokenizer import ChatTokenizer

# characters of text that a vocabulary is trained on
_TOKENIZER_CHARACTERS = 50_000_000
# between two saves of how far a preparation is
_SAVE_SECONDS = 20.0
_HIDDEN = ".preparing"
# of what is saved there, and of `prepared.json`
FORMAT_VERSION = 2
_DIGEST_BYTES = hashlib.sha256().digest_size
# what decides tokens beside the config and the files
_DECIDING = ("tokenizers", "datasets", "chitchat-dataset")
# training dialogues of a batch, held-out ones, and the hashes of the latter if they are kept
_Parts = tuple[list[Messages], list[Messages], bytes]
_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode


def dialogue_hash(messages: Messages) -> bytes:
    """Return the SHA-256 of a dialogue, the same wherever it stands."""
    return hashlib.sha256(_canonical(messages).encode()).digest()


def is_held_out(messages: Messages, share: float) -> bool:
    """Return whether a dialogue is among the share that its hash holds out.

    >>> is_held_out([{"role": "user", "content": "hello"}], 1.0)
    True
    """
    return int.from_bytes(dialogue_hash(messages)[:8], "big") / 2.0**64 < share


def unchanged(files: list[Path], states: list[dict[str, Any]]) -> bool:
    """Return whether files hold what they held; those only copied or touched are read to see."""
    if len(files) != len(states):
        return False
    return all(
        (stat := _stat(path)) == {key: state[key] for key in stat}
        or (stat["size"] == state["size"] and sha256(path) == state["sha256"])
        for path, state in zip(files, states, strict=True)
    )


def discard(folder: Path) -> None:
    """Take away what a preparation has begun in a folder."""
    shutil.rmtree(folder / _HIDDEN, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class _Written:
    """How much of a part is on the disk."""

    num_tokens: int = 0
    num_dialogues: int = 0


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """How far a preparation is: where its readers stand, and what is written up to there."""

    identity: str
    """Of all that decides tokens; with another one a preparation begins again."""
    tokenizer: str
    """Fingerprint of the vocabulary."""
    valid: _Written = field(default_factory=_Written)
    train: _Written = field(default_factory=_Written)
    valid_reader: Position = field(default_factory=Position)
    """In the held-out dialogues that are given apart."""
    train_reader: Position = field(default_factory=Position)
    record: dict[str, Any] | None = None
    """What `prepared.json` will hold, once both parts are whole."""

    @property
    def num_digest_bytes(self) -> int:
        """Bytes of the hashes of held-out dialogues that are given apart."""
        return self.valid_reader.num_dialogues * _DIGEST_BYTES


class Preparation:
    """A preparation in its folder; killed at any time, the next one goes on from its last save.

    Raises:
        DataError: dialogues cannot be read, none is left, or fewer tokens than one sequence.
        StoppedError: there was no room, or dialogues could not be reached any more; the next one
            goes on.
    """

    def __init__(
        self,
        config: DataConfig,
        folder: Path,
        files: list[Path],
        progress: Callable[[str, int], None],
    ) -> None:
        self._config = config
        self._folder = folder
        self._hidden = folder / _HIDDEN
        self._files = files
        self._progress = progress
        self._states = [_stat(path) for path in files]
        self._identity = fingerprint(
            {
                "format": FORMAT_VERSION,
                "config": to_dict(config),
                "paths": [str(path.absolute()) for path in files],
                "files": self._states,
                "versions": {name: version(name) for name in _DECIDING},
            }
        )

    def run(self) -> None:
        """Leave `train`, `valid`, `tokenizer` and `prepared.json` in the folder, nothing else."""
        try:
            saved, tokenizer = self._last_save() or self._begin()
            if saved.record is None:
                saved = self._write(saved, tokenizer)
            self._move(saved)
        except DataError:
            discard(self._folder)
            raise
        except OSError as error:
            raise disk_error(error, self._folder) from error

    def _last_save(self) -> tuple[_Saved, ChatTokenizer] | None:
        """Return what an earlier preparation saved, if this one can go on from there."""
        try:
            kept = read_sealed(
                self._hidden / "position.json",
                "the position of a preparation",
                version=FORMAT_VERSION,
                remedy="begin again",
            )
            saved = from_dict(_Saved, kept["saved"])
            if saved.identity != self._identity:
                return None
            moved = saved.record is not None and not (self._hidden / "tokenizer").exists()
            folder = self._folder if moved else self._hidden
            tokenizer = ChatTokenizer.load(folder / "tokenizer")
        except (CheckpointError, KeyError, TypeError):
            return None
        if tokenizer.fingerprint != saved.tokenizer:
            return None
        whole = saved.record is not None or self._holds(saved)
        return (saved, tokenizer) if whole else None

    def _holds(self, saved: _Saved) -> bool:
        """Return whether the files are at least as long as it was saved."""
        digests = self._hidden / "digests.bin"
        return (
            digests.is_file()
            and digests.stat().st_size >= saved.num_digest_bytes
            and StoreWriter.holds(self._hidden / "train", **asdict(saved.train))
            and StoreWriter.holds(self._hidden / "valid", **asdict(saved.valid))
        )

    def _begin(self) -> tuple[_Saved, ChatTokenizer]:
        """Make or take the vocabulary, the first thing that is saved."""
        config = self._config
        # a name that is none is found before there is something to lose
        next(iter(self._train_reader(Position(), begun=False)))
        if config.valid is not None:
            next(iter(self._valid_reader(config.valid, Position(), begun=False)))
        tokenizer = ChatTokenizer.from_name(config.tokenizer, self._texts(), config.vocab_size)
        discard(self._folder)
        tokenizer.save(self._hidden / "tokenizer")
        (self._hidden / "digests.bin").touch()
        saved = _Saved(identity=self._identity, tokenizer=tokenizer.fingerprint)
        self._save(saved)
        self._progress("vocabulary", 0)
        return saved, tokenizer

    def _save(self, saved: _Saved) -> None:
        path = self._hidden / "position.json"
        write_sealed(path, {"saved": asdict(saved)}, version=FORMAT_VERSION)

    def _texts(self) -> Iterator[str]:
        """Yield contents of training dialogues, as many as a vocabulary is trained on."""
        left = _TOKENIZER_CHARACTERS
        config = self._config
        for messages in self._train_reader(Position(), begun=False):
            if config.valid is None and is_held_out(messages, config.valid_fraction):
                continue
            for message in messages:
                yield message["content"]
                left -= len(message["content"])
            if left <= 0:
                return

    def _train_reader(self, start: Position, *, begun: bool = True) -> DialogueReader:
        config = self._config
        return DialogueReader(
            config.source,
            split=config.split,
            on_bad_row=config.on_bad_row,
            max_dialogues=config.max_dialogues,
            start=start,
            begun=begun,
        )

    def _valid_reader(self, source: str, start: Position, *, begun: bool = True) -> DialogueReader:
        config = self._config
        return DialogueReader(
            source,
            split=config.valid_split,
            on_bad_row=config.on_bad_row,
            max_dialogues=None,
            start=start,
            begun=begun,
        )

    def _write(self, saved: _Saved, tokenizer: ChatTokenizer) -> _Saved:
        """Read what is left, write and seal both parts; return what is then saved."""
        config = self._config
        with _Output(self._hidden, saved, tokenizer, self._save) as output:
            if config.valid is None:
                divide = _by_hash(config.valid_fraction)
            else:
                reader = self._valid_reader(config.valid, saved.valid_reader)
                for count in output.take(reader, _held_out, "valid_reader"):
                    self._progress("held-out dialogues", count)
                divide = _by_digests(output.valid_digests())
            reader = self._train_reader(saved.train_reader)
            for count in output.take(reader, divide, "train_reader"):
                self._progress("dialogues", count)
            output.seal()
            saved = output.saved
        if saved.train.num_tokens < config.sequence_length:
            raise DataError(
                f"at least one sequence of {config.sequence_length} tokens expected to train on, "
                f"{config.source} gave {saved.train.num_tokens}; give more dialogues "
                "or lower --data.sequence-length"
            )
        parts = {
            name: TokenStore.open(self._hidden / name).fingerprint for name in ("train", "valid")
        }
        record = {
            "files": self._read_states(),
            "report": _report(saved),
            "parts": {**parts, "tokenizer": saved.tokenizer},
        }
        saved = replace(saved, record=record)
        self._save(saved)
        return saved

    def _read_states(self) -> list[dict[str, Any]]:
        """Return what tells later whether the files have changed.

        Raises:
            DataError: they changed while they were read.
        """
        states = []
        for path, state in zip(self._files, self._states, strict=True):
            if not path.is_file() or _stat(path) != state:
                raise DataError(
                    f"dialogues that stay as they are while they are read expected, but {path} "
                    "changed; run the same command again"
                )
            states.append({**state, "sha256": sha256(path)})
        return states

    def _move(self, saved: _Saved) -> None:
        """Put the parts where they belong; a move that was stopped between two is gone on with."""
        for name in ("tokenizer", "valid", "train"):
            part, target = self._hidden / name, self._folder / name
            if part.exists():
                if target.exists():
                    shutil.rmtree(target)
                part.rename(target)
        sync(self._folder)
        assert saved.record is not None
        write_sealed(self._folder / "prepared.json", saved.record, version=FORMAT_VERSION)
        discard(self._folder)


class _Output:
    """The two parts while they are written, and what is saved of them."""

    def __init__(
        self,
        hidden: Path,
        saved: _Saved,
        tokenizer: ChatTokenizer,
        save: Callable[[_Saved], None],
    ) -> None:
        self.saved = saved
        self._hidden = hidden
        self._save_to = save
        self._open = ExitStack()
        self._tokenizer = tokenizer
        self._train = self._open.enter_context(StoreWriter(hidden / "train", **asdict(saved.train)))
        self._valid = self._open.enter_context(StoreWriter(hidden / "valid", **asdict(saved.valid)))
        self._digests = self._open.enter_context(
            growing_file(hidden / "digests.bin", saved.num_digest_bytes)
        )
        self._saved_at = time.monotonic()

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def take(
        self, reader: DialogueReader, divide: Callable[[list[Messages]], _Parts], name: str
    ) -> Iterator[int]:
        """Write what a reader gives, and save now and then; yield counts of dialogues."""
        for encoded, (num_train, digests, position) in encode_ahead(
            _batches(reader, divide), self._tokenizer
        ):
            train, valid = encoded.split(num_train)
            self._train.append(train)
            self._valid.append(valid)
            self._digests.write(digests)
            self.saved = replace(self.saved, **{name: position})
            if time.monotonic() - self._saved_at >= _SAVE_SECONDS:
                self._save()
            yield len(encoded.lengths)
        self._save()

    def _save(self) -> None:
        self._train.sync()
        self._valid.sync()
        sync_file(self._digests)
        self._set_written()
        self._save_to(self.saved)
        self._saved_at = time.monotonic()

    def _set_written(self) -> None:
        parts = {"train": self._train, "valid": self._valid}
        self.saved = replace(
            self.saved,
            **{name: _Written(num_tokens=part.num_tokens, num_dialogues=part.num_dialogues)
               for name, part in parts.items()},
        )  # fmt: skip

    def valid_digests(self) -> np.ndarray:
        """Return the hashes of all held-out dialogues, sorted, `[D]` of 32 bytes each."""
        # equal lengths make numpy's bytes, which end at their last byte that is not zero, exact
        return np.sort(np.fromfile(self._hidden / "digests.bin", dtype=f"S{_DIGEST_BYTES}"))

    def seal(self) -> None:
        """Make stores of both parts.

        Raises:
            DataError: one of them is empty.
        """
        self._valid.seal()
        self._train.seal()
        for name in ("valid", "train"):
            sync(self._hidden / name)


def _batches(
    reader: DialogueReader, divide: Callable[[list[Messages]], _Parts]
) -> Iterator[tuple[list[Messages], tuple[int, bytes, Position]]]:
    """Yield batches of both parts, training dialogues first, until an empty one at the end."""
    dialogues = iter(reader)
    while True:
        batch = take_batch(dialogues)
        train, valid, digests = divide(batch)
        yield train + valid, (len(train), digests, reader.position())
        if not batch:
            return


def _held_out(batch: list[Messages]) -> _Parts:
    return [], batch, b"".join(map(dialogue_hash, batch))


def _by_hash(share: float) -> Callable[[list[Messages]], _Parts]:
    """Return what holds a share out, so that equal dialogues are never in both parts."""

    def divide(batch: list[Messages]) -> _Parts:
        train: list[Messages] = []
        valid: list[Messages] = []
        for messages in batch:
            (valid if is_held_out(messages, share) else train).append(messages)
        return train, valid, b""

    return divide


def _by_digests(known: np.ndarray) -> Callable[[list[Messages]], _Parts]:
    """Return what leaves dialogues out whose whole hash is among sorted ones."""

    def divide(batch: list[Messages]) -> _Parts:
        digests = np.array([dialogue_hash(messages) for messages in batch], dtype=known.dtype)
        place = np.searchsorted(known, digests)
        left_out = known[np.minimum(place, len(known) - 1)] == digests
        train = [messages for messages, out in zip(batch, left_out, strict=True) if not out]
        return train, [], b""

    return divide


def _report(saved: _Saved) -> dict[str, Any]:
    return {
        **asdict(saved.train_reader.report),
        "num_bad_valid_rows": saved.valid_reader.report.num_bad_rows,
        "num_train_dialogues": saved.train.num_dialogues,
        "num_valid_dialogues": saved.valid.num_dialogues,
    }


def _stat(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
