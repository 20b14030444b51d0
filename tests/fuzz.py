"""What the fuzz tests share: damaged bytes, damaged JSON, and the law that every input obeys.

Each input either works or raises one of our errors, in one or two lines, in time and in memory, and
no file is written where none belongs. `NEW_LLM_FUZZ=20` scales the number of inputs, which are then
drawn at random; without it they are few and always the same.
"""

import json
import os
import resource
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from new_llm.errors import NewLLMError

SCALE = float(os.environ.get("NEW_LLM_FUZZ", "1"))
# seconds and bytes that a small input may take; a page with figures takes two seconds
_SECONDS, _BYTES = 60, 1 << 30
COUNTS: Counter[str] = Counter()
"""Inputs that were tried, by kind."""
REFUSED: Counter[str] = Counter()
"""Those that one of our errors refused."""


def examples(count: int) -> settings:
    """Return the settings of a test of so many inputs, in the ordinary suite."""
    return settings(
        max_examples=max(1, round(count * SCALE)),
        deadline=None,
        derandomize=SCALE == 1,
        database=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
            HealthCheck.large_base_example,
            HealthCheck.function_scoped_fixture,
        ],
    )


class Hang(BaseException):
    """An input took longer than any may."""


@contextmanager
def law(kind: str, *watched: Path) -> Iterator[None]:
    """Try one input: whatever is done with it works, or is refused by one of our errors.

    Args:
        kind: of the input, for the count.
        watched: folders in which nothing may be written.
    """
    COUNTS[kind] += 1
    before, peak = listing(*watched), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def ring(*_: Any) -> None:
        raise Hang(f"{kind}: more than {_SECONDS} seconds")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_SECONDS)
    try:
        with warnings.catch_warnings():
            # of numbers that no file of ours holds
            warnings.simplefilter("ignore")
            yield
    except NewLLMError as error:
        REFUSED[kind] += 1
        check_words(str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    assert grown < _BYTES, f"{kind}: {grown / 1e6:.0f} MB"
    assert listing(*watched) == before


def check_words(text: str) -> None:
    """Check that an error is one or two lines that a terminal can show."""
    assert text.strip() and len(text.splitlines()) <= 2, text
    assert len(text) < 2000, f"{len(text)} characters: {text[:300]}"
    assert "\x1b" not in text and "\0" not in text, text


def listing(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Return all files below folders, with their size and time."""
    found = [path for folder in folders for path in folder.rglob("*")]
    states = {path: path.stat() for path in found}
    # a folder's own time moves with a file that is gone again
    return {
        path: (state.st_size, state.st_mtime_ns) if path.is_file() else (0, 0)
        for path, state in states.items()
    }


@contextmanager
def in_place_of(path: Path, content: bytes) -> Iterator[None]:
    """Let a file hold something else for a while."""
    kept = path.read_bytes()
    try:
        path.write_bytes(content)
        yield
    finally:
        path.write_bytes(kept)


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw bytes as disks, copies and enemies leave them."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "insert", "remove", "repeat", "zero", "other"])):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place:]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=16))
            case "remove":
                del data[place : place + draw(st.integers(1, 64))]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 64))]
            case "zero":
                size = len(data[place : place + draw(st.integers(1, 64))])
                data[place : place + size] = bytes(size)
            case _:
                data = bytearray(draw(st.binary(max_size=64)))
    return bytes(data)


# texts of values that are not what stands there: as JSON, or nearly
_DEEP = 100_000
_ODD = [
    "null", "true", "false", "0", "-1", "1", "2.5", "1e308", "-1e308", "1e999", "NaN", "Infinity",
    "-Infinity", "9" * 30, "9" * 5000, "-" + "9" * 5000, '""', '"\\u0000"', '"\\ud800"', '"x"',
    '"../../outside"', '"/tmp/outside"', '"' + "x" * 100_000 + '"', "[]", "{}", "[[]]", "[null]",
    '{"a": 1}', '[1, "2", 3]', "[0, 0, 0]", "[-1, 2, 32]", "[NaN]", "[[1e308, NaN, -1]]",
    "[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "[" * _DEEP, "", "\\", "\x00",
    '"\x1b[31m"', '"a\\nb\\nc\\nd"', '"\U0001f600"',
]  # fmt: skip
_MARK = "here stands what is odd"


@st.composite
def damaged_json(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a JSON text in which one or two things are not what they were."""
    value = json.loads(whole)
    odd = []
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(value))
        if not places:
            break
        # things near the top are few, and matter most
        depth = draw(st.integers(0, max(len(place) for place in places) - 1))
        near = [place for place in places if len(place) <= depth + 1]
        *path, last = draw(st.sampled_from(near))
        holder = value
        for key in path:
            holder = holder[key]
        match draw(st.sampled_from(["odd", "odd", "odd", "drop", "rename", "swap"])):
            case "drop":
                del holder[last]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=8))] = holder.pop(last)
            case "swap":
                other = draw(st.sampled_from(places))
                holder[last] = json.loads(json.dumps(_at(value, other, default=None)))
            case _:
                holder[last] = f"{_MARK} {len(odd)}"
                odd.append(draw(st.sampled_from(_ODD)))
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(_ODD)).encode("utf-8", "surrogatepass")
    text = json.dumps(value)
    for number, piece in enumerate(odd):
        text = text.replace(f'"{_MARK} {number}"', piece)
    encoded = text.encode("utf-8", "surrogatepass")
    return draw(st.sampled_from([encoded] * 9 + [b"\xef\xbb\xbf" + encoded]))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where something stands in a value; of long lists the first and the last."""
    if isinstance(value, dict):
        inner = list(value)
    elif isinstance(value, list):
        inner = sorted({0, len(value) - 1} & {*range(len(value))})
    else:
        return
    for key in inner:
        yield (*path, key)
        yield from _places(value[key], (*path, key))


def _at(value: Any, path: tuple[Any, ...], default: Any) -> Any:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return default
    return value


def damaged(whole: bytes, *, is_json: bool) -> st.SearchStrategy[bytes]:
    """Return what draws a file that is not what it was; three in four JSON ones stay JSON."""
    if not is_json:
        return damaged_bytes(whole)
    structured = damaged_json(whole)
    return st.one_of(structured, structured, structured, damaged_bytes(whole))


def summary() -> str:
    """Return how many inputs were tried, and how many of them were refused."""
    rows = [
        f"{count:7,} {kind}, {REFUSED[kind]:,} refused" for kind, count in sorted(COUNTS.items())
    ]
    return "\n".join([*rows, f"{COUNTS.total():7,} inputs in all, {REFUSED.total():,} refused"])
