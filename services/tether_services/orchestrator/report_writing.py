"""Gets the report of a run written whatever becomes of the disk, without a say in how the run has ended."""

from __future__ import annotations

import logging

from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import FINAL_STATES, RunRecord, RunState
from tether_services.orchestrator.run_files import RunFiles

__all__ = ["complete_reports", "try_to_report"]

log = logging.getLogger(__name__)


def try_to_report(ledger: Ledger, run_id: str, *, state: RunState, error: str) -> None:
    """Write the report of a run if that can be done; how the run has ended does not depend on it."""
    from tether_services.orchestrator.report import write_report  # draws with libraries that take long to load

    try:
        write_report(ledger, run_id, state=state, error=error)
    except Exception as failure:  # also a defect of the report: the run is over, and its end has to be recorded
        log.error("report not written: %s", run_id, exc_info=failure)


def complete_reports(ledger: Ledger) -> None:
    """Write the reports of ended runs that lack one of their end: the disk was full, or the worker was killed."""
    for run in ledger.list_runs():
        if run.state in FINAL_STATES and ledger.directory(run.run_id).is_dir() and not _is_reported(ledger, run):
            try_to_report(ledger, run.run_id, state=run.state, error=run.error)


def _is_reported(ledger: Ledger, run: RunRecord) -> bool:
    """Return whether the report of a run is of its latest attempt and end."""
    try:
        report = RunFiles(ledger.directory(run.run_id)).read_json("report.json")
    except (ValueError, OSError):
        return False
    return report is not None and (report.get("state"), report.get("attempts")) == (run.state.value, run.epoch)
