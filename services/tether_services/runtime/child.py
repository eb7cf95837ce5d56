"""Runs a module that does not outlive its parent: `python -m tether_services.runtime.child PARENT_PID MODULE ...`."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal this process gets when its parent is gone."""


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, even if that is killed itself. Linux only.

    Args:
        parent_pid: Id of the parent that is expected; if it has died already, this process ends at once.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit("The parent process is gone.")


def main() -> None:
    """Bind this process to its parent, then become the module."""
    parent_pid, module = int(sys.argv[1]), sys.argv[2]
    die_with_parent(parent_pid)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
