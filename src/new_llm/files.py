"""Writing so that nothing is ever half-written: temporary name, sync, rename; and checksums."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, DiskFullError, shown

_BLOCK_BYTES = 1 << 22
# what must stay free beside a large file, so that logs and checkpoints still fit
_MARGIN_BYTES = 64 << 20
# no space, no quota, or no larger file allowed
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, in place of what was there, if all goes well.

    Raises:
        DiskFullError: there was no room; `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        yield part
        for path in sorted(part.rglob("*")):
            if path.is_file():
                _sync(path)
        _sync(part)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        part.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put back the folder that an interrupted swap had moved aside."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing.

    Raises:
        DiskFullError: there was no room; the file is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        _sync(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def require_file(path: Path) -> None:
    """Check before long work that its result can be written to `path` in the end.

    Raises:
        CheckpointError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.touch()
        part.unlink()
    except OSError as error:
        raise disk_error(error, path) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, kind: str) -> Any:
    """Read a JSON file that this package wrote.

    Raises:
        CheckpointError: it is missing or damaged; `kind` says what it should have been.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise CheckpointError(
            f"{kind} expected, but there is no {path}; check the folder's name"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{kind} expected, but {path} cannot be read ({error.strerror}); check its permissions"
        ) from None
    # no UTF-8, no JSON, digits without end, brackets without end
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{kind} expected, but {path} is damaged ({error})") from None


def read_object(path: Path, kind: str) -> dict[str, Any]:
    """Read a JSON file that this package wrote, of names and values.

    Raises:
        CheckpointError: it is missing or damaged; `kind` says what it should have been.
    """
    value = read_json(path, kind)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{kind} expected, but {path} holds no names and values: {shown(value)}"
        )
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"a finite number expected, got {name}")


@contextmanager
def understood(path: Path, kind: str) -> Iterator[None]:
    """Say which file is damaged, where values that it holds cannot be used.

    Only for what fails because of them: whole JSON whose keys and types are others.

    >>> with understood(Path("x.json"), "a record"):
    ...     {}["step"]
    Traceback (most recent call last):
    new_llm.errors.CheckpointError: a record expected, but x.json holds something else (KeyError...

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{kind} expected, but {path} holds something else ({reason})"
        ) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def require_space(folder: Path, num_bytes: int) -> None:
    """Check that a file of `num_bytes` will fit before it is begun.

    Raises:
        DiskFullError: it will not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _MARGIN_BYTES:
        raise DiskFullError(
            f"{(num_bytes + _MARGIN_BYTES) / 1e6:.0f} MB of free disk expected for {folder}, "
            f"{free / 1e6:.0f} MB are left; free some space and run the same command again"
        )


def disk_error(error: OSError, path: Path) -> Exception:
    """Return the error a user can act on, for an operating system error while writing `path`."""
    if error.errno in FULL:
        return DiskFullError(
            f"{path} must be written, but the disk is full; "
            "free some space and run the same command again"
        )
    if error.errno is None:
        return error
    return CheckpointError(
        f"{path} must be written, but that is not possible ({error.strerror}); "
        "choose another place for it"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
