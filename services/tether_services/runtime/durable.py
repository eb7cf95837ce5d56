"""Files and folders that appear whole or not at all, and disappear in the same way."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tether.errors import FailedPreconditionError, ResourceExhaustedError, TetherError
from tether_services.runtime.fault_points import reach

__all__ = [
    "as_storage_error",
    "flush_folder",
    "make_folder",
    "remove_directory",
    "sweep_leftovers",
    "write_directory",
    "write_text",
]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_directory(target: Path, files: Mapping[str, bytes], *, points: str = "") -> None:
    """Create `target` with these files: a temporary sibling is written, flushed to disk and renamed.

    A directory that already holds exactly these files is left as it is.

    Args:
        target: The directory.
        files: Content by name.
        points: The fault points `<points>.staged`, `.renamed` and `.durable` are come to on the way; empty: none.

    Raises:
        FailedPreconditionError: `target` exists with other content, or the file system is read-only.
        ResourceExhaustedError: STORAGE_FULL; nothing of it stays.
    """
    if target.exists():
        if not _holds(target, files):
            raise FailedPreconditionError(f"{target} exists with other content; remove it or write elsewhere")
        _flush(target.parent)  # the call that made it may have failed right after the renaming
        return
    try:
        _write_directory(target, files, points)
    except OSError as error:
        named = as_storage_error(error, target)
        if named is None:
            raise
        raise named from error


def _write_directory(target: Path, files: Mapping[str, bytes], points: str) -> None:
    make_folder(target.parent)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        _come_to(points, "staged")
        flush_folder(staging)
        staging.rename(target)
    except BaseException:  # an interruption too must leave nothing half-done
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _come_to(points, "renamed")
    _flush(target.parent)
    _come_to(points, "durable")


def _come_to(points: str, name: str) -> None:
    if points:
        reach(f"{points}.{name}")


def _holds(target: Path, files: Mapping[str, bytes]) -> bool:
    if not target.is_dir() or {p.name for p in target.iterdir()} != set(files):
        return False
    return all((target / name).read_bytes() == content for name, content in files.items())


def as_storage_error(error: OSError, path: Path) -> TetherError | None:
    """Return an error that says what is wrong with the disk of a path and the way out; None for any other cause."""
    if error.errno in _FULL:
        message = f"The disk of {path} is full. What was there before is kept; free some space and go on."
        return ResourceExhaustedError(message, reason="STORAGE_FULL")
    if error.errno == errno.EROFS:
        message = f"The file system of {path} is read-only. What was there before is kept; make it writable and go on."
        return FailedPreconditionError(message, reason="STORAGE_READ_ONLY")
    return None


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, each known to the disk before anything is put in it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush(folder.parent)


def remove_directory(target: Path) -> None:
    """Remove a folder: it is renamed first, so that nobody ever finds half of it under its name."""
    if not target.exists():
        return
    doomed = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # no new folder: the disk may be full
    target.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what stays is swept away at the next start


def sweep_leftovers(folder: Path) -> list[Path]:
    """Remove what killed calls of `write_directory` and `remove_directory` left in a folder, and return what it was.

    Nobody else may be at work in the folder.
    """
    left = sorted(path for path in folder.glob(".*.*") if path.is_dir())
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary sibling is flushed to disk and renamed."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interruption too must leave nothing half-done
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush(path.parent)


def flush_folder(folder: Path) -> None:
    """Bring every file and folder below, and the folder itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
