"""What runs runs: the seam between the service and the process that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tether_services.orchestrator.records import Attempt

__all__ = ["RunEngine", "WorkerExit"]


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """How a worker ended."""

    code: int
    """Exit status; below 0: killed by that signal."""
    last_line: str
    """The last thing it logged; empty if nothing."""


class RunEngine(Protocol):
    """Starts a worker for an attempt and waits for its end; the worker writes progress and end to the ledger."""

    async def run(self, attempt: Attempt) -> WorkerExit:
        """Run the attempt to its end; cancelling this call ends the worker.

        Raises:
            OSError: The worker could not be started.
        """
        ...

    async def close(self) -> None:
        """End all workers."""
        ...
