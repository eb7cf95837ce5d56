"""Committed steps that are taken back: their numbers are made again, their versions never."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from tests.unit.run_inputs import sample_rows, step_outcome, step_record, write_checkpoint
from tether.errors import FailedPreconditionError, InternalError, InvalidArgumentError
from tether_services.orchestrator.alarms import RollbackDueError
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import Attempt, CheckpointRow, RunState, StepNumbers
from tether_services.runtime import history


def commit(ledger: Ledger, attempt: Attempt, *, checkpoint: bool = True, pushed: bool = True) -> int:
    """Commit the next step as the loop does and return the version that it made."""
    numbers = ledger.next_step(attempt.run_id)
    step, version = numbers.step, numbers.new_version
    ledger.record_samples(attempt, step, sample_rows(4, dropped=1, version=numbers.policy_version))
    row = write_checkpoint(attempt.directory, version, attempt.epoch) if checkpoint else None
    record = replace(step_record(step), policy_version=numbers.policy_version)
    ledger.commit_step(attempt, record, replace(step_outcome(step, trained=3, dropped=1), checkpoint=row))
    if pushed:
        ledger.record_push(attempt, version, {})
    return version


def begin(folder: Path, *, steps: int, total_steps: int = 10) -> tuple[Ledger, Attempt]:
    """Return a ledger with a run of so many committed steps."""
    ledger = Ledger(folder)
    attempt = ledger.create_run("demo", config_toml="x = 1", total_steps=total_steps)
    for _ in range(steps):
        commit(ledger, attempt)
    return ledger, attempt


def fail(ledger: Ledger, attempt: Attempt) -> None:
    ledger.finish(attempt, RunState.FAILED, error="killed")


def query(folder: Path, text: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        return connection.execute(text).fetchall()


def test_a_run_that_has_ended_is_rolled_back_at_once_and_stays_ended(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    fail(ledger, attempt)
    run = ledger.request_rollback("demo", to_step=1)
    assert (run.state, run.num_committed_steps, run.branch, run.rollback_to) == (RunState.FAILED, 1, 1, None)
    assert [step.step for step in ledger.list_steps("demo")] == [0]
    (rollback,) = ledger.list_rollbacks("demo")
    assert (rollback.branch, rollback.from_step, rollback.to_step, rollback.reason) == (1, 3, 1, "RollbackRun")


def test_without_a_number_the_last_step_is_taken_back(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    fail(ledger, attempt)
    assert ledger.request_rollback("demo").num_committed_steps == 2


def test_steps_are_made_again_under_new_versions(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    fail(ledger, attempt)
    ledger.request_rollback("demo", to_step=1)
    assert ledger.next_step("demo") == StepNumbers(1, 1, 4, 1)
    second = ledger.begin_attempt("demo")
    assert [commit(ledger, second), commit(ledger, second)] == [4, 5]
    assert [(s.step, s.policy_version, s.new_version) for s in ledger.list_states("demo")] == [
        (0, 0, 1),
        (1, 1, 4),
        (2, 4, 5),
    ]
    assert [(s.step, s.new_version) for s in ledger.list_steps("demo")] == [(0, 1), (1, 4), (2, 5)]


def test_a_version_is_never_used_again_however_often_a_run_is_rolled_back(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=2)
    made = [1, 2]
    for _ in range(3):
        fail(ledger, attempt)
        attempt = ledger.begin_attempt("demo", from_step=0)
        made += [commit(ledger, attempt), commit(ledger, attempt)]
    assert made == sorted(set(made))
    assert query(tmp_path, "SELECT COUNT(*) FROM rolled_back_steps") == [(6,)]
    assert [rollback.branch for rollback in ledger.list_rollbacks("demo")] == [1, 2, 3]


def test_the_rows_that_were_taken_back_are_kept_as_they_were(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=2)
    columns = "step, epoch, policy_version, new_version, adapter_sha256, trained, dropped, metrics, commit_time"
    (before,) = query(tmp_path, f"SELECT {columns} FROM steps WHERE step = 1")
    fail(ledger, attempt)
    ledger.request_rollback("demo")
    assert query(tmp_path, f"SELECT {columns}, branch FROM rolled_back_steps") == [(*before, 1)]


def test_samples_checkpoints_and_pushes_of_rolled_back_steps_do_not_count(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=1)
    commit(ledger, attempt, pushed=False)
    fail(ledger, attempt)
    assert ledger.has_open_push("demo")
    ledger.request_rollback("demo")
    assert ledger.count_samples("demo") == {"trained": 3, "abandoned": 3, "dropped": 2}
    assert query(tmp_path, "SELECT DISTINCT step, reason FROM samples WHERE state = 'abandoned'") == [
        (1, "rolled_back")
    ]
    assert query(tmp_path, "SELECT version, state FROM checkpoints") == [(1, "durable"), (2, "removed")]
    assert query(tmp_path, "SELECT version, state FROM pushes") == [(1, "active"), (2, "rolled_back")]
    assert not ledger.has_open_push("demo")


def test_a_step_that_is_made_again_trains_on_samples_of_its_own(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=2)
    fail(ledger, attempt)
    commit(ledger, ledger.begin_attempt("demo", from_step=1))
    trained = query(tmp_path, "SELECT step, sample, epoch FROM samples WHERE state = 'trained' AND step = 1")
    assert trained == [(1, sample, 2) for sample in range(3)]


def test_a_run_can_begin_anew(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=2)
    fail(ledger, attempt)
    ledger.begin_attempt("demo", from_step=0)
    assert ledger.next_step("demo") == StepNumbers(0, 0, 3, 1)
    assert ledger.last_commit("demo") is None


def test_a_step_without_its_checkpoint_is_refused_with_the_steps_that_can_be_had(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=4)
    ledger.retain_checkpoints(attempt, count=2)
    fail(ledger, attempt)
    for act in (
        lambda: ledger.request_rollback("demo", to_step=2),
        lambda: ledger.begin_attempt("demo", from_step=2),
    ):
        with pytest.raises(FailedPreconditionError, match="0, 3, 4") as caught:
            act()
        assert caught.value.reason == "CHECKPOINT_REMOVED"
    assert ledger.list_ways_back("demo") == [0, 3, 4]
    assert ledger.request_rollback("demo", to_step=3).num_committed_steps == 3


@pytest.mark.parametrize("to_step", [-1, 2, 3])
def test_steps_that_the_run_does_not_have_are_refused(tmp_path: Path, to_step: int) -> None:
    ledger, attempt = begin(tmp_path, steps=2)
    fail(ledger, attempt)
    with pytest.raises(InvalidArgumentError) as caught:
        ledger.request_rollback("demo", to_step=to_step)
    assert caught.value.violations[0].field == "to_step"
    assert ledger.get_run("demo").num_committed_steps == 2


def test_a_run_without_steps_has_nothing_to_take_back(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=0)
    fail(ledger, attempt)
    with pytest.raises(InvalidArgumentError, match="0 committed steps"):
        ledger.request_rollback("demo")


def test_a_run_that_has_succeeded_is_not_rolled_back(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=2)
    ledger.finish(attempt, RunState.SUCCEEDED)
    with pytest.raises(FailedPreconditionError) as caught:
        ledger.request_rollback("demo")
    assert caught.value.reason == "RUN_ENDED"


def test_resuming_from_the_last_step_takes_nothing_back(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=2)
    fail(ledger, attempt)
    ledger.begin_attempt("demo", from_step=2)
    assert (ledger.get_run("demo").branch, ledger.list_rollbacks("demo")) == (0, [])


def test_a_rollback_of_an_active_run_waits_for_its_worker_to_stop(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    run = ledger.request_rollback("demo", to_step=2)
    assert (run.num_committed_steps, run.branch, run.rollback_to) == (3, 0, 2)
    commit(ledger, attempt)
    following = ledger.restart_attempt(attempt, reason="it was asked for", max_restarts=0)
    assert following is not None and following.epoch == 2
    run = ledger.get_run("demo")
    assert (run.num_committed_steps, run.branch, run.rollback_to) == (2, 1, None)
    (rollback,) = ledger.list_rollbacks("demo")
    assert (rollback.from_step, rollback.to_step) == (4, 2)


def test_a_rollback_is_no_restart(tmp_path: Path) -> None:
    """With `max_restarts` = 0 a crash ends the run; a rollback does not, and does not use up a crash either."""
    ledger, attempt = begin(tmp_path, steps=3)
    for _ in range(2):
        ledger.request_rollback("demo")
        following = ledger.restart_attempt(attempt, reason="it was asked for", max_restarts=0)
        assert following is not None
        attempt = following
    assert ledger.restart_attempt(attempt, reason="it died", max_restarts=0) is None
    assert ledger.get_run("demo").error == "it died"


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELLED])
def test_a_run_that_ends_before_it_is_rolled_back_is_rolled_back_then(tmp_path: Path, state: RunState) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    ledger.request_rollback("demo", to_step=1)
    ledger.finish(attempt, state)
    run = ledger.get_run("demo")
    assert (run.state, run.num_committed_steps, run.rollback_to) == (state, 1, None)


def test_a_cancelled_run_whose_worker_died_is_rolled_back_as_asked(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    ledger.request_rollback("demo", to_step=1)
    ledger.request_cancel("demo")
    assert ledger.restart_attempt(attempt, reason="it died", max_restarts=5) is None
    assert (ledger.get_run("demo").state, ledger.get_run("demo").num_committed_steps) == (RunState.CANCELLED, 1)


def test_a_rollback_asked_for_in_the_last_moments_is_not_lost(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3, total_steps=3)
    ledger.request_rollback("demo")
    with pytest.raises(RollbackDueError):
        ledger.finish(attempt, RunState.SUCCEEDED)
    assert ledger.get_run("demo").state is RunState.PENDING, "nothing has changed"
    assert ledger.restart_attempt(attempt, reason="it was asked for", max_restarts=0) is not None
    assert ledger.get_run("demo").num_committed_steps == 2


def test_of_two_rollbacks_the_further_one_is_made(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    ledger.request_rollback("demo", to_step=1)
    ledger.request_rollback("demo", to_step=2)
    ledger.restart_attempt(attempt, reason="", max_restarts=0)
    assert ledger.get_run("demo").num_committed_steps == 1


def test_the_checkpoint_that_a_rollback_waits_for_is_kept(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    ledger.request_rollback("demo", to_step=1)
    commit(ledger, attempt)
    assert [row.version for row in ledger.retain_checkpoints(attempt, count=1)] == [4, 1]


def test_checkpoints_that_alarms_go_back_to_outlive_their_age(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=4)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE checkpoints SET create_time = 0")
    assert [row.version for row in ledger.retain_checkpoints(attempt, count=3, hours=1.0, at_least=2)] == [4, 3]


def test_a_repeated_request_takes_nothing_back_twice(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    fail(ledger, attempt)
    request_id = str(uuid4())
    first = ledger.request_rollback("demo", request_id=request_id)
    assert ledger.request_rollback("demo", request_id=request_id) == first
    assert ledger.get_run("demo").num_committed_steps == 2
    with pytest.raises(InvalidArgumentError) as caught:
        ledger.request_cancel("demo", request_id=request_id)
    assert caught.value.reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("name", ["weights.safetensors", "optimiser.safetensors", "state.json"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_nothing_is_taken_back_for_a_checkpoint_that_cannot_be_loaded(tmp_path: Path, name: str, is_gone: bool) -> None:
    ledger, attempt = begin(tmp_path, steps=4)
    file = tmp_path / "demo" / "checkpoints" / "000002-e1" / name
    if is_gone:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    refused: list[Callable[[], object]] = [
        lambda: ledger.request_rollback("demo", to_step=2),
        lambda: ledger.ask_rollback(attempt, to_step=2, reason="kl_max", most=3),
        lambda: ledger.begin_attempt("demo", from_step=2),
    ]
    for number, act in enumerate(refused):
        if number == 2:
            fail(ledger, attempt)
        with pytest.raises(FailedPreconditionError, match=r"go back to 0, 1, 3, 4 \(0") as caught:
            act()
        assert caught.value.reason == "CHECKPOINT_DAMAGED"
    run = ledger.get_run("demo")
    assert (run.num_committed_steps, run.branch, run.rollback_to, run.epoch) == (4, 0, None, 1)
    assert query(tmp_path, "SELECT DISTINCT state FROM checkpoints") == [("durable",)]
    assert ledger.request_rollback("demo", to_step=1).num_committed_steps == 1


def test_the_id_of_a_request_stands_for_the_steps_that_it_named(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=4)
    fail(ledger, attempt)
    ids = [str(uuid4()), str(uuid4()), str(uuid4())]
    answer = ledger.request_rollback("demo", to_step=3, request_id=ids[0])
    assert ledger.request_rollback("demo", to_step=3, request_id=ids[0]) == answer
    ledger.request_rollback("demo", request_id=ids[1])
    ledger.begin_attempt("demo", from_step=2, request_id=ids[2])
    assert ledger.find_answer(ids[2], method="ResumeRun", run_id="demo", argument=2) is not None
    others: list[Callable[[], object]] = [
        lambda: ledger.request_rollback("demo", to_step=1, request_id=ids[0]),
        lambda: ledger.request_rollback("demo", request_id=ids[0]),
        lambda: ledger.request_rollback("demo", to_step=2, request_id=ids[1]),
        lambda: ledger.find_answer(ids[2], method="ResumeRun", run_id="demo", argument=1),
        lambda: ledger.find_answer(ids[2], method="ResumeRun", run_id="demo"),
    ]
    for act in others:
        with pytest.raises(InvalidArgumentError) as caught:
            act()
        assert caught.value.reason == "REQUEST_ID_REUSED"
    assert ledger.get_run("demo").num_committed_steps == 2


def test_alarms_roll_back_a_limited_number_of_times_between_two_starts_by_hand(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=3)
    for _ in range(2):
        ledger.ask_rollback(attempt, to_step=1, reason="kl_max", most=2)
        following = ledger.restart_attempt(attempt, reason="", max_restarts=0)
        assert following is not None
        attempt = following
        commit(ledger, attempt)
    with pytest.raises(FailedPreconditionError, match="2 times already") as caught:
        ledger.ask_rollback(attempt, to_step=1, reason="kl_max", most=2)
    assert caught.value.reason == "ALARM"
    fail(ledger, attempt)
    again = ledger.begin_attempt("demo", by_hand=False)
    with pytest.raises(FailedPreconditionError, match="2 times already"):
        ledger.ask_rollback(again, to_step=1, reason="kl_max", most=2)
    fail(ledger, again)
    ledger.ask_rollback(ledger.begin_attempt("demo"), to_step=1, reason="kl_max", most=2)


def test_an_alarm_without_a_committed_step_to_take_back_is_not_answered_by_the_same_step(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=0)
    with pytest.raises(FailedPreconditionError, match="no committed step could be taken back") as caught:
        ledger.ask_rollback(attempt, to_step=0, reason="kl_max", most=3)
    assert caught.value.reason == "ALARM"
    assert ledger.get_run("demo").rollback_to is None


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=1)
    ledger.record_samples(attempt, 1, sample_rows(4))
    outcome = replace(step_outcome(1), checkpoint=CheckpointRow(1, "checkpoints/000001-e1", "c" * 64, 10))
    with pytest.raises(InternalError, match="makes version 2, its checkpoint is of 1"):
        ledger.commit_step(attempt, step_record(1), outcome)


def test_version_0_is_recorded_as_in_use_when_a_run_begins_anew(tmp_path: Path) -> None:
    ledger, attempt = begin(tmp_path, steps=2)
    fail(ledger, attempt)
    second = ledger.begin_attempt("demo", from_step=0)
    assert ledger.get_run("demo").policy_version == 2, "what the generator serves until the next attempt is there"
    ledger.record_push(second, 0, {})
    assert ledger.get_run("demo").policy_version == 0


def test_a_rollback_is_in_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_path", str(tmp_path / "history.jsonl"))
    monkeypatch.setattr(history, "_file", None)
    ledger, attempt = begin(tmp_path, steps=3)
    ledger.request_rollback("demo", to_step=2)
    ledger.restart_attempt(attempt, reason="", max_restarts=0)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["run"], line["branch"], line["to_step"]) for line in lines] == [
        ("rolled_back", "demo", 1, 2)
    ]


def test_old_samples_go_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether_services.orchestrator.ledger_steps.KEPT_SAMPLES", 8)
    begin(tmp_path, steps=5)
    assert query(tmp_path, "SELECT DISTINCT step FROM samples") == [(3,), (4,)]
