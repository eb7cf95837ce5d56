"""One room for all tests of a session: many share it, or one has it alone, in the order of their coming."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def room(folder: Path, *, alone: bool) -> Iterator[None]:
    """Hold the room of a folder, from any process.

    Whoever wants it waits at the gate until it has it, so that nobody who comes later passes one that waits for the
    others to leave.
    """
    with (folder / "gate").open("a") as gate, (folder / "room").open("a") as place:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(place, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(place, fcntl.LOCK_UN)  # closing is not enough while a forked child has the file too
