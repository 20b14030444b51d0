"""Writing so that nothing is ever half-written: temporary name, sync, rename; and checksums."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
                sync(path)
        sync(part)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        part.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path that becomes `path`, in place of what was there, if all goes well.

    Raises:
        DiskFullError: there was no room; the file is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        sync_rename(part, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        part.unlink(missing_ok=True)


def sync_rename(source: Path, target: Path) -> None:
    """Rename, so that it lasts."""
    source.replace(target)
    sync(target.parent)


def remove_folder(target: Path) -> None:
    """Take a folder away, so that a killed process leaves all of it or what `tidy` takes away."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        target.rename(part)
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(error, target) from error
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
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


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


def write_sealed(path: Path, values: dict[str, Any], *, version: int) -> None:
    """Write a record with the version of its format and a checksum of itself."""
    write_json(path, sealed(values, version=version))


def sealed(values: dict[str, Any], *, version: int) -> dict[str, Any]:
    """Return a record with the version of its format and a checksum of all of it.

    >>> sealed({"step": 3}, version=1)["checksum"] == sealed({"step": 4}, version=1)["checksum"]
    False
    """
    record = {"format_version": version, **values}
    return {**record, "checksum": _checksum(record)}


def _checksum(record: dict[str, Any]) -> str:
    # as it is read again: keys are text, and tuples lists
    plain = json.loads(json.dumps({k: v for k, v in record.items() if k != "checksum"}))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_sealed(path: Path, kind: str, *, version: int, remedy: str) -> dict[str, Any]:
    """Read a record that `write_sealed` wrote.

    Raises:
        CheckpointError: it is missing, damaged, changed or of another format; `kind` says what it
            should have been, `remedy` what to do.
    """
    try:
        record = read_json(path, kind)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).partition(';')[0]}; {remedy}") from None
    require_sealed(path, record, kind, version=version, remedy=remedy)
    return record


def require_sealed(path: Path, record: Any, kind: str, *, version: int, remedy: str) -> None:
    """Check the format and the checksum of a record that was read from `path`.

    Raises:
        CheckpointError: they are not what they were.
    """
    found = record.get("format_version") if isinstance(record, dict) else None
    if found != version or isinstance(found, bool):
        raise CheckpointError(
            f"{kind} of format {version} expected, {path} has {found}; {remedy}, or use the "
            "version that wrote it"
        )
    try:
        same = record.get("checksum") == _checksum(record)
    except (RecursionError, ValueError):
        same = False
    if not same:
        raise CheckpointError(
            f"{kind} expected as it was written, but {path} does not match its own checksum; "
            f"{remedy}"
        )


def checksums(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder, but of some, by its name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: sha256(path) for name, path in names.items() if name not in leave_out}


def require_files(folder: Path, wanted: Any, *, remedy: str) -> None:
    """Check that files are there and hold what they held.

    Raises:
        CheckpointError: one is missing, truncated or changed; it is named.
    """
    for name, checksum in wanted.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} expected, but it is missing; {remedy}")
        if sha256(path) != checksum:
            raise CheckpointError(
                f"{path} must match its checksum, but it is truncated or changed; {remedy}"
            )


def write_manifest(path: Path, values: dict[str, Any], *, version: int) -> None:
    """Write a sealed record that holds the checksums of all other files of its folder."""
    files = checksums(path.parent, leave_out=(path.name,))
    write_sealed(path, {**values, "files": files}, version=version)


def read_manifest(path: Path, kind: str, *, version: int, remedy: str) -> dict[str, Any]:
    """Read what `write_manifest` wrote, and check every file that it names.

    Raises:
        CheckpointError: it, or one of the files, is missing, damaged or changed.
    """
    record = read_sealed(path, kind, version=version, remedy=remedy)
    require_files(path.parent, record["files"], remedy=remedy)
    return record


def tidy(folder: Path) -> None:
    """Take away what a killed process left half-written in a folder, and put back what it moved.

    Only for a folder in which no other process writes.
    """
    for path in sorted(folder.rglob(".*.old"), reverse=True):
        target = path.with_name(path.name[1:].removesuffix(".old"))
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
    for path in sorted(folder.rglob(".*.part"), reverse=True):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock is on the folder itself and leaves no file.

    Raises:
        CheckpointError: another process works in it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"one process at a time may work in {folder}, another one does; "
                "wait for it, or choose a new --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held(folder: Path | None) -> Iterator[None]:
    """Make a folder and hold it for this process, see `alone`; None is no folder.

    What was made for nothing is taken away: a refusal leaves no empty folder.
    """
    if folder is None:
        yield
        return
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone(folder):
            yield
    finally:
        for one in made:
            with suppress(OSError):  # it holds something
                one.rmdir()


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


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
