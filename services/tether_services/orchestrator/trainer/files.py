"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tether.errors import FailedPreconditionError

__all__ = ["write_directory"]


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
            _write_flushed(staging / name, content)
        _flush_directory(staging)
        staging.rename(target)
    except BaseException:  # an interruption too must leave nothing half-done
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _flush_directory(target.parent)


def _holds(target: Path, files: Mapping[str, bytes]) -> bool:
    if not target.is_dir() or {p.name for p in target.iterdir()} != set(files):
        return False
    return all((target / name).read_bytes() == content for name, content in files.items())


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
