"""What belongs to a committed step: its samples, trained on once, its checkpoint, and the push that follows it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.run_inputs import sample_rows, step_outcome, step_record
from tether.errors import AbortedError, FailedPreconditionError, InternalError
from tether_services.orchestrator import ledger_steps
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.records import (
    Attempt,
    CheckpointRow,
    RunIdentity,
    RunState,
    SampleCounts,
    SampleRow,
    StepOutcome,
)

IDENTITY = RunIdentity("ba5e", "4e3a4d", "94093")


def new_run(ledger: Ledger, *, total_steps: int = 5) -> Attempt:
    return ledger.create_run("demo", config_toml="x = 1", total_steps=total_steps)


def commit(ledger: Ledger, attempt: Attempt, step: int, *, dropped: int = 0, checkpoint: bool = True) -> None:
    """Commit a step of four samples as the loop does."""
    ledger.record_samples(attempt, step, sample_rows(4, dropped=dropped, version=step))
    row = CheckpointRow(step + 1, f"checkpoints/{step + 1:06d}-e{attempt.epoch}", "c" * 64, 10) if checkpoint else None
    outcome = replace(step_outcome(step, trained=4 - dropped, dropped=dropped), checkpoint=row)
    ledger.commit_step(attempt, step_record(step), outcome)


def states(folder: Path) -> list[tuple[int, int, int, str]]:
    """Return (step, sample, epoch, state) of every sample in the file."""
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        query = "SELECT step, sample, epoch, state FROM samples ORDER BY step, epoch, sample"
        return connection.execute(query).fetchall()


def test_samples_are_in_flight_until_their_step_is_committed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    ledger.record_samples(attempt, 0, sample_rows(4, dropped=1))
    assert ledger.count_samples("demo") == {"generated": 3, "dropped": 1}
    ledger.commit_step(attempt, step_record(0), step_outcome(0, trained=3, dropped=1))
    assert ledger.count_samples("demo") == {"trained": 3, "dropped": 1}


def test_a_step_is_listed_with_all_that_it_left_behind(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    commit(ledger, new_run(ledger), 0, dropped=1)
    (state,) = ledger.list_states("demo")
    assert (state.step, state.policy_version, state.epoch) == (0, 0, 1)
    assert state.adapter_sha256 == f"{1:064x}"
    assert state.samples == SampleCounts(4, 4, 3, {"not_scored": 1})
    assert state.checkpoint == CheckpointRow(1, "checkpoints/000001-e1", "c" * 64, 10)
    assert ledger.last_commit("demo") == state


def test_a_run_without_steps_has_no_last_commit(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    new_run(ledger)
    assert ledger.last_commit("demo") is None


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        (sample_rows(4), SampleCounts(4, 4, 3, {})),
        (sample_rows(3), SampleCounts(4, 4, 4, {})),
        (sample_rows(4, dropped=1), SampleCounts(4, 4, 4, {})),
        (sample_rows(4, dropped=1), SampleCounts(4, 5, 3, {"not_scored": 1})),
        ([], SampleCounts(4, 4, 4, {})),
    ],
)
def test_a_step_whose_samples_do_not_add_up_is_not_committed(
    tmp_path: Path, rows: Sequence[SampleRow], counts: SampleCounts
) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    ledger.record_samples(attempt, 0, rows)
    with pytest.raises(InternalError) as caught:
        ledger.commit_step(attempt, step_record(0), StepOutcome(samples=counts))
    assert caught.value.reason == "SAMPLES_UNACCOUNTED"
    assert ledger.list_steps("demo") == []
    assert "trained" not in ledger.count_samples("demo")


def test_samples_of_an_attempt_that_ended_are_abandoned_and_made_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = new_run(ledger)
    commit(ledger, first, 0)
    ledger.record_samples(first, 1, sample_rows(4, dropped=1))
    ledger.finish(first, RunState.FAILED, error="killed")
    second = ledger.begin_attempt("demo")
    assert ledger.count_samples("demo") == {"trained": 4, "abandoned": 4}
    commit(ledger, second, 1)
    assert ledger.count_samples("demo") == {"trained": 8, "abandoned": 4}
    trained = [(step, sample) for step, sample, _, state in states(tmp_path) if state == "trained"]
    assert len(trained) == len(set(trained)) == 8


def test_what_the_failed_tries_of_a_step_had_generated_is_abandoned_and_named_by_the_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = new_run(ledger)
    ledger.record_abandoned(first, 0, [replace(row, sample=row.sample + 4) for row in sample_rows(3, dropped=1)])
    ledger.record_samples(first, 0, sample_rows(4))
    ledger.finish(first, RunState.FAILED, error="killed")
    commit(ledger, ledger.begin_attempt("demo"), 0)
    assert ledger.count_samples("demo") == {"trained": 4, "abandoned": 7}
    assert ledger.list_steps("demo")[0].metrics["samples_abandoned"] == 7
    assert ledger.count_unaccounted("demo", first_step=0, end_step=1) == 0


def test_an_abandoned_sample_is_counted_by_one_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    for step, number in ((0, 2), (1, 0), (2, 1)):
        ledger.record_abandoned(attempt, step, [replace(row, sample=row.sample + 4) for row in sample_rows(number)])
        commit(ledger, attempt, step)
    assert [step.metrics["samples_abandoned"] for step in ledger.list_steps("demo")] == [2, 0, 1]


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        ("DELETE FROM samples WHERE step = 1 AND sample < 2", 2),
        ("UPDATE samples SET state = 'generated' WHERE step = 0 AND sample = 3", 2),
        ("UPDATE samples SET state = 'abandoned' WHERE step = 2 AND sample = 0", 1),
        ("UPDATE steps SET generated = 5 WHERE step = 1", 1),
        ("UPDATE samples SET epoch = 7 WHERE step = 1 AND sample = 1", 1),
    ],
)
def test_i1_a_sample_that_is_in_no_state_or_a_wrong_one_is_counted(tmp_path: Path, harm: str, expected: int) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    for step in range(3):
        commit(ledger, attempt, step)
    ledger.record_samples(attempt, 3, sample_rows(4))  # in flight
    assert ledger.count_unaccounted("demo", first_step=0, end_step=3) == 0
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute(harm)
    connection.close()
    assert ledger.count_unaccounted("demo", first_step=0, end_step=3) == expected


def test_the_file_refuses_to_train_on_a_sample_twice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    commit(ledger, new_run(ledger), 0)
    with (
        sqlite3.connect(tmp_path / "ledger.sqlite") as connection,
        pytest.raises(sqlite3.IntegrityError, match="UNIQUE"),
    ):
        connection.execute(
            "INSERT INTO samples SELECT run_id, step, sample, 2, prompt_sha256, policy_version, adapter_sha256, tokens,"
            " state, reason FROM samples"
        )


def test_without_the_index_a_sample_could_be_trained_on_twice(tmp_path: Path) -> None:
    """The control of the test above."""
    ledger = Ledger(tmp_path)
    commit(ledger, new_run(ledger), 0)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("DROP INDEX trained_once")
        connection.execute(
            "INSERT INTO samples SELECT run_id, step, sample, 2, prompt_sha256, policy_version, adapter_sha256, tokens,"
            " state, reason FROM samples"
        )
    assert ledger.count_samples("demo") == {"trained": 8}


def test_a_rollout_is_recorded_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    ledger.record_samples(attempt, 0, sample_rows(2))
    with pytest.raises(AbortedError) as caught:
        ledger.record_samples(attempt, 0, sample_rows(2))
    assert caught.value.reason == "LEDGER_CONFLICT"
    assert ledger.count_samples("demo") == {"generated": 2}


def test_samples_of_old_steps_go_and_their_counts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_steps, "KEPT_SAMPLES", 8)
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    for step in range(5):
        commit(ledger, attempt, step)
    assert {step for step, *_ in states(tmp_path)} == {3, 4}
    assert sum(state.samples.trained for state in ledger.list_states("demo")) == 20


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    for step in range(4):
        commit(ledger, attempt, step)
    assert [row.version for row in ledger.retain_checkpoints(attempt, count=2)] == [4, 3]
    kept = [state.checkpoint.version for state in ledger.list_states("demo") if state.checkpoint]
    assert kept == [3, 4]
    assert [row.version for row in ledger.retain_checkpoints(attempt, count=4)] == [4, 3], "what is gone stays gone"


def test_old_checkpoints_go_but_never_the_newest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    for step in range(3):
        commit(ledger, attempt, step)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE checkpoints SET create_time = create_time - 7200 WHERE version IN (1, 3)")
    assert [row.version for row in ledger.retain_checkpoints(attempt, count=5, hours=1.0)] == [3, 2]


def test_a_push_adds_its_figures_to_its_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    commit(ledger, attempt, 0)
    before = ledger.list_steps("demo")[0].metrics
    ledger.record_push(attempt, 1, {"push_seconds": 7.25})
    assert ledger.list_steps("demo")[0].metrics == dict(before) | {"push_seconds": 7.25}


def test_a_step_whose_push_is_open_can_be_left_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    commit(ledger, attempt, 0)
    ledger.record_push(attempt, 1, {})
    commit(ledger, attempt, 1)
    assert [step.step for step in ledger.list_steps("demo")] == [0, 1]
    assert [step.step for step in ledger.list_steps("demo", pushed_only=True)] == [0]


def test_a_push_of_a_version_that_nobody_committed_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    with pytest.raises(AbortedError) as caught:
        ledger.record_push(attempt, 1, {})
    assert caught.value.reason == "PUSH_NOT_COMMITTED"
    assert ledger.get_run("demo").policy_version == 0


def test_a_stale_writer_records_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    old = new_run(ledger)
    commit(ledger, old, 0)
    ledger.finish(old, RunState.FAILED)
    ledger.begin_attempt("demo")
    acts = (
        lambda: ledger.record_samples(old, 1, sample_rows(1)),
        lambda: ledger.record_push(old, 1, {}),
        lambda: ledger.retain_checkpoints(old, count=1),
        lambda: ledger.pin_identity(old, IDENTITY),
    )
    for act in acts:
        with pytest.raises(AbortedError) as caught:
            act()
        assert caught.value.reason == "STALE_EPOCH"


def test_the_same_identity_is_accepted_by_every_attempt(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = new_run(ledger)
    ledger.pin_identity(first, IDENTITY)
    ledger.finish(first, RunState.FAILED)
    ledger.pin_identity(ledger.begin_attempt("demo"), IDENTITY)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base_sha256": "other"}, "BASE_CHANGED"),
        ({"reward_sha256": "other"}, "REWARD_MODEL_CHANGED"),
        ({"prompts_sha256": "other"}, "PROMPTS_CHANGED"),
    ],
)
def test_another_identity_is_refused_with_both_hashes_and_the_way_out(
    tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    ledger = Ledger(tmp_path)
    first = new_run(ledger)
    ledger.pin_identity(first, IDENTITY)
    ledger.finish(first, RunState.FAILED)
    second = ledger.begin_attempt("demo")
    with pytest.raises(FailedPreconditionError) as caught:
        ledger.pin_identity(second, replace(IDENTITY, **change))
    assert caught.value.reason == reason
    pinned = getattr(IDENTITY, next(iter(change)))
    assert "other" in caught.value.message and pinned in caught.value.message
    assert "start a new run" in caught.value.message
    ledger.pin_identity(second, IDENTITY)
