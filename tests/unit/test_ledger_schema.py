"""Files of the versions before: nothing of them is lost, and the run in them goes on."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest

from tests.unit.run_inputs import sample_rows, step_outcome, step_record, write_checkpoint
from tether.errors import FailedPreconditionError
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.ledger_schema import FROM_1_TO_2, SCHEMA_VERSION, VERSION_1
from tether_services.orchestrator.records import RunState, SampleCounts, StepNumbers


def write_version_1(folder: Path, *, steps: int = 3, checkpoints: tuple[int, ...] = (2, 3)) -> None:
    """Write a failed run as the program of version 1 did, with the checkpoints that it would have kept."""
    folder.mkdir(exist_ok=True)
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for statement in VERSION_1:
            connection.execute(statement)
        connection.execute(
            "INSERT INTO runs (run_id, state, epoch, total_steps, policy_version, error, create_time, end_time,"
            " config_toml) VALUES ('old', 'FAILED', 2, 5, ?, 'killed', 1.5, 2.5, 'x = 1')",
            (steps,),
        )
        for step in range(steps):
            metrics = dict(step_record(step, dropped_not_scored=1.0, samples_trained=3.0, samples_dropped=1.0).metrics)
            connection.execute(
                "INSERT INTO steps VALUES ('old', ?, 2, ?, ?, '{}', 1.75)", (step, step, json.dumps(metrics))
            )
    connection.close()
    for version in checkpoints:
        checkpoint = folder / "old" / "checkpoints" / f"{version:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(f'{{"version": {version}}}')


def version_of(folder: Path) -> int:
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_a_new_file_says_its_version(tmp_path: Path) -> None:
    Ledger(tmp_path)
    assert version_of(tmp_path) == SCHEMA_VERSION == 3


def test_runs_and_steps_of_version_1_are_read_as_they_were(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    assert version_of(tmp_path) == 0
    ledger = Ledger(tmp_path)
    run = ledger.get_run("old")
    assert (run.state, run.epoch, run.num_committed_steps, run.policy_version) == (RunState.FAILED, 2, 3, 3)
    assert (run.error, run.create_time, run.end_time, run.config_toml) == ("killed", 1.5, 2.5, "x = 1")
    assert [(s.step, s.policy_version, s.commit_time) for s in ledger.list_steps("old")] == [
        (n, n, 1.75) for n in range(3)
    ]
    assert len(ledger.list_steps("old", pushed_only=True)) == 3
    assert not ledger.has_open_push("old")
    assert version_of(tmp_path) == 3


def test_counts_and_checkpoints_of_version_1_are_taken_over(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    states = Ledger(tmp_path).list_states("old")
    assert [state.samples for state in states] == [SampleCounts(4, 4, 3, {"not_scored": 1})] * 3
    assert states[0].checkpoint is None, "its folder is not there any more"
    assert [s.checkpoint.path for s in states[1:] if s.checkpoint] == ["checkpoints/000002", "checkpoints/000003"]
    newest = states[2].checkpoint
    assert newest is not None and newest.sha256 == hashlib.sha256(b'{"version": 3}').hexdigest()


def test_a_run_of_version_1_goes_on(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    ledger = Ledger(tmp_path)
    attempt = ledger.begin_attempt("old")
    assert attempt.epoch == 3
    ledger.record_samples(attempt, 3, sample_rows(4))
    ledger.commit_step(attempt, step_record(3), step_outcome(3))
    ledger.record_push(attempt, 4, {})
    assert ledger.get_run("old").num_committed_steps == 4


def test_opening_twice_changes_nothing(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    first = Ledger(tmp_path)
    before = (first.get_run("old"), first.list_states("old"))
    again = Ledger(tmp_path)
    assert (again.get_run("old"), again.list_states("old")) == before


def test_a_migration_that_is_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version_1(tmp_path)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tether_services.orchestrator.ledger_schema._adopt_counts", fail)
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path)
    assert version_of(tmp_path) == 0
    assert len(Ledger(tmp_path).list_states("old")) == 3


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("PRAGMA user_version = 4")
    with pytest.raises(FailedPreconditionError, match="upgrade the program") as caught:
        Ledger(tmp_path)
    assert caught.value.reason == "LEDGER_NEWER"
    assert version_of(tmp_path) == 4


def write_version_2(folder: Path) -> None:
    """Write a failed run of two steps as the program of version 2 did: the push of the second one is open."""
    write_version_1(folder, steps=2, checkpoints=())
    rows = [write_checkpoint(folder / "old", version, epoch=2) for version in (1, 2)]
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        for statement in FROM_1_TO_2:
            connection.execute(statement)
        connection.execute("UPDATE runs SET committed_steps = 2, policy_version = 1")
        connection.execute("UPDATE steps SET asked = 4, generated = 4, trained = 4")
        connection.executemany(
            "INSERT INTO pushes VALUES ('old', ?, 2, ?, ?, 1.75)", [(1, "a" * 64, "active"), (2, "b" * 64, "open")]
        )
        connection.executemany(
            "INSERT INTO checkpoints VALUES ('old', ?, 2, ?, ?, 10, 'durable', 1.75)",
            [(row.version, row.path, row.sha256) for row in rows],
        )
        connection.execute("INSERT INTO samples VALUES ('old', 1, 0, 2, 'p', 1, 'a', 8, 'trained', '')")
        connection.execute("PRAGMA user_version = 2")
    connection.close()


def test_steps_and_pushes_of_version_2_are_as_they_were(tmp_path: Path) -> None:
    write_version_2(tmp_path)
    ledger = Ledger(tmp_path)
    assert version_of(tmp_path) == 3
    run = ledger.get_run("old")
    assert (run.num_committed_steps, run.policy_version, run.branch, run.rollback_to) == (2, 1, 0, None)
    assert [(s.step, s.new_version, s.checkpoint is not None) for s in ledger.list_states("old")] == [
        (0, 1, True),
        (1, 2, True),
    ]
    assert ledger.has_open_push("old")
    assert [step.step for step in ledger.list_steps("old", pushed_only=True)] == [0]
    assert ledger.count_samples("old") == {"trained": 1}
    assert ledger.next_step("old") == StepNumbers(2, 2, 3, 0)


def test_a_run_of_version_2_goes_on_and_can_be_rolled_back(tmp_path: Path) -> None:
    write_version_2(tmp_path)
    ledger = Ledger(tmp_path)
    attempt = ledger.begin_attempt("old", from_step=1)
    assert ledger.next_step("old") == StepNumbers(1, 1, 3, 1)
    ledger.record_samples(attempt, 1, sample_rows(4))
    ledger.commit_step(attempt, step_record(1), step_outcome(1))
    assert [(s.step, s.new_version) for s in ledger.list_states("old")] == [(0, 1), (1, 3)]


def test_an_upgrade_from_version_2_that_is_interrupted_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version_2(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("tether_services.orchestrator.ledger_schema._STATEMENTS_OF_3", ("SELECT nothing",))
        with pytest.raises(FailedPreconditionError, match="nothing"):
            Ledger(tmp_path)
    assert version_of(tmp_path) == 2
    assert len(Ledger(tmp_path).list_states("old")) == 2
