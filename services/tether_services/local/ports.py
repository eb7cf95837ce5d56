"""Free ports for processes that start at the same time on one machine."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from tether.errors import FailedPreconditionError

__all__ = ["PORTS", "free_ports", "is_free"]

PORTS: Final = range(20_000, 32_000)
"""Below the range from which the kernel takes ports for outgoing connections, so that none is taken meanwhile."""
SLICE_PORTS: Final = 200
"""Ports that one process hands out."""


class _Slice:
    """Ports that no other process hands out, each in its turn.

    Between the look at a port and the start of its service lie seconds, in which another process would find it free.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        ports = _lock_ports()
        random.shuffle(ports)
        self._num_ports = len(ports)
        self._turns: Iterator[int] = itertools.cycle(ports)

    def take(self, count: int) -> list[int]:
        """Return that many ports; those that were handed out before come again last.

        Raises:
            FailedPreconditionError: There are not so many.
        """
        free = filter(is_free, itertools.islice(self._turns, self._num_ports))
        found = list(itertools.islice(free, count))
        if len(found) < count:
            message = f"There are no {count} free ports for a process between {PORTS[0]} and {PORTS[-1]}."
            raise FailedPreconditionError(message)
        return found


_slices: list[_Slice] = []


def free_ports(count: int) -> list[int]:
    """Return that many different ports that nobody listens on at 127.0.0.1 now, and no other process is given.

    Raises:
        FailedPreconditionError: There are not so many.
    """
    if not _slices or _slices[-1].owner != os.getpid():  # a forked process must not go on with those of its parent
        _slices.append(_Slice())
    return _slices[-1].take(count)


def _lock_ports() -> list[int]:
    """Return the ports of a file that is locked for as long as the process lives; all where none can be locked."""
    folder = Path(tempfile.gettempdir()) / f"tether-ports-{os.getuid()}"
    starts = list(PORTS[::SLICE_PORTS])
    random.shuffle(starts)
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        for start in starts:
            descriptor = os.open(folder / str(start), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return [*range(start, start + SLICE_PORTS)]
            os.close(descriptor)
    return list(PORTS)


def is_free(port: int) -> bool:
    """Return whether nobody listens on a port at 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not hold a port
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
