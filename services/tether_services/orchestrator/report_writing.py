"""Gets the report of a run written whatever becomes of the disk, without a say in how the run has ended."""

from __future__ import annotations

import logging
import threading

from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import FINAL_STATES, RunRecord, RunState
from tether_services.orchestrator.run_files import RunFiles

__all__ = ["complete_report", "complete_reports", "try_to_report"]

log = logging.getLogger(__name__)

_completing = threading.Lock()
"""So that a report that takes long never replaces one that was begun later."""


def try_to_report(ledger: Ledger, run_id: str, *, state: RunState, error: str) -> None:
    """Write the report of a run if that can be done; how the run has ended does not depend on it."""
    from tether_services.orchestrator.report import write_report  # draws with libraries that take long to load

    try:
        write_report(ledger, run_id, state=state, error=error)
    except Exception as failure:  # also a defect of the report: the run is over, and its end has to be recorded
        log.error("report not written: %s", run_id, exc_info=failure)


def complete_reports(ledger: Ledger) -> None:
    """Write the reports of ended runs that lack one of their end, see `complete_report`."""
    for run in ledger.list_runs():
        if run.state in FINAL_STATES:
            complete_report(ledger, run.run_id)


def complete_report(ledger: Ledger, run_id: str) -> None:
    """Write the report of a run that has ended, if it has none of how it is now.

    The disk was full, the worker was killed, or steps were rolled back since.
    """
    with _completing:
        run = ledger.get_run(run_id)
        if run.state in FINAL_STATES and ledger.directory(run_id).is_dir() and not _is_reported(ledger, run):
            try_to_report(ledger, run_id, state=run.state, error=run.error)


def _is_reported(ledger: Ledger, run: RunRecord) -> bool:
    """Return whether the report of a run is of its latest attempt and end, and of the steps that stayed."""
    try:
        report = RunFiles(ledger.directory(run.run_id)).read_json("report.json")
    except (ValueError, OSError):
        return False
    if report is None:
        return False
    told = (report.get("state"), report.get("attempts"), len(report.get("rollbacks", ())))
    return told == (run.state.value, run.epoch, run.branch)
