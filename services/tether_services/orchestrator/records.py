"""What the ledger knows: runs and committed steps, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

__all__ = ["ACTIVE_STATES", "FINAL_STATES", "RESUMABLE_STATES", "Attempt", "RunRecord", "RunState", "StepRecord"]


class RunState(Enum):
    """Life of a run, as in the contract."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ACTIVE_STATES = frozenset({RunState.PENDING, RunState.RUNNING})
FINAL_STATES = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})
RESUMABLE_STATES = frozenset({RunState.FAILED, RunState.CANCELLED})


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as the ledger holds it."""

    run_id: str
    state: RunState
    epoch: int
    """Number of its latest attempt, from 1; only the worker of that attempt may write."""
    num_committed_steps: int
    num_total_steps: int
    policy_version: int
    """Version that the generator serves for it; 0 before the first push."""
    error: str
    """Why it failed; empty otherwise."""
    cancel_requested: bool
    create_time: float
    """Unix seconds."""
    end_time: float | None
    """Unix seconds; None while it is active."""
    config_toml: str
    """As the caller sent it."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A committed step."""

    step: int
    """From 0."""
    policy_version: int
    """Version that sampled it."""
    metrics: Mapping[str, float]
    """By the names of `step_metrics.STEP_METRICS`."""
    distributions: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Per-sample values behind some of the means, for histograms."""
    commit_time: float = 0.0
    """Unix seconds; set by the ledger."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run's worker."""

    run_id: str
    epoch: int
    """From 1; fences off the workers of earlier attempts."""
    directory: Path
    """Folder of the run."""
