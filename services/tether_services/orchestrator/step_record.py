"""From a finished step to the record that the ledger keeps."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from tether.errors import TetherError
from tether_services.orchestrator.publishing import PushFigures
from tether_services.orchestrator.records import StepNumbers, StepRecord
from tether_services.orchestrator.rollouts import Rollout
from tether_services.orchestrator.step_metrics import DROP_REASONS, STEP_METRICS
from tether_services.orchestrator.trainer import UpdateReport
from tether_services.runtime.durable import as_storage_error

__all__ = ["StepClock", "name_phase", "summarise_push", "summarise_samples", "summarise_step"]


class StepClock:
    """Times the phases of a step, and names the step and phase in errors that leave one."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._begun: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Time a phase."""
        self._begun[name] = time.monotonic()
        with name_phase(f"step {step}, {name}"):
            yield
        self._seconds[f"{name}_seconds"] = time.monotonic() - self._begun[name]

    def finish(self) -> dict[str, float]:
        """Return the seconds of each phase and of the whole step, by the names of STEP_METRICS."""
        return {**self._seconds, "step_seconds": time.monotonic() - self._started}


@contextmanager
def name_phase(where: str) -> Iterator[None]:
    """Put the place in front of the message of an error that leaves the block."""
    try:
        yield
    except TetherError as error:
        raise _place(error, where) from error
    except OSError as error:
        named = as_storage_error(error, Path(error.filename or "the run's folder"))
        if named is None:
            raise
        raise _place(named, where) from error


def _place(error: TetherError, where: str) -> TetherError:
    return type(error)(f"{where}: {error.message}", reason=error.reason, violations=error.violations)


def summarise_step(
    numbers: StepNumbers,
    rollout: Rollout,
    update: UpdateReport,
    seconds: Mapping[str, float],
    *,
    adapter_bytes: int,
) -> StepRecord:
    """Return the record of a step before its push. Figures that are not finite (undefined here) are left out."""
    figures = {
        **update.as_dict(),
        **seconds,
        **summarise_samples(rollout),
        **_span_figures(rollout, seconds),
        **_memory_figures(),
        "adapter_bytes": adapter_bytes,
    }
    metrics = {name: float(figures[name]) for name in STEP_METRICS if name in figures and math.isfinite(figures[name])}
    lengths = [len(sample.completion.token_ids) for sample in rollout.samples]
    distributions: dict[str, Sequence[float]] = {
        "score": [sample.score for sample in rollout.samples],
        "response_length": lengths,
    }
    return StepRecord(numbers.step, numbers.policy_version, metrics, distributions)


def summarise_samples(rollout: Rollout) -> dict[str, float]:
    """Return the figures of the samples of a step."""
    samples = rollout.samples
    scores = [sample.score for sample in samples]
    lengths = [len(sample.completion.token_ids) for sample in samples]
    truncated = sum(sample.completion.finish_reason == "length" for sample in samples)
    return {
        "samples_asked": rollout.num_asked,
        "samples_generated": rollout.num_generated,
        "samples_not_generated": rollout.num_not_generated,
        "samples_trained": len(samples),
        "samples_dropped": sum(rollout.dropped.values()),
        **{f"dropped_{reason}": rollout.dropped[reason] for reason in DROP_REASONS},
        "samples_abandoned": rollout.num_abandoned,
        "generated_tokens": rollout.generated_tokens,
        "effective_tokens": sum(lengths),
        "tokens_per_second": rollout.generated_tokens / max(rollout.generate.seconds, 1e-9),
        "score_mean": statistics.fmean(scores),
        "score_std": statistics.pstdev(scores),
        "response_length_mean": statistics.fmean(lengths),
        "truncated_ratio": truncated / len(samples),
    }


def _span_figures(rollout: Rollout, seconds: Mapping[str, float]) -> dict[str, float]:
    generate, score = rollout.generate, rollout.score
    assert generate.first_start is not None and score.first_start is not None, "a checked rollout has samples"
    return {
        "rollout_seconds": generate.seconds,
        "score_seconds": score.seconds,
        "ref_seconds": rollout.reference.seconds,
        "score_wait_seconds": score.first_start - generate.first_start,
        "train_wait_seconds": max(0.0, seconds["rollout_seconds"] - generate.seconds),
    }


def summarise_push(pushed: PushFigures, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the figures that a push adds to the record of its step; those that were not measured are left out.

    Args:
        pushed: What it took.
        seconds: Of the phases of the step, the push included, and of the whole step.
    """
    figures = {name: value for name, value in asdict(pushed).items() if value is not None}
    probe = {name: figures.pop(name) for name in ("probe_mean_abs_dlogp",) if name in figures}
    return {
        **probe,
        "push_seconds": seconds["push_serialize_seconds"] + seconds["push_seconds"],
        "step_seconds": seconds["step_seconds"],
        **{f"push_{name}": value for name, value in figures.items()},
    }


def _memory_figures() -> dict[str, float]:
    """Return the memory of this process, and of the allocator where there is a GPU."""
    figures: dict[str, float] = {"process_memory_bytes": psutil.Process().memory_info().rss}
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        figures["torch_allocated_bytes"] = torch.cuda.memory_allocated()
        figures["torch_reserved_bytes"] = torch.cuda.memory_reserved()
        figures["torch_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
    return figures
