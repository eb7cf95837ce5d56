"""Where adapter files live on disk: a staging folder per upload and one write-once folder per version."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tether.errors import InvalidArgumentError, ResourceExhaustedError
from tether_services.generator.verification import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME

FREE_BYTES = 64 * 1024 * 1024
"""Default of `adapters.free_bytes`."""
_CREATE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_WAYS_OUT = {
    errno.ENOSPC: "has no room or no inodes left: free some",
    errno.EDQUOT: "has used up its quota: free some space",
    errno.EROFS: "is read-only: make it writable",
}


class AdapterStorage:
    """A folder that one process owns. Stored versions outlive it unless the folder is temporary; uploads do not."""

    def __init__(self, folder: Path | None, *, free_bytes: int = FREE_BYTES, quota_bytes: int = 0) -> None:
        """Name the folder.

        Args:
            folder: None stands for a temporary one that `close` removes.
            free_bytes: What a push must leave free on the disk.
            quota_bytes: What adapters and uploads together may take; 0 is no limit.
        """
        self._wanted = folder
        self._free_bytes = free_bytes
        self._quota_bytes = quota_bytes
        self._lock: int | None = None

    def open(self) -> None:
        """Take the folder and drop unfinished uploads.

        Raises:
            InvalidArgumentError: The folder cannot be written or another process has it.
        """
        self.folder = (
            Path(tempfile.mkdtemp(prefix="tether-adapters-")) if self._wanted is None else self._wanted.resolve()
        )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._staging, self._versions = self.folder / "staging", self.folder / "versions"
            shutil.rmtree(self._staging, ignore_errors=True)
            for inner in (self._staging, self._versions):
                inner.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(
                f"Cannot take {self.folder}: {error.strerror}. Is another generator using it?", field="adapters.folder"
            ) from error

    @property
    def is_lasting(self) -> bool:
        """Return whether the folder outlives the process."""
        return self._wanted is not None

    @property
    def _damaged(self) -> Path:
        return self.folder / "damaged"

    def find_stored(self) -> list[Path]:
        """Return the folders of the stored versions. Those without a manifest were being removed: they go for good."""
        stored = []
        for folder in sorted(self._versions.glob("*/*")):
            if (folder / MANIFEST_NAME).is_file():
                stored.append(folder)
            else:
                self.remove(folder)
        return stored

    def set_aside(self, folder: Path) -> Path:
        """Move a damaged version to where nothing reads or deletes it, and return that folder.

        Raises:
            OSError: It cannot be moved.
        """
        self._damaged.mkdir(mode=0o700, exist_ok=True)
        return folder.rename(_unused(self._damaged / f"{folder.parent.name}-{folder.name}"))

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

        Args:
            size_bytes: What is still to be written, of all open uploads.

        Raises:
            ResourceExhaustedError: STORAGE_FULL: less than free_bytes would be left, or the quota exceeded.
        """
        free, used = self._free(), self.usage_bytes()
        if free - size_bytes < self._free_bytes:
            raise _full(
                f"{size_bytes} bytes do not fit: {free} bytes are free on the disk and adapters.free_bytes is"
                f" {self._free_bytes}; free some space"
            )
        if self._quota_bytes and used + size_bytes > self._quota_bytes:
            raise _full(
                f"{size_bytes} bytes do not fit: {used} of adapters.quota_bytes {self._quota_bytes} are used; delete"
                " adapters or raise it"
            )

    def missing_bytes(self, size_bytes: int) -> int:
        """Return how much would have to go for this to fit; 0 or less if it does."""
        over_quota = self.usage_bytes() + size_bytes - self._quota_bytes if self._quota_bytes else 0
        return max(size_bytes + self._free_bytes - self._free(), over_quota)

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def usage_bytes(self) -> int:
        """Return the bytes of all files of stored versions and uploads."""
        total = 0
        for top in (self._staging, self._versions):
            for folder, _, names in os.walk(top):
                for name in names:
                    with suppress(FileNotFoundError):  # a version that is being removed
                        total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def stage(self, upload_id: str) -> Path:
        """Return a new staging folder with the two empty files.

        Raises:
            ResourceExhaustedError: STORAGE_FULL. Nothing is left.
        """
        folder = self._staging / upload_id
        with reporting_full_disk():
            folder.mkdir(mode=0o700)
            try:
                for name in (CONFIG_NAME, WEIGHTS_NAME):
                    os.close(os.open(folder / name, _CREATE_FLAGS, 0o600))
            except OSError:
                self.discard(upload_id)
                raise
        return folder

    def discard(self, upload_id: str) -> None:
        """Remove a staging folder, if it is there."""
        shutil.rmtree(self._staging / upload_id, ignore_errors=True)

    def store(self, upload_id: str, target: tuple[str, int, str], files: Mapping[str, bytes]) -> Path:
        """Move a verified upload to a write-once folder of its own, durably, and return that folder.

        Args:
            upload_id: Names the staging folder.
            target: (run_id, policy_version, sha256) of the adapter; all checked before.
            files: What to store beside the uploaded files, or in their place.

        Raises:
            ResourceExhaustedError: STORAGE_FULL. Nothing is stored then, and the same content can be stored later.
        """
        run_id, version, sha256 = target
        staged, parent = self._staging / upload_id, self._versions / run_id
        with reporting_full_disk():
            for name, content in files.items():
                _write_durably(staged / name, content)
            sync_file(staged / WEIGHTS_NAME)  # the stream may have broken before it did
            parent.mkdir(mode=0o700, exist_ok=True)
            final = _unused(parent / f"{version}-{sha256[:12]}")
            os.rename(staged, final)
            try:
                for folder in (final, parent, self._versions):
                    _sync_folder(folder)
            except OSError:  # what may not survive a power cut is not stored
                self.remove(final)
                raise
        return final

    def disown(self, folder: Path) -> None:
        """Have a stored version not come back after a restart, although its files are still needed now."""
        with suppress(OSError):  # at worst it comes back, as any other version of its run
            (folder / MANIFEST_NAME).unlink(missing_ok=True)

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
    path.unlink(missing_ok=True)
    os.close(os.open(path, _CREATE_FLAGS, 0o600))
    write_at(path, content, 0)
    sync_file(path)


def _unused(folder: Path) -> Path:
    """Return the folder's name, or one with a number where that is taken: by a version that is still being unloaded."""
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], names) if not path.exists())


@contextmanager
def reporting_full_disk() -> Iterator[None]:
    """Turn the errors of a disk that takes nothing more into STORAGE_FULL.

    Raises:
        ResourceExhaustedError: In place of such an OSError; the message names the way out and no path.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WAYS_OUT:
            raise
        raise _full(f"The disk {_WAYS_OUT[error.errno]}") from error


def _full(problem: str) -> ResourceExhaustedError:
    return ResourceExhaustedError(f"{problem} on the generator, then push again.", reason="STORAGE_FULL")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
