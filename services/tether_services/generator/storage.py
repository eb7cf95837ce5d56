"""Where adapter files live on disk: a staging folder per upload and one write-once folder per version."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tether.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME

FREE_BYTES_LEFT = 64 * 1024 * 1024
"""A push that would leave less than this on the disk is refused."""
_CREATE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class AdapterStorage:
    """A folder that one process owns. What an earlier process left is removed: pushes are repeated after a restart."""

    def __init__(self, folder: Path | None) -> None:
        """Name the folder; None stands for a temporary one that `close` removes."""
        self._wanted = folder
        self._lock: int | None = None

    def open(self) -> None:
        """Take the folder and clear it.

        Raises:
            InvalidArgumentError: The folder cannot be written or another process has it.
        """
        self.folder = (
            Path(tempfile.mkdtemp(prefix="tether-adapters-")) if self._wanted is None else self._wanted.resolve()
        )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._staging, self._versions = self.folder / "staging", self.folder / "versions"
            for inner in (self._staging, self._versions):
                shutil.rmtree(inner, ignore_errors=True)
                inner.mkdir(mode=0o700)
        except OSError as error:
            raise InvalidArgumentError(
                f"Cannot take {self.folder}: {error.strerror}. Is another generator using it?", field="adapters.folder"
            ) from error

    def close(self) -> None:
        """Give the folder up, and remove it if it is temporary. Does nothing if it was never taken."""
        if self._lock is None:
            return
        os.close(self._lock)
        self._lock = None
        if self._wanted is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def check_space(self, size_bytes: int) -> None:
        """Refuse what does not fit.

        Raises:
            ResourceExhaustedError: The disk would be full.
        """
        free = shutil.disk_usage(self.folder).free
        if free - size_bytes < FREE_BYTES_LEFT:
            raise ResourceExhaustedError(
                f"{size_bytes} bytes do not fit: {free} bytes are free on the generator's disk.", reason="STORAGE_FULL"
            )

    def stage(self, upload_id: str) -> Path:
        """Return a new staging folder with the two empty files."""
        folder = self._staging / upload_id
        folder.mkdir(mode=0o700)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            os.close(os.open(folder / name, _CREATE_FLAGS, 0o600))
        return folder

    def discard(self, upload_id: str) -> None:
        """Remove a staging folder, if it is there."""
        shutil.rmtree(self._staging / upload_id, ignore_errors=True)

    def store(self, upload_id: str, target: tuple[str, int, str], config: dict[str, Any]) -> Path:
        """Move a verified upload to its write-once folder, durably, and return that folder.

        Args:
            upload_id: Names the staging folder.
            target: (run_id, policy_version, sha256) of the adapter; all checked before.
            config: The configuration to store in place of the uploaded one.

        Raises:
            FailedPreconditionError: The folder exists.
        """
        run_id, version, sha256 = target
        staged = self._staging / upload_id
        _write_durably(staged / CONFIG_NAME, json.dumps(config, indent=2).encode())
        parent = self._versions / run_id
        parent.mkdir(mode=0o700, exist_ok=True)
        final = parent / f"{version}-{sha256[:12]}"
        try:
            os.rename(staged, final)
        except OSError as error:
            raise FailedPreconditionError(f"Version {version} is stored already.", reason="VERSION_EXISTS") from error
        for folder in (final, parent, self._versions):
            _sync_folder(folder)
        return final

    def remove(self, folder: Path) -> None:
        """Delete a stored version."""
        if not folder.resolve().is_relative_to(self._versions):
            raise AssertionError(f"{folder} is not a stored version")
        shutil.rmtree(folder, ignore_errors=True)


def write_at(path: Path, data: bytes, offset: int) -> None:
    """Write bytes into an existing file, without following a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, memoryview(data)[written:], offset + written)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Have the content of a file reach the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, content: bytes) -> None:
    path.unlink()
    descriptor = os.open(path, _CREATE_FLAGS, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
