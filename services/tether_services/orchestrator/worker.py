"""The process that trains: one attempt of one run, from the ledger's last committed step to its end.

Exit status 0: the end is in the ledger, whatever it is. Anything else: the service records the failure.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tether.errors import AbortedError, CancelledError, TetherError
from tether_services.orchestrator.alarms import RollbackDueError
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.heartbeat import Heartbeat
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.progress import note_work
from tether_services.orchestrator.records import FINAL_STATES, Attempt, RunState
from tether_services.orchestrator.report_writing import try_to_report
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.runtime.child import die_with_parent
from tether_services.runtime.durable import as_storage_error
from tether_services.runtime.fault_points import arm, reach
from tether_services.runtime.history import record
from tether_services.runtime.logging import log_event, setup_logging
from tether_services.runtime.threads import prepare_process

log = logging.getLogger(__name__)

FENCED_EXIT_CODE = 3
"""Another attempt has taken over; this one must write nothing."""
ROLLED_BACK_EXIT_CODE = 4
"""The run is to be rolled back, as the ledger says; another attempt follows."""
FENCED_REASONS = frozenset({"STALE_EPOCH", "LEASE_LOST", "LEASE_HELD"})
LEDGER_LEASES = 2.0
"""How long a transaction waits for another process, in `lease_seconds`: a step is worth a wait, but a worker that gives
no sign of life for three leases is ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one attempt and return the exit status."""
    known = _parse(arguments)
    die_with_parent(known.parent_pid)
    settings = OrchestratorSettings.model_validate_json(known.settings)
    prepare_process(settings.threads)
    setup_logging("orchestrator", settings.log_level)
    arm("worker", known.epoch)
    ledger = Ledger(Path(settings.state_dir), busy_seconds=LEDGER_LEASES * settings.lease_seconds)
    attempt = Attempt(known.run_id, known.epoch, ledger.directory(known.run_id))
    try:
        return asyncio.run(run_attempt(settings, ledger, attempt))
    except AbortedError as error:
        log_event(log, "fenced off", level=logging.ERROR, run_id=attempt.run_id, error=error.message)
        return FENCED_EXIT_CODE


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tether_services.orchestrator.worker", description=__doc__)
    parser.add_argument("--settings", required=True, help="OrchestratorSettings as JSON")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--epoch", required=True, type=int)
    parser.add_argument("--parent-pid", required=True, type=int)
    return parser.parse_args(arguments)


async def run_attempt(settings: OrchestratorSettings, ledger: Ledger, attempt: Attempt) -> int:
    """Train, write the report, record the end in the ledger, and return the exit status.

    Raises:
        AbortedError: This attempt is over: another one has begun, or the run has ended.
    """
    lease = await asyncio.to_thread(partial(ledger.acquire_lease, attempt, seconds=settings.lease_seconds))
    record("attempt", run=attempt.run_id, epoch=attempt.epoch)
    reach("lease.acquired")
    with Heartbeat(ledger, lease, settings) as heartbeat:
        await asyncio.to_thread(ledger.mark_running, attempt)
        try:
            state, error = await _run_to_end(settings, ledger, attempt, heartbeat.check)
            reach("run.steps_done")
            await asyncio.to_thread(_finish, ledger, attempt, state, error)
        except RollbackDueError as due:
            log_event(log, "rolls back", level=logging.WARNING, run_id=attempt.run_id, reason=str(due))
            return ROLLED_BACK_EXIT_CODE
    reach("run.reported")
    return 0


async def _run_to_end(
    settings: OrchestratorSettings, ledger: Ledger, attempt: Attempt, check_lease: Callable[[], None]
) -> tuple[RunState, str]:
    """Train and return the final state of the run and the reason of a failure.

    Raises:
        AbortedError: This attempt is over.
        RollbackDueError: The run is to be rolled back.
    """
    try:
        await _train(settings, ledger, attempt, check_lease)
        return RunState.SUCCEEDED, ""
    except RollbackDueError:
        raise
    except CancelledError:
        return RunState.CANCELLED, ""
    except TetherError as failure:
        if failure.reason in FENCED_REASONS and not _is_newest(ledger, attempt, failure):
            raise
        return RunState.FAILED, f"[{failure.reason}] {failure.message}{_way_out(failure, attempt)}"
    except Exception as failure:  # a defect must end the run with its name, not leave it RUNNING
        named = as_storage_error(failure, attempt.directory) if isinstance(failure, OSError) else None
        if named is not None:
            return RunState.FAILED, f"[{named.reason}] {named.message}"
        log.error("unforeseen error", exc_info=failure)
        return RunState.FAILED, f"[INTERNAL] {type(failure).__name__}: {failure}; worker.log has the details"


def _is_newest(ledger: Ledger, attempt: Attempt, failure: TetherError) -> bool:
    """Return whether it was not the ledger that called this attempt over, but the generator."""
    run = ledger.get_run(attempt.run_id)
    return failure.reason == "STALE_EPOCH" and run.epoch == attempt.epoch and run.state not in FINAL_STATES


def _way_out(failure: TetherError, attempt: Attempt) -> str:
    if failure.reason != "STALE_EPOCH":
        return ""
    return (
        f" The generator knows later attempts of a run {attempt.run_id!r}, of another state folder: choose another"
        " run_id, or stop the generator and remove this run from fence.json in its adapters.folder."
    )


async def _train(
    settings: OrchestratorSettings, ledger: Ledger, attempt: Attempt, check_lease: Callable[[], None]
) -> None:
    config = parse_run_config(ledger.get_run(attempt.run_id).config_toml)
    from tether_services.orchestrator.loop import run_training
    from tether_services.orchestrator.session import open_session

    note_work()  # loading the libraries can take long
    async with open_session(settings, config, ledger, attempt, check_lease=check_lease) as session:
        await run_training(session)


def _finish(ledger: Ledger, attempt: Attempt, state: RunState, error: str) -> None:
    """Write the report first: whoever sees a final state finds it, unless it could not be written.

    Raises:
        RollbackDueError: RollbackRun was called meanwhile; the next attempt writes the report again.
    """
    try_to_report(ledger, attempt.run_id, state=state, error=error)
    ledger.finish(attempt, state, error=error)
    level = logging.ERROR if state is RunState.FAILED else logging.INFO
    log_event(log, f"run {state.value.lower()}", level=level, run_id=attempt.run_id, error=error)


if __name__ == "__main__":
    raise SystemExit(main())
