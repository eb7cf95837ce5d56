"""Statements about steps and what belongs to them: samples, checkpoints, pushes. All are called in a transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tether.errors import AbortedError, InternalError
from tether_services.orchestrator.records import (
    Attempt,
    CheckpointRow,
    RunRecord,
    SampleCounts,
    SampleRow,
    StepNumbers,
    StepOutcome,
    StepRecord,
    StepState,
)

__all__ = [
    "abandon_samples",
    "add_samples",
    "count_abandoned",
    "count_sample_states",
    "count_unaccounted",
    "insert_step",
    "list_records",
    "list_states",
    "newest_push",
    "next_numbers",
    "record_push",
    "recount",
    "retain_checkpoints",
]

KEPT_SAMPLES = 1_000_000
"""About how many samples a run keeps, in whole steps: those of older steps are removed; their counts stay."""


def add_samples(
    connection: sqlite3.Connection, attempt: Attempt, step: int, rows: Sequence[SampleRow], *, abandoned: bool = False
) -> None:
    """Record the completions of a rollout: each will be trained on, or is dropped; none of them if it is abandoned."""
    connection.executemany(
        "INSERT INTO samples (run_id, step, sample, epoch, prompt_sha256, policy_version, adapter_sha256, tokens,"
        " state, reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *(attempt.run_id, step, row.sample, attempt.epoch, row.prompt_sha256, row.policy_version),
                *(row.adapter_sha256, row.num_tokens, _state_of(row, abandoned=abandoned), row.dropped),
            )
            for row in rows
        ],
    )


def _state_of(row: SampleRow, *, abandoned: bool) -> str:
    if abandoned:
        return "abandoned"
    return "dropped" if row.dropped else "generated"


def abandon_samples(connection: sqlite3.Connection, run_id: str) -> None:
    """Say of the samples of a step that an earlier attempt has begun and not committed that none will learn from them.

    Those that it had dropped are abandoned too: the account of a step names what its own rollout has dropped.
    """
    connection.execute(
        "UPDATE samples SET state = 'abandoned' WHERE run_id = ? AND (state = 'generated' OR (state = 'dropped'"
        " AND step >= (SELECT committed_steps FROM runs WHERE runs.run_id = samples.run_id)))",
        (run_id,),
    )


def count_abandoned(connection: sqlite3.Connection, run_id: str, step: int) -> int:
    """Return how many completions of the next step were abandoned, since it was rolled back if it was."""
    query = """
        SELECT COUNT(*) FROM samples WHERE run_id = ? AND step = ? AND state = 'abandoned' AND epoch >
            (SELECT COALESCE(MAX(epoch), 0) FROM rolled_back_steps WHERE run_id = ? AND step = ?)
    """
    (count,) = connection.execute(query, (run_id, step) * 2).fetchone()
    return int(count)


def count_unaccounted(connection: sqlite3.Connection, run_id: str, *, first_step: int, end_step: int) -> int:
    """Return how many samples of committed steps are in no state or in a wrong one, by the rows of the samples.

    By the count that the step was committed with, each is trained on or dropped; none is still to be trained on.
    """
    query = """
        SELECT COALESCE(SUM(ABS(generated - by_rows) + left), 0) FROM (
            SELECT steps.generated,
                COUNT(CASE WHEN samples.epoch = steps.epoch AND samples.state IN ('trained', 'dropped') THEN 1 END)
                    AS by_rows,
                COUNT(CASE WHEN samples.state = 'generated' THEN 1 END) AS left
            FROM steps LEFT JOIN samples ON samples.run_id = steps.run_id AND samples.step = steps.step
            WHERE steps.run_id = ? AND steps.step >= ? AND steps.step < ? GROUP BY steps.step
        )
    """
    (count,) = connection.execute(query, (run_id, first_step, end_step)).fetchone()
    return int(count)


def count_sample_states(connection: sqlite3.Connection, run_id: str) -> dict[str, int]:
    """Return how many samples of a run are in each state."""
    query = "SELECT state, COUNT(*) FROM samples WHERE run_id = ? GROUP BY state"
    return dict(connection.execute(query, (run_id,)).fetchall())


def next_numbers(connection: sqlite3.Connection, run: RunRecord) -> StepNumbers:
    """Return the numbers of the next step of a run."""
    last = "SELECT new_version FROM steps WHERE run_id = ? AND step = ?"
    row = connection.execute(last, (run.run_id, run.num_committed_steps - 1)).fetchone()
    current: int = row[0] if row else 0
    (rolled_back,) = connection.execute(
        "SELECT COALESCE(MAX(new_version), 0) FROM rolled_back_steps WHERE run_id = ?", (run.run_id,)
    ).fetchone()
    return StepNumbers(run.num_committed_steps, current, max(current, rolled_back) + 1, run.branch)


def insert_step(connection: sqlite3.Connection, run: RunRecord, record: StepRecord, outcome: StepOutcome) -> None:
    """Commit a step with its samples, its checkpoint, and a push that is still to be made.

    Raises:
        AbortedError: STEP_OUT_OF_ORDER: it is not the next one.
        InternalError: Its samples do not add up, or its checkpoint is of another version: a defect of the caller.
    """
    if record.step != run.num_committed_steps:
        message = f"Step {record.step} of run {run.run_id!r} cannot follow {run.num_committed_steps} committed steps."
        raise AbortedError(message, reason="STEP_OUT_OF_ORDER")
    now, counts = time.time(), outcome.samples
    new_version = next_numbers(connection, run).new_version
    if outcome.checkpoint is not None and outcome.checkpoint.version != new_version:
        message = f"step {record.step} makes version {new_version}, its checkpoint is of {outcome.checkpoint.version}"
        raise InternalError(message)
    _train_samples(connection, run, record.step, counts)
    if "samples_abandoned" in record.metrics:  # the rows know those of earlier attempts too
        abandoned = count_abandoned(connection, run.run_id, record.step)
        record = replace(record, metrics={**record.metrics, "samples_abandoned": float(abandoned)})
    connection.execute(
        "INSERT INTO steps (run_id, step, epoch, policy_version, metrics, distributions, commit_time, adapter_sha256,"
        " asked, generated, trained, dropped, new_version) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(run.run_id, record.step, run.epoch, record.policy_version, *_encode(record), now, outcome.adapter_sha256),
            *(counts.asked, counts.generated, counts.trained, json.dumps(dict(counts.dropped)), new_version),
        ),
    )
    if outcome.checkpoint is not None:
        _insert_checkpoint(connection, run, outcome.checkpoint, now)
    connection.execute(
        "INSERT INTO pushes (run_id, version, epoch, adapter_sha256, state, time) VALUES (?, ?, ?, ?, 'open', ?)",
        (run.run_id, new_version, run.epoch, outcome.adapter_sha256, now),
    )
    connection.execute(
        "UPDATE runs SET committed_steps = committed_steps + 1, restarts = 0 WHERE run_id = ?", (run.run_id,)
    )


def _train_samples(connection: sqlite3.Connection, run: RunRecord, step: int, counts: SampleCounts) -> None:
    """Mark the samples of a step as trained, once, and compare their number with the account of the step."""
    where = "run_id = ? AND step = ? AND epoch = ?"
    key = (run.run_id, step, run.epoch)
    states = dict(
        connection.execute(f"SELECT state, COUNT(*) FROM samples WHERE {where} GROUP BY state", key).fetchall()
    )
    trained, dropped = states.get("generated", 0), states.get("dropped", 0)
    if (trained, dropped, trained + dropped) != (counts.trained, sum(counts.dropped.values()), counts.generated):
        message = (
            f"step {step}: {counts.generated} samples generated, {counts.trained} trained and"
            f" {sum(counts.dropped.values())} dropped; the ledger has {trained} to train and {dropped} dropped"
        )
        raise InternalError(message, reason="SAMPLES_UNACCOUNTED")
    connection.execute(f"UPDATE samples SET state = 'trained' WHERE {where} AND state = 'generated'", key)
    oldest = step - max(1, KEPT_SAMPLES // max(1, counts.generated))
    if oldest >= 0:
        connection.execute("DELETE FROM samples WHERE run_id = ? AND step <= ?", (run.run_id, oldest))


def _insert_checkpoint(connection: sqlite3.Connection, run: RunRecord, row: CheckpointRow, now: float) -> None:
    connection.execute(
        "INSERT INTO checkpoints (run_id, version, epoch, path, sha256, size_bytes, state, create_time)"
        " VALUES (?, ?, ?, ?, ?, ?, 'durable', ?)",
        (run.run_id, row.version, run.epoch, row.path, row.sha256, row.size_bytes, now),
    )


def record_push(connection: sqlite3.Connection, run: RunRecord, version: int, figures: Mapping[str, float]) -> None:
    """Say that the generator serves a version, and add figures to the step that made it; version 0 has none.

    Raises:
        AbortedError: PUSH_NOT_COMMITTED: no committed step has made this version.
    """
    key = (run.run_id, version)
    if version:
        row = connection.execute("SELECT metrics FROM steps WHERE run_id = ? AND new_version = ?", key).fetchone()
        if row is None:
            message = f"No committed step of run {run.run_id!r} has made version {version}."
            raise AbortedError(message, reason="PUSH_NOT_COMMITTED")
        metrics = json.dumps(json.loads(row[0]) | dict(figures), allow_nan=False)
        connection.execute("UPDATE steps SET metrics = ? WHERE run_id = ? AND new_version = ?", (metrics, *key))
    connection.execute(
        "UPDATE pushes SET state = 'active', epoch = ?, time = ? WHERE run_id = ? AND version = ?",
        (run.epoch, time.time(), *key),
    )
    connection.execute("UPDATE runs SET policy_version = ? WHERE run_id = ?", (version, run.run_id))


def newest_push(connection: sqlite3.Connection, run_id: str) -> tuple[int, str] | None:
    """Return (version, state) of the newest version of a run that was not rolled back; None if it has made none."""
    query = (
        "SELECT version, state FROM pushes WHERE run_id = ? AND state != 'rolled_back' ORDER BY version DESC LIMIT 1"
    )
    row: tuple[int, str] | None = connection.execute(query, (run_id,)).fetchone()
    return row


def retain_checkpoints(
    connection: sqlite3.Connection, run_id: str, *, count: int, hours: float | None, at_least: int = 1
) -> list[CheckpointRow]:
    """Mark all but the newest checkpoints as removed, and return those that stay, newest first.

    The `at_least` newest stay always, and the one that a rollback was asked for to; of the others those that are among
    the `count` newest and not older than `hours`. Ages are told by the time of day, which is all that outlives a
    restart of the machine. A jump of it can only shorten or lengthen the stay of those in between: nothing that a run
    needs to go on depends on it.
    """
    query = (
        "SELECT version, path, sha256, size_bytes, create_time FROM checkpoints"
        " WHERE run_id = ? AND state = 'durable' ORDER BY version DESC"
    )
    rows = connection.execute(query, (run_id,)).fetchall()
    oldest = time.time() - hours * 3600 if hours is not None else float("-inf")
    asked_for = connection.execute(
        "SELECT new_version FROM steps JOIN runs USING (run_id) WHERE run_id = ? AND step + 1 = rollback_to", (run_id,)
    ).fetchone()
    kept = [
        row
        for index, row in enumerate(rows)
        if index < at_least or (index < count and row[4] >= oldest) or row[:1] == asked_for
    ]
    versions = {row[0] for row in kept}
    connection.executemany(
        "UPDATE checkpoints SET state = 'removed' WHERE run_id = ? AND version = ?",
        [(run_id, row[0]) for row in rows if row[0] not in versions],
    )
    return [CheckpointRow(*row[:4]) for row in kept]


def list_records(
    connection: sqlite3.Connection, run_id: str, *, first_step: int, limit: int, pushed_only: bool
) -> list[StepRecord]:
    """Return committed steps with their figures, in order."""
    query = (
        "SELECT step, policy_version, metrics, distributions, commit_time, new_version FROM steps"
        " WHERE run_id = ? AND step >= ?"
        + (
            " AND NOT EXISTS (SELECT 1 FROM pushes WHERE pushes.run_id = steps.run_id AND"
            " pushes.version = steps.new_version AND pushes.state = 'open')"
            if pushed_only
            else ""
        )
        + " ORDER BY step LIMIT ?"
    )
    rows = connection.execute(query, (run_id, first_step, limit)).fetchall()
    return [StepRecord(row[0], row[1], json.loads(row[2]), json.loads(row[3]), *row[4:]) for row in rows]


def recount(connection: sqlite3.Connection) -> None:
    """Set the count of committed steps of every run to the number of its steps where it differs."""
    counted = "(SELECT COUNT(*) FROM steps WHERE steps.run_id = runs.run_id)"
    connection.execute(f"UPDATE runs SET committed_steps = {counted} WHERE committed_steps != {counted}")


def list_states(connection: sqlite3.Connection, run_id: str, *, first_step: int, limit: int) -> list[StepState]:
    """Return committed steps with what they left behind, in order."""
    query = """
        SELECT steps.step, steps.policy_version, steps.new_version, steps.epoch, steps.adapter_sha256, steps.asked,
            steps.generated, steps.trained, steps.dropped, steps.commit_time,
            checkpoints.version, checkpoints.path, checkpoints.sha256, checkpoints.size_bytes
        FROM steps LEFT JOIN checkpoints ON checkpoints.run_id = steps.run_id
            AND checkpoints.version = steps.new_version AND checkpoints.state = 'durable'
        WHERE steps.run_id = ? AND steps.step >= ? ORDER BY steps.step LIMIT ?
    """
    return [_state(row) for row in connection.execute(query, (run_id, first_step, limit)).fetchall()]


def _state(row: tuple[Any, ...]) -> StepState:
    step, policy_version, new_version, epoch, adapter_sha256, asked, generated, trained, dropped, at, *checkpoint = row
    counts = SampleCounts(asked, generated, trained, json.loads(dropped))
    kept = None if checkpoint[0] is None else CheckpointRow(*checkpoint)
    return StepState(step, policy_version, new_version, epoch, adapter_sha256, counts, kept, at)


def _encode(record: StepRecord) -> tuple[str, str]:
    """Return metrics and distributions as JSON; a value that is not finite is a defect of the caller."""
    metrics = json.dumps(dict(record.metrics), allow_nan=False)
    distributions = json.dumps({k: list(v) for k, v in record.distributions.items()}, allow_nan=False)
    return metrics, distributions
