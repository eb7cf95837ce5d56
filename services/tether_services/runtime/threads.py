"""The thread budget of a process, as tensor libraries read it from the environment."""

from __future__ import annotations

import os

LIBRARY_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def thread_environment(threads: int) -> dict[str, str]:
    """Return the variables that give a process its budget, to be set before a tensor library is loaded.

    Idle OpenMP threads must sleep: four spinning processes on two cores were measured ten times slower.
    """
    budget = dict.fromkeys(LIBRARY_VARIABLES, str(threads))
    return {**budget, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def prepare_process(threads: int) -> None:
    """Give this process its budget; a wait policy that the user has set stays."""
    chosen = {name: os.environ[name] for name in ("OMP_WAIT_POLICY",) if name in os.environ}
    os.environ.update(thread_environment(threads) | chosen)
