"""Kills what a process started, should that process die without stopping it.

vLLM's engine process outlives a parent that is killed with SIGKILL, and keeps the GPU. So a small guard runs beside
it, as a script of its own: it learns the descendants of its parent while they start, then waits for the pipe from the
parent to close.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys

import psutil

SCAN_SECONDS = 1.0
STARTED, STOPPED = b"s", b"q"


class OrphanGuard:
    """The parent's end of the pipe."""

    def __init__(self) -> None:
        """Start the guard, in a session of its own so that signals to the parent's group do not reach it."""
        command = [sys.executable, "-I", __file__]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def started(self) -> None:
        """Everything has started: the guard looks once more and then only waits."""
        self._send(STARTED)

    def stop(self) -> None:
        """Everything has stopped: the guard goes."""
        self._send(STOPPED)
        self._guard.communicate()

    def _send(self, word: bytes) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(word)
        self._guard.stdin.flush()


def find_descendants(parent: psutil.Process) -> set[psutil.Process]:
    """Return the processes that the parent started, directly or not, without this one. Their identity outlives them."""
    try:
        return {process for process in parent.children(recursive=True) if process != psutil.Process()}
    except psutil.NoSuchProcess:
        return set()


def watch(parent: psutil.Process) -> None:
    """Return when the parent says that all is stopped; if it dies before, kill what it started."""
    known: set[psutil.Process] = set()
    scanning = True
    while True:
        known |= find_descendants(parent)
        readable, _, _ = select.select([sys.stdin], [], [], SCAN_SECONDS if scanning else None)
        if not readable:
            continue
        word = os.read(sys.stdin.fileno(), 1)
        if word == STARTED:
            scanning = False
        elif word == STOPPED:
            return
        else:
            break
    for process in known:
        if process.is_running():
            process.kill()


if __name__ == "__main__":
    watch(psutil.Process().parent() or psutil.Process())
