"""What the worker of a run says of the services that it calls, in files of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tether_services.orchestrator.remote import BREAKERS_FILE, LAGGING_FILE, BreakerStates
from tether_services.orchestrator.run_files import RunFiles

__all__ = ["read_breakers", "read_lagging"]


def read_breakers(directory: Path) -> BreakerStates:
    """Return what the worker of a run says of the services it calls; empty if that cannot be read."""
    return _read_states(directory, BREAKERS_FILE)


def read_lagging(directory: Path) -> list[str]:
    """Return the generators that lag, as the worker of a run says; empty if that cannot be read."""
    targets = _read_states(directory, LAGGING_FILE).get("generators")
    return targets if isinstance(targets, list) else []


def _read_states(directory: Path, name: str) -> dict[str, Any]:
    try:
        states: object = RunFiles(directory).read_json(name)
    except (ValueError, OSError):  # a disk error; it is only shown, and no reason to leave the worker alone
        return {}
    return states if isinstance(states, dict) else {}
