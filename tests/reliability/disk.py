"""Damaged files, and small file systems that are filled, run out of inodes and become read-only.

The file systems vanish with the process.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["IN_NAMESPACE", "SmallDisk", "find_obstacle", "flipped", "namespace_command", "small_disk"]

IN_NAMESPACE: Final = "TETHER_RELIABILITY_MOUNTS"
"""Set where this process has a mount namespace of its own."""
BLOCK_BYTES: Final = 4096


def find_obstacle() -> str:
    """Return why small file systems cannot be mounted here; empty if they can."""
    if os.environ.get(IN_NAMESPACE):
        return ""
    if os.geteuid() != 0:
        return "mounting a small tmpfs needs root"
    if shutil.which("unshare") is None:
        return "there is no `unshare` command"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, timeout=10, check=False)
    return "" if tried.returncode == 0 else f"no mount namespace may be made: {tried.stderr.strip()}"


def namespace_command(command: list[str]) -> list[str]:
    """Return the command that runs another one in a mount namespace of its own."""
    return ["unshare", "--mount", "--propagation", "private", *command]


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A mounted tmpfs."""

    path: Path

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Take all room but some."""
        room = shutil.disk_usage(self.path).free - leave_bytes
        with (self.path / "ballast").open("ab") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(0, room) // BLOCK_BYTES * BLOCK_BYTES)
        if not leave_bytes:
            self._fill_to_the_last_block()

    def _fill_to_the_last_block(self) -> None:
        with (self.path / "ballast").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(BLOCK_BYTES))

    def take_inodes(self) -> int:
        """Make empty files until there can be no more, and return how many."""
        folder = self.path / "many"
        folder.mkdir(exist_ok=True)
        count = 0
        while True:
            try:
                (folder / str(count)).touch(exist_ok=False)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return count
            count += 1

    def set_read_only(self, read_only: bool) -> None:
        """Mount it again, read-only or not."""
        _run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(self.path))

    def free(self) -> None:
        """Give everything back."""
        (self.path / "ballast").unlink(missing_ok=True)
        shutil.rmtree(self.path / "many", ignore_errors=True)


@contextmanager
def small_disk(path: Path, *, size_bytes: int, inodes: int = 10_000) -> Iterator[SmallDisk]:
    """Yield a new tmpfs; only within a namespace of one's own."""
    assert os.environ.get(IN_NAMESPACE), "run by namespace_command only, so that nothing stays mounted"
    path.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},nr_inodes={inodes},mode=700", "tmpfs", str(path))
    try:
        yield SmallDisk(path)
    finally:
        _run("umount", "--lazy", str(path))


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """Invert a bit of a file for the length of a block."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
