"""The budget of a process: threads, as tensor libraries read them from the environment, and memory that is kept."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

LIBRARY_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ALLOCATOR_VARIABLES: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""How users tell glibc's allocator themselves what to keep."""
ALLOCATOR_TUNABLES: Final = "glibc.malloc."
"""The same within GLIBC_TUNABLES."""
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
"""Names of mallopt(3), from malloc.h."""
KEPT_BYTES: Final = 256 * 1024 * 1024
"""Freed memory, at the end of the heap, that a process keeps for its next forward pass."""
BLOCK_BYTES: Final = 32 * 1024 * 1024
"""Larger blocks come from the system and go back to it at once. It is the most that glibc takes on 64 bits."""


def thread_environment(threads: int) -> dict[str, str]:
    """Return the variables that give a process its budget, to be set before a tensor library is loaded.

    Idle OpenMP threads must sleep: four spinning processes on two cores were measured ten times slower.
    """
    budget = dict.fromkeys(LIBRARY_VARIABLES, str(threads))
    return {**budget, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def prepare_process(threads: int) -> None:
    """Give this process its budget; a wait policy and an allocator that the user has set stay."""
    chosen = {name: os.environ[name] for name in ("OMP_WAIT_POLICY",) if name in os.environ}
    os.environ.update(thread_environment(threads) | chosen)
    if not has_allocator_settings():
        keep_freed_memory()


def has_allocator_settings() -> bool:
    """Return whether the user has told the allocator what to keep."""
    tuned = ALLOCATOR_TUNABLES in os.environ.get("GLIBC_TUNABLES", "")
    return tuned or any(name in os.environ for name in ALLOCATOR_VARIABLES)


def keep_freed_memory() -> bool:
    """Have the allocator keep what a forward pass frees; False where it is not glibc's.

    By default large blocks go back to the system when they are freed, so that each pass takes page faults for the
    same megabytes again: 5,000 of them, a tenth of the time, in a pass of 1,300 tokens of a small model on a CPU.

    Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        return False
    values = {M_MMAP_THRESHOLD: BLOCK_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES}
    return all(library.mallopt(name, value) == 1 for name, value in values.items())
