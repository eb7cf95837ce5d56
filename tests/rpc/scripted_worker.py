"""A worker that keeps the promises of the real one without training: it acts as its run's name tells it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.unit.run_inputs import step_record
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.worker import _parse


def main() -> int:
    """Act by the first word of the run's name: steps, slow, dies, hangs."""
    known = _parse(None)
    settings = OrchestratorSettings.model_validate_json(known.settings)
    ledger = Ledger(Path(settings.state_dir))
    attempt = Attempt(known.run_id, known.epoch, ledger.directory(known.run_id))
    ledger.mark_running(attempt)
    run = ledger.get_run(known.run_id)
    kind = known.run_id.split("-")[0]
    for step in range(run.num_committed_steps, run.num_total_steps):
        if ledger.get_run(known.run_id).cancel_requested:
            ledger.finish(attempt, RunState.CANCELLED)
            return 0
        ledger.commit_step(attempt, step_record(step))
        if kind == "dies" and known.epoch == 1:
            print("RuntimeError: out of cheese", file=sys.stderr)
            return 9
        if kind == "slow":
            time.sleep(0.1)
        if kind == "hangs":
            time.sleep(3600)
    ledger.finish(attempt, RunState.SUCCEEDED)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
