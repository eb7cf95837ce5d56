"""A worker that keeps the promises of the real one without training: it acts as its run's name tells it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.unit.run_inputs import sample_rows, step_outcome, step_record
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.heartbeat import Heartbeat
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.worker import _parse


def main() -> int:
    """Take the lease as the real worker does, and act by the first word of the run's name."""
    known = _parse(None)
    settings = OrchestratorSettings.model_validate_json(known.settings)
    ledger = Ledger(Path(settings.state_dir))
    attempt = Attempt(known.run_id, known.epoch, ledger.directory(known.run_id))
    lease = ledger.acquire_lease(attempt, seconds=settings.lease_seconds)
    with Heartbeat(ledger, lease, seconds=settings.lease_seconds):
        ledger.mark_running(attempt)
        return run_steps(ledger, attempt)


def run_steps(ledger: Ledger, attempt: Attempt) -> int:
    """Commit steps: steps, slow, dies (in its first attempt), crashes (in all), stops, hangs, unpushed."""
    run = ledger.get_run(attempt.run_id)
    kind = attempt.run_id.split("-")[0]
    if kind == "crashes" and run.num_committed_steps:
        return 9
    for step in range(run.num_committed_steps, run.num_total_steps):
        if ledger.get_run(attempt.run_id).cancel_requested:
            ledger.finish(attempt, RunState.CANCELLED)
            return 0
        ledger.record_samples(attempt, step, sample_rows(4))
        ledger.commit_step(attempt, step_record(step), step_outcome(step))
        if kind != "unpushed":
            ledger.record_push(attempt, step + 1, {})
        after_step(kind, attempt)
        if kind == "dies" and attempt.epoch == 1:
            print("RuntimeError: out of cheese", file=sys.stderr)
            return 9
        if kind == "crashes":
            return 9
    ledger.finish(attempt, RunState.SUCCEEDED)
    return 0


def after_step(kind: str, attempt: Attempt) -> None:
    """Do what this kind of worker does once it has committed."""
    if kind == "slow":
        time.sleep(0.1)
    if kind in ("hangs", "unpushed"):
        time.sleep(3600)
    if kind == "stops" and attempt.epoch == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    raise SystemExit(main())
