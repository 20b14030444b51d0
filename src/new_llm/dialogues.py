"""Dialogues, `{"messages": [{"role", "content"}]}`: the default package, files, or the hub."""

import gzip
import importlib.util
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import DataError, shown

Message = dict[str, str]
Messages = list[Message]

DEFAULT_SOURCE = "chitchat-dataset"
ROLES = ("system", "user", "assistant")
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")
_PARQUET_BATCH = 1024
# bytes of a line: more is no dialogue, and may come out of a small file that was packed
_LONGEST_ROW = 1 << 24
# characters below which a small talk says nothing to learn from
_SHORTEST_CHAT = 40
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
    """
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"on_bad_row must be error or skip, got {on_bad_row!r}")
    num_yielded = 0
    for place, row in _rows(source, split):
        report.num_rows += 1
        try:
            messages = check_dialogue(row, place)
        except DataError as error:
            if on_bad_row == "error":
                raise
            report.num_bad_rows += 1
            report.first_bad = report.first_bad or str(error)
            continue
        if sum(message["role"] != "system" for message in messages) < 2:
            report.num_short += 1
            continue
        yield messages
        num_yielded += 1
        if max_dialogues is not None and num_yielded >= max_dialogues:
            return
    if num_yielded == 0:
        raise DataError(
            f"at least one dialogue of two messages expected in {source}, none was left of "
            f"{report.num_rows} rows ({report.num_bad_rows} bad, {report.num_short} too short); "
            + (f"first bad: {report.first_bad}" if report.first_bad else "give longer dialogues")
        )


def check_dialogue(row: Any, place: str) -> Messages:
    """Return the messages of a row.

    >>> check_dialogue({"messages": [{"role": "bot", "content": "hi"}]}, "line 3")
    Traceback (most recent call last):
    new_llm.errors.DataError: line 3: a role is one of system, user, assistant; got 'bot'; ...

    Raises:
        DataError: it is not a dialogue; `place` says where it stands.
    """
    remedy = "mend the row or use --data.on-bad-row skip"
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
    if source.startswith((".", "/", "~")) or source.endswith((*_SUFFIXES, ".gz", ".txt", ".csv")):
        raise DataError(f"a file of dialogues expected, there is no {source}; check the path")
    return []


def _rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield every row with the words that say where it stands; a bad line is its own error."""
    for part in _parts(source):
        if part == DEFAULT_SOURCE:
            yield from _chitchat_rows()
        elif files := _files(part):
            yield from _file_rows(files)
        else:
            yield from _hub_rows(part, split)


def _file_rows(files: list[Path]) -> Iterator[tuple[str, Any]]:
    for path in files:
        if path.stat().st_size == 0:
            raise DataError(f"a file with dialogues expected, {path} is empty; check the path")
        try:
            yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} must be readable, but {error}; copy the file again") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_ROW):
            number += 1
            place = f"{path}, line {number}"
            if len(line) == _LONGEST_ROW and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_ROW)
                yield (
                    place,
                    DataError(
                        f"{place}: fewer than {_LONGEST_ROW:,} bytes a line expected, got more; "
                        "divide the dialogue or use --data.on-bad-row skip"
                    ),
                )
                continue
            if not line.strip():
                continue
            try:
                yield place, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield (
                    place,
                    DataError(
                        f"{place}: UTF-8 text expected, got byte 0x{line[error.start]:02x} at "
                        f"column {error.start + 1}; convert the file to UTF-8"
                    ),
                )
            # digits without end are a plain ValueError
            except (ValueError, RecursionError) as error:
                yield (
                    place,
                    DataError(
                        f"{place}: one JSON object a line expected, got {error}; "
                        "mend the row or use --data.on-bad-row skip"
                    ),
                )


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "messages" not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path}: a column 'messages' expected, got {names}")
        number = 0
        for batch in file.iter_batches(_PARQUET_BATCH, columns=["messages"]):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    # text that is no UTF-8 shows when it is taken
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path} must be a whole Parquet file, but {error}") from None


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{name} {split}, row {number}", row
    except DataError:
        raise
    # the hub's client has dozens of error types for one fact: the name cannot be read from here
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"a dialogue file or a readable hub dataset expected, got {name!r} split {split!r} "
            f"({reason}); check the name, the split and the network, or give a local file"
        ) from None


@lru_cache(maxsize=1)
def _chitchat_rows() -> list[tuple[str, Any]]:
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
        rows.append((f"{DEFAULT_SOURCE}, conversation {key}", {"messages": messages}))
    return rows
