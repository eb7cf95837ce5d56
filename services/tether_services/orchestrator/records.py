"""What the ledger knows: runs, committed steps and what became of their samples, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

__all__ = [
    "ACTIVE_STATES",
    "FINAL_STATES",
    "RESUMABLE_STATES",
    "Attempt",
    "CheckpointRow",
    "Rollback",
    "RunIdentity",
    "RunRecord",
    "RunState",
    "SampleCounts",
    "SampleRow",
    "StepNumbers",
    "StepOutcome",
    "StepRecord",
    "StepState",
]


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
    branch: int = 0
    """Rollbacks so far; each begins a branch."""
    rollback_to: int | None = None
    """Steps that are to stay, of a rollback that is made once the worker has stopped; None: none was asked for."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A committed step."""

    step: int
    """From 0."""
    policy_version: int
    """Version that sampled it."""
    metrics: Mapping[str, float]
    """By the names of `step_metrics.STEP_METRICS`; those of the push are there once it has been recorded."""
    distributions: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Per-sample values behind some of the means, for histograms."""
    commit_time: float = 0.0
    """Unix seconds; set by the ledger."""
    new_version: int = 0
    """Version that it made; set by the ledger."""


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """The numbers of the next step of a run. Without a rollback, step and version are the same."""

    step: int
    """From 0; one that was rolled back is made again under its number."""
    policy_version: int
    """Version that samples it, which the last committed step has made; 0: the base."""
    new_version: int
    """Version that it makes: no step that was ever committed has made it."""
    branch: int
    """Rollbacks so far."""


@dataclass(frozen=True, slots=True)
class Rollback:
    """Committed steps that were taken back."""

    branch: int
    """That it began, from 1."""
    from_step: int
    """Steps that were committed before it."""
    to_step: int
    """Steps that stayed."""
    reason: str
    """What it was made for."""
    time: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run's worker."""

    run_id: str
    epoch: int
    """From 1; fences off the workers of earlier attempts."""
    directory: Path
    """Folder of the run."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A completion that arrived, before the update that may learn from it."""

    sample: int
    """Number in its step: prompt index times completions per prompt, plus completion index."""
    prompt_sha256: str
    """Of the prompt's token ids."""
    policy_version: int
    """Version that made it, by its own account."""
    adapter_sha256: str
    """Hash of that adapter; empty for version 0."""
    num_tokens: int
    dropped: str = ""
    """Why it will not be trained on, a reason of `step_metrics.DROP_REASONS`; empty: it will be."""


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """What became of the samples of a step: generated = trained + dropped."""

    asked: int = 0
    generated: int = 0
    trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    """By reason, without zeros."""


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A checkpoint on disk."""

    version: int
    """Policy version that it holds."""
    path: str
    """Of its folder, below the folder of the run."""
    sha256: str
    """Of its state.json, which holds the hashes of its other files; empty: written before hashes were kept."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step left behind, committed with it."""

    adapter_sha256: str = ""
    """Hash of the weights of the new version."""
    checkpoint: CheckpointRow | None = None
    samples: SampleCounts = SampleCounts()


@dataclass(frozen=True, slots=True)
class StepState:
    """A committed step with what it left behind."""

    step: int
    policy_version: int
    """Version that sampled it."""
    new_version: int
    """Version that it made."""
    epoch: int
    """Attempt that committed it."""
    adapter_sha256: str
    samples: SampleCounts
    checkpoint: CheckpointRow | None
    """None once it has been removed."""
    commit_time: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Content hashes that stay the same over all attempts of a run; empty: not known."""

    base_sha256: str
    reward_sha256: str
    prompts_sha256: str
    """Of all prompts, held-out ones and pretraining text."""
