"""Who may write a run: the process that holds its lease.

A lease names its holder (process and the moment that process started, so that a number used again is somebody else)
and expires on the clock that counts from the start of the machine, which no change of the time of day moves.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

__all__ = ["Lease", "boot_clock_ns", "boot_id", "end_holder", "is_alive", "own_holder"]

_END_SECONDS = 10.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write a run."""

    run_id: str
    epoch: int
    """Of the attempt that it was taken for."""
    holder: str
    """See `own_holder`."""
    boot_id: str
    """Of the start of the machine that clock and holder belong to."""
    expires_ns: int
    """On `boot_clock_ns`."""


def boot_clock_ns() -> int:
    """Return nanoseconds since the machine started, suspension included; without that clock, the monotonic one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic_ns() if clock is None else time.clock_gettime_ns(clock)


@cache
def boot_id() -> str:
    """Return what tells this start of the machine from others; empty where the system has no such thing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def own_holder() -> str:
    """Return the name of this process: its number and when it started."""
    return f"{os.getpid()}:{_start_mark(os.getpid())}"


def is_alive(lease: Lease) -> bool:
    """Return whether the holder of a lease is a process that exists on this machine."""
    if lease.boot_id != boot_id():
        return False
    number, _, mark = lease.holder.partition(":")
    return _start_mark(int(number)) == mark


def end_holder(lease: Lease) -> bool:
    """Kill the holder of a lease if it still lives, and wait until it is gone; return whether there was one.

    Raises:
        TimeoutError: It does not end, for example inside a call to a disk that does not answer.
    """
    if not is_alive(lease):
        return False
    number = int(lease.holder.partition(":")[0])
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        return True
    deadline = time.monotonic() + _END_SECONDS
    while is_alive(lease):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {number} did not end within {_END_SECONDS:g} s of being killed")
        time.sleep(0.02)
    return True


def _start_mark(number: int) -> str:
    """Return when a process started, in a form that no clock change alters; empty if there is none or it has ended."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _start_mark_elsewhere(number)
    return "" if fields[0] in ("Z", "X") else fields[19]  # state, start time in clock ticks since boot


def _start_mark_elsewhere(number: int) -> str:
    if Path("/proc/self/stat").exists():
        return ""
    try:
        return repr(psutil.Process(number).create_time())
    except psutil.Error:
        return ""
