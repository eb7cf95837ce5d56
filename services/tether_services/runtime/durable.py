"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tether.errors import FailedPreconditionError

__all__ = ["flush_folder", "write_directory", "write_text"]


def write_directory(target: Path, files: Mapping[str, bytes]) -> None:
    """Create `target` with these files: a temporary sibling is written, flushed to disk and renamed.

    A directory that already holds exactly these files is left as it is.

    Raises:
        FailedPreconditionError: `target` exists with other content.
    """
    if target.exists():
        if not _holds(target, files):
            raise FailedPreconditionError(f"{target} exists with other content; remove it or write elsewhere")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        flush_folder(staging)
        staging.rename(target)
    except BaseException:  # an interruption too must leave nothing half-done
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _flush(target.parent)


def _holds(target: Path, files: Mapping[str, bytes]) -> bool:
    if not target.is_dir() or {p.name for p in target.iterdir()} != set(files):
        return False
    return all((target / name).read_bytes() == content for name, content in files.items())


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
