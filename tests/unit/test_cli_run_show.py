"""`tether run show --steps`: a table that people read and JSON that programs read."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime

import pytest
from rich.console import Console

from tether import Rollback, Run, SampleCounts, StepState
from tether_services.cli.client_commands import run_table
from tether_services.cli.run_commands import as_json, steps_table

TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
RUN = Run("demo", "running", 2, 5, 2, "", TIME, None, "/runs/demo")


def state(step: int, *, dropped: int = 0, checkpoint: str = "") -> StepState:
    counts = SampleCounts(8, 8, 8 - dropped, {"not_scored": dropped} if dropped else {})
    return StepState(step, step, f"{step}" * 64, 1, counts, checkpoint, "c" * 64 if checkpoint else "", TIME, step + 2)


def shown(*steps: StepState) -> list[str]:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(steps_table(steps))
    return capture.get().splitlines()


def test_a_row_per_step_says_what_became_of_its_samples() -> None:
    heading, first, second, total = shown(state(1), state(2, dropped=3, checkpoint="checkpoints/000003-e1"))
    columns = ["step", "version", "makes", "attempt", "asked", "generated", "trained", "dropped"]
    assert heading.split()[:8] == columns
    assert first.split() == ["1", "1", "3", "1", "8", "8", "8", "0", "1" * 12, "-", "2026-01-02", "03:04:05"]
    assert "3 (not_scored 3)" in second and "checkpoints/000003-e1" in second
    assert total.split() == ["sum", "16", "16", "13", "3"]


def test_a_single_step_needs_no_sum() -> None:
    assert len(shown(state(0))) == 2


def test_a_run_without_steps_is_a_heading() -> None:
    assert len(shown()) == 1


def test_json_has_everything_in_plain_values() -> None:
    content = json.loads(json.dumps(as_json(RUN, [state(0, dropped=1)])))
    assert (content["run_id"], content["create_time"], content["end_time"]) == ("demo", TIME.isoformat(), None)
    (step,) = content["steps"]
    assert step["adapter_sha256"] == "0" * 64
    assert step["samples"] == {"asked": 8, "generated": 8, "trained": 7, "dropped": {"not_scored": 1}}
    assert step["commit_time"] == TIME.isoformat()


def test_rollbacks_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    run = dataclasses.replace(RUN, rollbacks=(Rollback(3, 1, "alarm kl_max: too far", TIME),))
    Console(width=160).print(run_table(run))
    assert "2026-01-02 03:04:05 UTC: from 3 to 1 steps (alarm kl_max: too far)" in capsys.readouterr().out
    (rollback,) = as_json(run, None)["rollbacks"]
    assert rollback == {"from_step": 3, "to_step": 1, "reason": "alarm kl_max: too far", "time": TIME.isoformat()}
    Console(width=160).print(run_table(RUN))
    assert "rollbacks" not in capsys.readouterr().out


def test_json_of_a_run_alone_has_no_steps() -> None:
    assert "steps" not in as_json(RUN, None)
