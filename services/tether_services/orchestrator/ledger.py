"""The step ledger: one SQLite file that says which runs exist and which steps are committed.

A step is committed exactly once and without gaps. Every writer names its epoch; a writer of an earlier attempt is
refused, so a worker that was thought dead can never write beside its successor. Transactions are short: the service
process reads while a worker writes.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tether.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.orchestrator.records import (
    ACTIVE_STATES,
    FINAL_STATES,
    RESUMABLE_STATES,
    Attempt,
    RunRecord,
    RunState,
    StepRecord,
)

__all__ = ["Ledger"]

_BUSY_SECONDS = 10.0
"""How long a transaction waits for another one; they take milliseconds."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    total_steps INTEGER NOT NULL,
    policy_version INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    create_time REAL NOT NULL,
    end_time REAL,
    config_toml TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS steps (
    run_id TEXT NOT NULL REFERENCES runs (run_id),
    step INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    policy_version INTEGER NOT NULL,
    metrics TEXT NOT NULL,
    distributions TEXT NOT NULL,
    commit_time REAL NOT NULL,
    PRIMARY KEY (run_id, step)
);
"""
_RUN_COLUMNS = """
    run_id, state, epoch, (SELECT COUNT(*) FROM steps WHERE steps.run_id = runs.run_id), total_steps, policy_version,
    error, cancel_requested, create_time, end_time, config_toml
"""
_ACTIVE = tuple(sorted(state.value for state in ACTIVE_STATES))


class Ledger:
    """Runs and steps in `<state_dir>/ledger.sqlite`. Safe to use from several threads and processes."""

    def __init__(self, state_dir: Path) -> None:
        """Open the ledger of a state folder; both are created where they do not exist."""
        self.state_dir = state_dir.resolve()
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self._path = self.state_dir / "ledger.sqlite"
        with closing(self._connect()) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)

    def directory(self, run_id: str) -> Path:
        """Return the folder of a run."""
        return self.state_dir / run_id

    def create_run(self, run_id: str, *, config_toml: str, total_steps: int) -> Attempt:
        """Record a new run in state PENDING and return its first attempt.

        Raises:
            InvalidArgumentError: A run of that id exists.
            FailedPreconditionError: RUN_ACTIVE: another run uses the trainer.
        """
        with self._write() as connection:
            _refuse_while_active(connection)
            try:
                connection.execute(
                    "INSERT INTO runs (run_id, state, epoch, total_steps, create_time, config_toml)"
                    " VALUES (?, ?, 1, ?, ?, ?)",
                    (run_id, RunState.PENDING.value, total_steps, time.time(), config_toml),
                )
            except sqlite3.IntegrityError as error:
                raise InvalidArgumentError(
                    f"A run named {run_id!r} exists; choose another id.", field="run_id"
                ) from error
        return Attempt(run_id, 1, self.directory(run_id))

    def begin_attempt(self, run_id: str) -> Attempt:
        """Put a failed or cancelled run back to PENDING under a new epoch and return the attempt.

        Raises:
            NotFoundError: There is no such run.
            FailedPreconditionError: It runs or has succeeded (RUN_NOT_RESUMABLE), or another is active (RUN_ACTIVE).
        """
        with self._write() as connection:
            run = _get(connection, run_id)
            if run.state not in RESUMABLE_STATES:
                message = f"Run {run_id!r} is {run.state.value}; only a failed or cancelled run can be resumed."
                raise FailedPreconditionError(message, field="run_id", reason="RUN_NOT_RESUMABLE")
            _refuse_while_active(connection)
            connection.execute(
                "UPDATE runs SET state = ?, epoch = epoch + 1, error = '', cancel_requested = 0, end_time = NULL"
                " WHERE run_id = ?",
                (RunState.PENDING.value, run_id),
            )
        return Attempt(run_id, run.epoch + 1, self.directory(run_id))

    def mark_running(self, attempt: Attempt) -> None:
        """Say that the worker of this attempt is training.

        Raises:
            AbortedError: The attempt is over: another one has begun, or the run has ended.
        """
        with self._write() as connection:
            _check_epoch(connection, attempt)
            connection.execute("UPDATE runs SET state = ? WHERE run_id = ?", (RunState.RUNNING.value, attempt.run_id))

    def commit_step(self, attempt: Attempt, record: StepRecord) -> None:
        """Commit a step and the policy version that it published, `record.policy_version + 1`, in one transaction.

        Raises:
            AbortedError: The attempt is over, or the step is not the next one (STEP_OUT_OF_ORDER).
        """
        with self._write() as connection:
            run = _check_epoch(connection, attempt)
            if record.step != run.num_committed_steps:
                message = (
                    f"Step {record.step} of run {run.run_id!r} cannot follow {run.num_committed_steps} committed steps."
                )
                raise AbortedError(message, reason="STEP_OUT_OF_ORDER")
            connection.execute(
                "INSERT INTO steps (run_id, step, epoch, policy_version, metrics, distributions, commit_time)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (run.run_id, record.step, attempt.epoch, record.policy_version, *_encode(record), time.time()),
            )
            connection.execute(
                "UPDATE runs SET policy_version = ? WHERE run_id = ?", (record.policy_version + 1, run.run_id)
            )

    def finish(self, attempt: Attempt, state: RunState, *, error: str = "") -> bool:
        """End an attempt; return False, changing nothing, if it is over already."""
        with self._write() as connection:
            try:
                _check_epoch(connection, attempt)
            except AbortedError:
                return False
            connection.execute(
                "UPDATE runs SET state = ?, error = ?, end_time = ? WHERE run_id = ?",
                (state.value, error, time.time(), attempt.run_id),
            )
        return True

    def request_cancel(self, run_id: str) -> RunRecord:
        """Ask the worker of an active run to stop and return the run; a repeat changes nothing.

        Raises:
            NotFoundError: There is no such run.
            FailedPreconditionError: It has succeeded or failed (RUN_ENDED).
        """
        with self._write() as connection:
            run = _get(connection, run_id)
            if run.state in FINAL_STATES - {RunState.CANCELLED}:
                message = f"Run {run_id!r} has ended already: {run.state.value}."
                raise FailedPreconditionError(message, field="run_id", reason="RUN_ENDED")
            if run.state is not RunState.CANCELLED:
                connection.execute("UPDATE runs SET cancel_requested = 1 WHERE run_id = ?", (run_id,))
            return _get(connection, run_id)

    def get_run(self, run_id: str) -> RunRecord:
        """Return a run.

        Raises:
            NotFoundError: There is none of that id.
        """
        with closing(self._connect()) as connection:
            return _get(connection, run_id)

    def list_runs(self, *, start: int = 0, limit: int = 200) -> list[RunRecord]:
        """Return up to `limit` runs, newest first, leaving out the first `start`."""
        query = f"SELECT {_RUN_COLUMNS} FROM runs ORDER BY number DESC LIMIT ? OFFSET ?"
        with closing(self._connect()) as connection:
            return [_run(row) for row in connection.execute(query, (limit, start))]

    def active_run(self) -> RunRecord | None:
        """Return the run that is pending or running; None if there is none."""
        query = f"SELECT {_RUN_COLUMNS} FROM runs WHERE state IN (?, ?)"
        with closing(self._connect()) as connection:
            row = connection.execute(query, _ACTIVE).fetchone()
        return _run(row) if row else None

    def list_steps(self, run_id: str, *, first_step: int = 0, limit: int = 1000) -> list[StepRecord]:
        """Return up to `limit` committed steps from `first_step` on, in order."""
        query = (
            "SELECT step, policy_version, metrics, distributions, commit_time FROM steps"
            " WHERE run_id = ? AND step >= ? ORDER BY step LIMIT ?"
        )
        with closing(self._connect()) as connection:
            rows = connection.execute(query, (run_id, first_step, limit)).fetchall()
        return [StepRecord(row[0], row[1], json.loads(row[2]), json.loads(row[3]), row[4]) for row in rows]

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """Run a block as one transaction that no other writer can interleave with."""
        with closing(self._connect()) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:  # whatever happened, nothing of the block may stay
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")


def _get(connection: sqlite3.Connection, run_id: str) -> RunRecord:
    row = connection.execute(f"SELECT {_RUN_COLUMNS} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    if row is None:
        raise NotFoundError(f"There is no run named {run_id!r}.", field="run_id", reason="RUN_NOT_FOUND")
    return _run(row)


def _run(row: tuple[str, str, int, int, int, int, str, int, float, float | None, str]) -> RunRecord:
    run_id, state, epoch, committed, total, version, error, cancel, created, ended, config = row
    return RunRecord(
        run_id, RunState(state), epoch, committed, total, version, error, bool(cancel), created, ended, config
    )


def _check_epoch(connection: sqlite3.Connection, attempt: Attempt) -> RunRecord:
    run = _get(connection, attempt.run_id)
    if run.epoch != attempt.epoch or run.state in FINAL_STATES:
        message = (
            f"Attempt {attempt.epoch} of run {run.run_id!r} is over: attempt {run.epoch} is {run.state.value}."
            " This worker must stop."
        )
        raise AbortedError(message, reason="STALE_EPOCH")
    return run


def _refuse_while_active(connection: sqlite3.Connection) -> None:
    row = connection.execute("SELECT run_id, state FROM runs WHERE state IN (?, ?)", _ACTIVE).fetchone()
    if row:
        message = f"Run {row[0]!r} is {row[1]} and uses the trainer; wait for its end or cancel it."
        raise FailedPreconditionError(message, field="run_id", reason="RUN_ACTIVE")


def _encode(record: StepRecord) -> tuple[str, str]:
    """Return metrics and distributions as JSON; a value that is not finite is a defect of the caller."""
    metrics = json.dumps(dict(record.metrics), allow_nan=False)
    distributions = json.dumps({k: list(v) for k, v in record.distributions.items()}, allow_nan=False)
    return metrics, distributions
