"""Moves the time of day of single processes, by a small library that is compiled here and loaded before all others."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from tests.reliability.processes import poll_until

__all__ = ["Clock", "compile_shim", "find_obstacle", "read_ahead", "see_ahead"]

SOURCE: Final = Path(__file__).with_name("clock.c")
FILE_VARIABLE: Final = "TETHER_CLOCK_FILE"
SLACK_SECONDS: Final = 60.0
"""By which a log may be older than its file."""


def find_obstacle() -> str:
    """Return why the time of day cannot be moved here; empty if it can."""
    if sys.platform != "linux":
        return "the time of day of one process can be moved on Linux only"
    return "" if shutil.which("gcc") else "there is no gcc to compile the clock with"


def compile_shim(folder: Path) -> Path:
    """Return the library, compiled into a folder."""
    library = folder / "clock.so"
    command = ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return library


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of day of some processes."""

    path: Path
    library: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables of a process that lives by this clock."""
        return {"LD_PRELOAD": str(self.library), FILE_VARIABLE: str(self.path)}

    def set(self, seconds: int) -> None:
        """Be so much ahead of the machine's clock, from now on; behind it if negative."""
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.write(struct.pack("=q", seconds))


def read_ahead(log_file: Path) -> float | None:
    """Return by how many seconds the newest line of a log is ahead of the time that the kernel wrote the file.

    None if there is no line yet. The kernel's time is the machine's, whatever clock the process lives by.
    """
    if not log_file.exists():
        return None
    lines = [line for line in log_file.read_text(encoding="utf-8").splitlines() if line[:1] + line[-1:] == "{}"]
    if not lines:
        return None
    return datetime.fromisoformat(json.loads(lines[-1])["time"]).timestamp() - log_file.stat().st_mtime


async def see_ahead(log_file: Path, seconds: int) -> None:
    """Wait until a log shows that its process lives by a clock that is so much ahead of the machine's.

    Raises:
        AssertionError: It does not within 10 s: that clock was never moved.
    """

    async def seen() -> bool:
        ahead = read_ahead(log_file)
        return ahead is not None and abs(ahead - seconds) < SLACK_SECONDS

    await poll_until(seen, seconds=10, what=f"the clock of {log_file.name} is {seconds} s ahead")
