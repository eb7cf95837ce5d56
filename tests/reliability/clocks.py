"""Moves the time of day of single processes, by a small library that is compiled here and loaded before all others."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Clock", "compile_shim", "find_obstacle"]

SOURCE: Final = Path(__file__).with_name("clock.c")
FILE_VARIABLE: Final = "TETHER_CLOCK_FILE"


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
