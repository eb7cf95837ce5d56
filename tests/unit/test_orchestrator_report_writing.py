"""How a run has ended does not depend on whether its report could be written; the report follows later."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_inputs import run_toml, sample_rows, step_outcome, step_record
from tests.unit.small_disk import run_on_disk
from tether.errors import CancelledError
from tether_services.orchestrator import report, worker
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, CheckpointRow, RunState
from tether_services.orchestrator.report_writing import complete_report, complete_reports, try_to_report

ON_A_FULL_DISK = """
import asyncio, sys
from pathlib import Path
from tests.unit.run_inputs import run_toml
from tether_services.orchestrator import worker
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.report_writing import complete_reports

disk = Path(sys.argv[1])
ballast = disk / "ballast"
ledger = Ledger(disk)
attempt = ledger.create_run("demo", config_toml=run_toml(Path(sys.argv[2])), total_steps=3)
attempt.directory.mkdir()

async def train(*given):
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(65536)):
                pass
        except OSError:
            return

worker._train = train
code = asyncio.run(worker.run_attempt(OrchestratorSettings(), ledger, attempt))
page = attempt.directory / "report.html"
print(code, ledger.get_run("demo").state.value, page.exists())
ballast.unlink()
complete_reports(ledger)
print(page.exists())
"""


def test_a_run_that_succeeded_on_a_disk_that_is_full_at_its_end_has_succeeded(tmp_path: Path) -> None:
    output = run_on_disk(tmp_path / "disk", ON_A_FULL_DISK, str(tmp_path), options="size=4m")
    assert output.split("\n")[-3:-1] == ["0 SUCCEEDED False", "True"]


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.CANCELLED])
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyError("a defect")])
def test_a_report_that_fails_changes_nothing_and_is_written_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: RunState, failure: Exception
) -> None:
    async def train(*given: Any) -> None:
        if state is RunState.CANCELLED:
            raise CancelledError("CancelRun was called.")

    def fail(*given: Any, **named: Any) -> None:
        raise failure

    ledger, attempt = new_attempt(tmp_path)
    monkeypatch.setattr(worker, "_train", train)
    with monkeypatch.context() as broken:
        broken.setattr(report, "write_report", fail)
        assert asyncio.run(worker.run_attempt(OrchestratorSettings(), ledger, attempt)) == 0
    run = ledger.get_run("demo")
    assert (run.state, run.error) == (state, "")
    complete_reports(ledger)
    assert json.loads((attempt.directory / "report.json").read_text())["state"] == state.value


def test_the_report_of_an_earlier_end_is_replaced_and_one_that_is_right_is_left_alone(tmp_path: Path) -> None:
    ledger, attempt = new_attempt(tmp_path)
    path = attempt.directory / "report.json"
    ledger.finish(attempt, RunState.FAILED, error="killed too often")
    complete_reports(ledger)
    assert json.loads(path.read_text())["error"] == "killed too often"
    written = path.stat().st_mtime_ns
    complete_reports(ledger)
    assert path.stat().st_mtime_ns == written
    ledger.finish(ledger.begin_attempt("demo"), RunState.FAILED, error="again")
    complete_reports(ledger)
    assert json.loads(path.read_text())["error"] == "again"


def test_the_report_of_a_run_that_was_rolled_back_is_replaced(tmp_path: Path) -> None:
    ledger, attempt = new_attempt(tmp_path)
    commit_steps(ledger, attempt, 2)
    try_to_report(ledger, "demo", state=RunState.CANCELLED, error="")
    ledger.finish(attempt, RunState.CANCELLED)
    ledger.request_rollback("demo", to_step=0)
    complete_reports(ledger)
    assert steps_and_rollbacks(attempt) == (0, 1)


def test_the_report_of_a_worker_that_failed_before_its_rollback_is_replaced(tmp_path: Path) -> None:
    ledger, attempt = new_attempt(tmp_path)
    commit_steps(ledger, attempt, 2)
    ledger.request_rollback("demo", to_step=0)
    try_to_report(ledger, "demo", state=RunState.FAILED, error="boom")
    ledger.finish(attempt, RunState.FAILED, error="boom")
    assert steps_and_rollbacks(attempt) == (2, 0)
    complete_report(ledger, "demo")
    assert steps_and_rollbacks(attempt) == (0, 1)


def test_a_run_that_was_resumed_since_the_runs_were_listed_gets_no_report_of_its_old_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, attempt = new_attempt(tmp_path)
    ledger.finish(attempt, RunState.FAILED, error="old")
    listed = ledger.list_runs()
    ledger.begin_attempt("demo")
    monkeypatch.setattr(ledger, "list_runs", lambda: listed)
    complete_reports(ledger)
    assert list(attempt.directory.iterdir()) == []


def commit_steps(ledger: Ledger, attempt: Attempt, count: int) -> None:
    for number in range(count):
        checkpoint = CheckpointRow(number + 1, f"checkpoints/{number + 1:06d}-e1", "c" * 64, 10)
        ledger.record_samples(attempt, number, sample_rows(4, version=number))
        ledger.commit_step(attempt, step_record(number), replace(step_outcome(number), checkpoint=checkpoint))


def steps_and_rollbacks(attempt: Attempt) -> tuple[int, int]:
    content = json.loads((attempt.directory / "report.json").read_text())
    return len(content["steps"]), len(content["rollbacks"])


def test_a_run_that_goes_on_or_whose_folder_was_removed_gets_no_report(tmp_path: Path) -> None:
    ledger, attempt = new_attempt(tmp_path)
    complete_reports(ledger)
    assert list(attempt.directory.iterdir()) == []
    ledger.finish(attempt, RunState.FAILED)
    attempt.directory.rmdir()
    complete_reports(ledger)
    assert not attempt.directory.exists()


def new_attempt(folder: Path) -> tuple[Ledger, Attempt]:
    ledger = Ledger(folder / "runs")
    attempt = ledger.create_run("demo", config_toml=run_toml(folder), total_steps=3)
    attempt.directory.mkdir()
    return ledger, attempt
