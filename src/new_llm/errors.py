"""Typed errors. Each says what was wanted, what was given and what to do, in one or two lines."""

import reprlib
from typing import Self

# characters of a message: what was given may be a file of megabytes
_LONGEST = 1200
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 80


class NewLLMError(Exception):
    r"""Base of every error that a user can meet; the command line prints it without a traceback.

    >>> str(NewLLMError("text expected, got a\n\x1b[31m"))
    'text expected, got a\\n\\x1b[31m'
    """

    exit_code = 2
    said = False
    """Whether another process of the same run says it."""

    def __init__(self, message: str) -> None:
        super().__init__(_line(message))

    def saying(self, message: str) -> Self:
        """Return an error of this kind that says more, or nothing where another process does."""
        error = type(self)(message)
        error.said = self.said
        return error


def shown(value: object) -> str:
    """Return a value as an error shows it: of a long or deep one, the beginning and the end.

    >>> shown("no"), len(shown("x" * 1000)), len(shown([[[["x"] * 9] * 9] * 9] * 9)) < 400
    ("'no'", 80, True)
    """
    return _SHORT.repr(value)


def _line(text: str) -> str:
    """Return a text as one line that any terminal can show."""
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in _cut(text)))


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class ConfigError(NewLLMError):
    """A setting is unknown or out of its range."""


class DataError(NewLLMError):
    """Dialogues or tokenizer cannot be read or used."""


class CheckpointError(NewLLMError):
    """A checkpoint or run folder is missing, damaged, or belongs to something else."""


class StaleCacheError(NewLLMError):
    """A cache was built by other weights, another solver or other data."""


class DamagedCacheError(NewLLMError):
    """A cache file does not match its own description."""


class StoppedError(NewLLMError):
    """A run had to stop itself; what it wrote so far is whole and can be resumed."""

    exit_code = 3


class GateError(StoppedError):
    """Phase 1 did not pass the gate, so Phase 2 may not start."""


class NonFiniteError(StoppedError):
    """A loss, gradient or context became NaN or infinite."""


class LostSourceError(StoppedError):
    """The hub or a disk gave some rows and then no more."""


class DiskFullError(StoppedError):
    """There is no room left for what must be written."""


class LostProcessError(StoppedError):
    """Another process of the same run is gone."""
