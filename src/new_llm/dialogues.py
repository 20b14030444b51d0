"""Dialogues, `{"messages": [{"role", "content"}]}`: the default package, files, or the hub."""

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DataError, LostSourceError, shown

Message = dict[str, str]
Messages = list[Message]

DEFAULT_SOURCE = "chitchat-dataset"
ROLES = ("system", "user", "assistant")
_SUFFIXES = (
    ".jsonl", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz"
)  # fmt: skip
# what is written like a file that we read, or that people expect us to read
_FILE_LIKE = (*_SUFFIXES, ".gz", ".zst", ".bz2", ".xz", ".txt", ".csv")
_PARQUET_BATCH = 256
# small, so that the error of a file that was cut says where it was
_BLOCK_BYTES = 1 << 16
# bytes of a line: more is no dialogue, and may come out of a small file that was packed
_LONGEST_ROW = 1 << 24
# characters below which a small talk says nothing to learn from
_SHORTEST_CHAT = 40
_LEAVE_OUT = "use --data.on-bad-row skip (of run, evaluate and doctor)"
_CONTACT = re.compile(
    r"[\w.+-]+@[\w-]+\.\w+|https?://|www\.|@\s*\w{2,}|\+?\d[\d\s().-]{7,}\d", re.IGNORECASE
)
_PROFANITY = re.compile(
    r"\b(?:fuck\w*|motherfuck\w*|shit\w*|bullshit|bitch\w*|cunt\w*|nigg\w*|fag(?:got)?s?|asshole\w*"
    r"|dick(?:s|head)?|pussy|whore\w*|slut\w*|rape\w*|porn\w*|penis|vagina|cock)\b",
    re.IGNORECASE,
)


@dataclass
class ReadReport:
    """What was left out while reading."""

    num_rows: int = 0
    """Rows seen."""
    num_bad_rows: int = 0
    """Rows that are not dialogues, left out by `on_bad_row` skip."""
    num_short: int = 0
    """Dialogues of fewer than two messages, left out."""
    first_bad: str | None = None
    """What was wrong with the first bad row."""

    @property
    def left_out(self) -> str | None:
        """What to say of bad rows that were left out, if there were any.

        >>> ReadReport(num_rows=9, num_bad_rows=2, first_bad="line 3: no messages").left_out
        '2 of 9 rows are no dialogues and were left out (the first: line 3: no messages)'
        """
        if not self.num_bad_rows:
            return None
        return (
            f"{self.num_bad_rows:,} of {self.num_rows:,} rows are no dialogues and were left out "
            f"(the first: {self.first_bad})"
        )


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where reading goes on; plain JSON values."""

    piece: int = 0
    """Pieces of the source that are behind: files, names of the hub, the default package."""
    row: int = 0
    """Rows, or lines, of the next piece that are behind."""
    hub: dict[str, Any] | None = None
    """What the hub's client needs to go on in that piece."""
    revision: str | None = None
    """Commit of that piece on the hub, so that what was pushed meanwhile is not mixed in."""
    num_dialogues: int = 0
    """Dialogues that were taken."""
    report: ReadReport = field(default_factory=ReadReport)
    """Of the rows that are behind."""


def read_dialogues(
    source: str,
    *,
    split: str,
    on_bad_row: str,
    max_dialogues: int | None,
    report: ReadReport,
) -> Iterator[Messages]:
    """Yield the dialogues of a source in its own order.

    Args:
        source: `chitchat-dataset`, a JSONL or Parquet file, a folder of them, or a hub name;
            several one after another, with commas between them.
        split: where the source is a hub name.
        on_bad_row: `error` stops at a row that is not a dialogue, `skip` counts it.
        max_dialogues: yield at most so many.
        report: is filled while the dialogues are taken.

    Raises:
        DataError: the source is missing, empty or unreadable, or a row is bad.
        LostSourceError: the hub or a disk gave some rows and then no more.
    """
    reader = DialogueReader(
        source,
        split=split,
        on_bad_row=on_bad_row,
        max_dialogues=max_dialogues,
        report=report,
    )
    yield from reader


class DialogueReader:
    """The dialogues of a source, as `read_dialogues` yields them, from any position on.

    >>> options = {"split": "", "on_bad_row": "error", "max_dialogues": 3}
    >>> reader = DialogueReader("chitchat-dataset", **options)
    >>> first = next(iter(reader))
    >>> rest = list(DialogueReader("chitchat-dataset", **options, start=reader.position()))
    >>> [first, *rest] == list(DialogueReader("chitchat-dataset", **options))
    True
    """

    def __init__(
        self,
        source: str,
        *,
        split: str,
        on_bad_row: str,
        max_dialogues: int | None,
        start: Position | None = None,
        report: ReadReport | None = None,
        begun: bool = False,
    ) -> None:
        if on_bad_row not in ("error", "skip"):
            raise DataError(f"on_bad_row must be error or skip, got {on_bad_row!r}")
        start = start or Position()
        self._source = source
        self._split = split
        self._skips = on_bad_row == "skip"
        self._max_dialogues = max_dialogues
        self._piece, self._row, self._hub_state = start.piece, start.row, start.hub
        self._revision = start.revision
        self._num_dialogues = start.num_dialogues
        self._report = replace(start.report) if report is None else report
        self._hub: Any = None
        # of what could not be read once more something is kept
        self._begun = begun or start.piece > 0 or start.row > 0

    def position(self) -> Position:
        """Return where another reader goes on behind the last dialogue that was taken."""
        return Position(
            piece=self._piece,
            row=self._row,
            hub=self._hub_state if self._hub is None else self._hub.state_dict(),
            revision=self._revision,
            num_dialogues=self._num_dialogues,
            report=replace(self._report),
        )

    def __iter__(self) -> Iterator[Messages]:
        report = self._report
        if self._num_dialogues == self._max_dialogues:
            return
        for place, row in self._rows():
            report.num_rows += 1
            try:
                messages = check_dialogue(row, place)
            except DataError as error:
                if not self._skips:
                    raise
                report.num_bad_rows += 1
                report.first_bad = report.first_bad or str(error)
                continue
            if sum(message["role"] != "system" for message in messages) < 2:
                report.num_short += 1
                continue
            self._num_dialogues += 1
            yield messages
            if self._num_dialogues == self._max_dialogues:
                return
        if self._num_dialogues == 0:
            raise DataError(
                f"at least one dialogue of two messages expected in {self._source}, none was left "
                f"of {report.num_rows} rows ({report.num_bad_rows} bad, {report.num_short} too "
                "short); "
                + (
                    f"first bad: {report.first_bad}"
                    if report.first_bad
                    else "give longer dialogues"
                )
            )

    def _rows(self) -> Iterator[tuple[str, Any]]:
        """Yield every row with the words that say where it stands; a bad line is its own error."""
        pieces = _pieces(self._source)
        while self._piece < len(pieces):
            for number, place, row in self._piece_rows(pieces[self._piece]):
                self._row, self._begun = number, True
                yield place, row
            self._piece, self._row = self._piece + 1, 0
            self._hub_state, self._hub, self._revision = None, None, None

    def _piece_rows(self, piece: Path | str) -> Iterator[tuple[int, str, Any]]:
        """Yield the rows of a piece that are not behind, each with the number up to it."""
        if isinstance(piece, Path):
            yield from self._file_rows(piece)
        elif piece == DEFAULT_SOURCE:
            yield from islice(_chitchat_rows(), self._row, None)
        else:
            yield from self._hub_rows(piece)

    def _file_rows(self, path: Path) -> Iterator[tuple[int, str, Any]]:
        parquet = path.suffix == ".parquet"
        try:
            if path.stat().st_size == 0:
                raise DataError(f"a file with dialogues expected, {path} is empty; check the path")
            yield from (_parquet_rows if parquet else _json_rows)(path, self._row)
        # each library has its own words for a file that was cut or changed
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            unit = "row" if parquet else "line"
            # the system's own word: it is not what the file holds
            number = getattr(error, "errno", None)
            if self._begun and number is not None:
                raise LostSourceError(
                    f"more rows of {path} expected behind {unit} {self._row}, but it could not be "
                    f"read ({os.strerror(number)}); see that it can be, and run the same "
                    "command again: it goes on"
                ) from None
            raise DataError(
                f"{path} must be readable to its end, but behind {unit} {self._row}: {error}; "
                "copy the file again"
            ) from None

    def _hub_rows(self, name: str) -> Iterator[tuple[int, str, Any]]:
        import datasets

        split = self._split
        try:
            if not self._row:
                self._revision = _revision(name)
            rows: Any = datasets.load_dataset(
                name, split=split, revision=self._revision, streaming=True
            )
            if self._hub_state is not None:
                rows.load_state_dict(self._hub_state)
            elif self._row:
                rows = islice(rows, self._row, None)
            if isinstance(rows, datasets.IterableDataset):
                self._hub = rows
            for number, row in enumerate(rows, start=self._row + 1):
                yield number, f"{name} {split}, row {number}", row
        # the hub's client has dozens of error types for one fact: the name cannot be read from here
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self._begun:
                raise LostSourceError(
                    f"more rows of {name} {split} expected behind row {self._row}, the hub gave "
                    f"none ({reason}); check the network and run the same command again: it goes on"
                ) from None
            raise DataError(
                f"a dialogue file or a readable hub dataset expected, got {name!r} split {split!r} "
                f"({reason}); check the name, the split and the network, or give a local file"
            ) from None


def _revision(name: str) -> str | None:
    """Return the commit that a dataset of the hub stands at; None where nobody says it."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name).sha
    # offline, or a name that is none: what loads the dataset has the better words
    except Exception:
        return None


def check_dialogue(row: Any, place: str) -> Messages:
    """Return the messages of a row.

    >>> check_dialogue({"messages": [{"role": "bot", "content": "hi"}]}, "line 3")
    Traceback (most recent call last):
    new_llm.errors.DataError: line 3: a role is one of system, user, assistant; got 'bot'; ...

    Raises:
        DataError: it is not a dialogue; `place` says where it stands.
    """
    remedy = f"mend the row or {_LEAVE_OUT}"
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        given = ", ".join(map(str, [*row][:9])) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{place}: a row with a list of 'messages' expected, got {given}; {remedy}")
    if not row["messages"]:
        raise DataError(f"{place}: at least one message expected, got none; {remedy}")
    messages = []
    for message in row["messages"]:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError(
                f"{place}: a role is one of {', '.join(ROLES)}; got {shown(role)}; {remedy}"
            )
        if not isinstance(content, str) or not content.strip():
            given = "an empty one" if isinstance(content, str) else shown(content)
            raise DataError(f"{place}: a content with some text expected, got {given}; {remedy}")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"{place}: text that can be written as UTF-8 expected, got a lone surrogate; "
                f"{remedy}"
            ) from None
        messages.append({"role": role, "content": content})
    return messages


def source_files(source: str) -> list[Path]:
    """Return the local files of a source; none of the default package or of a hub name.

    Raises:
        DataError: it is written like a path, but there is nothing; or the folder has no data.
    """
    return [path for part in _parts(source) for path in _files(part)]


def _parts(source: str) -> list[str]:
    """Return the sources that commas join; a file may have commas in its name."""
    if "," not in source or _exists(source):
        return [source]
    parts = [part.strip() for part in source.split(",")]
    if not all(parts):
        raise DataError(f"a source on either side of each comma expected, got {source!r}")
    return parts


def _exists(source: str) -> bool:
    try:
        return Path(source).expanduser().exists()
    # no home of that name, or a name that no file can have
    except (OSError, RuntimeError):
        return False


def _files(source: str) -> list[Path]:
    if source == DEFAULT_SOURCE:
        return []
    if not source:
        raise DataError("a path or a name of dialogues expected, got nothing; give one")
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:
        raise DataError(f"a path or a name expected, got {source!r} ({error})") from None
    if is_folder:
        files = sorted(p for p in path.iterdir() if p.name.endswith(_SUFFIXES))
        if not files:
            raise DataError(f"{', '.join(_SUFFIXES)} files expected in {source}, got none")
        return files
    if is_file:
        if not path.name.endswith(_SUFFIXES):
            raise DataError(
                f"a file ending in {', '.join(_SUFFIXES)} expected, got {source}; rename or convert"
            )
        return [path]
    if source.startswith((".", "/", "~")) or source.endswith(_FILE_LIKE):
        raise DataError(f"a file of dialogues expected, there is no {source}; check the path")
    return []


def _pieces(source: str) -> list[Path | str]:
    """Return the files of a source, and the names that are none."""
    return [piece for part in _parts(source) for piece in _files(part) or [part]]


def _open_lines(path: Path) -> BinaryIO:
    """Open a file of lines, whatever its name says that it is compressed by."""
    if path.suffix == ".zst":
        import pyarrow

        packed: Any = pyarrow.input_stream(str(path), compression="zstd")
        return io.BufferedReader(packed, _BLOCK_BYTES)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if path.suffix in openers:
        # lines of these libraries' own take a call of Python each
        return io.BufferedReader(openers[path.suffix](path, "rb"), _BLOCK_BYTES)
    return path.open("rb", _BLOCK_BYTES)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines; of one that is too long only its beginning, one byte longer than may be."""
    while line := file.readline(_LONGEST_ROW + 1):
        yield line
        while len(line) > _LONGEST_ROW and not line.endswith(b"\n"):
            line = file.readline(_LONGEST_ROW + 1)
            if len(line) <= _LONGEST_ROW:
                break


def _json_rows(path: Path, num_behind: int) -> Iterator[tuple[int, str, Any]]:
    with _open_lines(path) as file:
        for number, line in enumerate(islice(_lines(file), num_behind, None), num_behind + 1):
            if line.isspace():
                continue
            place = f"{path}, line {number}"
            if len(line) > _LONGEST_ROW:
                wrong = DataError(
                    f"{place}: at most {_LONGEST_ROW:,} bytes a line expected, got more; "
                    f"divide the dialogue or {_LEAVE_OUT}"
                )
                yield number, place, wrong
                continue
            try:
                yield number, place, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                wrong = DataError(
                    f"{place}: UTF-8 text expected, got byte 0x{line[error.start]:02x} at "
                    f"column {error.start + 1}; convert the file to UTF-8"
                )
                yield number, place, wrong
            # digits without end are a plain ValueError
            except (ValueError, RecursionError) as error:
                wrong = DataError(
                    f"{place}: one JSON object a line expected, got {error}; "
                    f"mend the row or {_LEAVE_OUT}"
                )
                yield number, place, wrong


def _parquet_rows(path: Path, num_behind: int) -> Iterator[tuple[int, str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "messages" not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path}: a column 'messages' expected, got {names}")
            number = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size <= num_behind:
                    number += size
                    continue
                for batch in file.iter_batches(
                    _PARQUET_BATCH, row_groups=[group], columns=["messages"]
                ):
                    behind = min(max(num_behind - number, 0), len(batch))
                    number += behind
                    for row in batch.slice(behind).to_pylist():
                        number += 1
                        yield number, f"{path}, row {number}", row
    # text that is no UTF-8 shows when it is taken
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path} must be a whole Parquet file, but {error}") from None


@lru_cache(maxsize=1)
def _chitchat_rows() -> list[tuple[int, str, Any]]:
    """Return the default package's two-person chats; the first speaker is the user.

    One-sided and very short ones, and those with contact data or listed profanity, are left out.
    """
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise DataError("the package chitchat-dataset expected, it is not installed; run make demo")
    rows = []
    text = Path(spec.origin).with_name("dataset.json").read_text(encoding="utf-8")
    for key, conversation in sorted(json.loads(text).items()):
        messages: Messages = []
        first_sender = None
        for turn in conversation["messages"]:
            for part in turn:
                content = part["text"].strip()
                if not content:
                    continue
                first_sender = first_sender or part["sender"]
                role = "user" if part["sender"] == first_sender else "assistant"
                if messages and messages[-1]["role"] == role:
                    messages[-1]["content"] += "\n" + content
                else:
                    messages.append({"role": role, "content": content})
        whole = "\n".join(message["content"] for message in messages)
        if len(messages) < 2 or len(whole) < _SHORTEST_CHAT:
            continue
        if _CONTACT.search(whole) or _PROFANITY.search(whole):
            continue
        try:
            whole.encode("utf-8")
        except UnicodeEncodeError:
            continue
        place = f"{DEFAULT_SOURCE}, conversation {key}"
        rows.append((len(rows) + 1, place, {"messages": messages}))
    return rows
