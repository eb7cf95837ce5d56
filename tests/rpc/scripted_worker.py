"""A worker that keeps the promises of the real one without training: it acts as its run's name tells it."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.unit.run_inputs import sample_rows, step_outcome, step_record, write_checkpoint
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.heartbeat import Heartbeat
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.progress import note_work
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.worker import ROLLED_BACK_EXIT_CODE, _parse

KEEPING = ("keeps", "alarms")


def main() -> int:
    """Take the lease as the real worker does, and act by the first word of the run's name."""
    known = _parse(None)
    settings = OrchestratorSettings.model_validate_json(known.settings)
    ledger = Ledger(Path(settings.state_dir))
    attempt = Attempt(known.run_id, known.epoch, ledger.directory(known.run_id))
    with (attempt.directory / "started.log").open("a") as file:
        file.write("x")
    if known.run_id.startswith("unborn") and known.epoch == 1:
        time.sleep(3600)
    lease = ledger.acquire_lease(attempt, seconds=settings.lease_seconds)
    with Heartbeat(ledger, lease, settings):
        ledger.mark_running(attempt)
        return run_steps(ledger, attempt)


def run_steps(ledger: Ledger, attempt: Attempt) -> int:
    """Commit steps by the first word of the run's name.

    steps, slow, dies (in its first attempt, as stops, sticks, unborn and lingers), crashes (in all), hangs, unpushed,
    works (a long step that gets on), keeps (slow, with checkpoints), alarms (the same, and its first attempt asks for a
    rollback after its third step).
    """
    run = ledger.get_run(attempt.run_id)
    kind = attempt.run_id.split("-")[0]
    if kind == "crashes" and run.num_committed_steps:
        return 9
    for step in range(run.num_committed_steps, run.num_total_steps):
        now = ledger.get_run(attempt.run_id)
        if now.cancel_requested:
            ledger.finish(attempt, RunState.CANCELLED)
            return 0
        if now.rollback_to is not None:
            return ROLLED_BACK_EXIT_CODE
        version = commit(ledger, attempt, step, with_checkpoint=kind in KEEPING)
        if kind != "unpushed":
            ledger.record_push(attempt, version, {})
        after_step(kind, attempt)
        if kind == "dies" and attempt.epoch == 1:
            print("RuntimeError: out of cheese", file=sys.stderr)
            return 9
        if kind == "crashes":
            return 9
    ledger.finish(attempt, RunState.SUCCEEDED)
    if kind == "lingers":
        time.sleep(3600)
    return 0


def commit(ledger: Ledger, attempt: Attempt, step: int, *, with_checkpoint: bool) -> int:
    """Commit a step and return the version that it made."""
    numbers = ledger.next_step(attempt.run_id)
    row = write_checkpoint(attempt.directory, numbers.new_version, attempt.epoch) if with_checkpoint else None
    ledger.record_samples(attempt, step, sample_rows(4, version=numbers.policy_version))
    record = replace(step_record(step), policy_version=numbers.policy_version)
    ledger.commit_step(attempt, record, replace(step_outcome(step), checkpoint=row))
    if step == 2 and attempt.epoch == 1 and attempt.run_id.startswith("alarms"):
        ledger.ask_rollback(attempt, to_step=1, reason="step 3, alarm kl_max: too far", most=1)
    return numbers.new_version


def after_step(kind: str, attempt: Attempt) -> None:
    """Do what this kind of worker does once it has committed."""
    if kind == "slow" or kind in KEEPING:
        time.sleep(0.1)
    if kind in ("hangs", "unpushed"):
        time.sleep(3600)
    if kind == "sticks" and attempt.epoch == 1:
        time.sleep(3600)
    for _ in range(35 if kind == "works" else 0):
        time.sleep(0.1)
        note_work()
    if kind == "stops" and attempt.epoch == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    raise SystemExit(main())
