"""The step ledger: one SQLite file that says which runs exist and which steps are committed.

A step is committed exactly once and without gaps, together with its samples and its checkpoint. Every writer names its
epoch and holds the lease of the run; a writer of an earlier attempt is refused, so a worker that was thought dead can
never write beside its successor. Transactions are short: the service process reads while a worker writes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tether.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from tether_services.orchestrator import ledger_rollback, ledger_runs, ledger_schema, ledger_steps
from tether_services.orchestrator.lease import Lease, boot_clock_ns, boot_id, own_holder
from tether_services.orchestrator.ledger_file import LedgerFile
from tether_services.orchestrator.ledger_reading import LedgerReader
from tether_services.orchestrator.records import (
    RESUMABLE_STATES,
    Attempt,
    CheckpointRow,
    Rollback,
    RunIdentity,
    RunRecord,
    RunState,
    SampleRow,
    StepOutcome,
    StepRecord,
)
from tether_services.runtime.fault_points import reach
from tether_services.runtime.history import record as record_history

__all__ = ["Ledger"]

BUSY_SECONDS = 10.0
"""How long a transaction waits for one of another process unless told otherwise."""


class Ledger(LedgerReader):
    """Runs and steps in `<state_dir>/ledger.sqlite`. Safe to use from several threads and processes."""

    def __init__(
        self, state_dir: Path, *, busy_seconds: float = BUSY_SECONDS, clock_ns: Callable[[], int] = boot_clock_ns
    ) -> None:
        """Open the ledger of a state folder; both are created where they do not exist.

        Args:
            state_dir: The folder, on a local disk.
            busy_seconds: How long a transaction waits for one of another process.
            clock_ns: Clock of the leases.

        Raises:
            TetherError: STORAGE_FULL, LEDGER_BUSY, LEDGER_DAMAGED, LEDGER_UNWRITABLE or LEDGER_NEWER.
        """
        state_dir = state_dir.resolve()
        state_dir.mkdir(parents=True, exist_ok=True)
        super().__init__(state_dir, LedgerFile(state_dir / "ledger.sqlite", busy_seconds=busy_seconds))
        self._clock_ns = clock_ns
        self._leases: dict[str, Lease] = {}
        try:
            with self._file.write() as connection:
                ledger_schema.prepare(connection, self.state_dir)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def create_run(self, run_id: str, *, config_toml: str, total_steps: int) -> Attempt:
        """Record a new run in state PENDING and return its first attempt.

        Raises:
            InvalidArgumentError: A run of that id exists.
            FailedPreconditionError: RUN_ACTIVE: another run uses the trainer.
        """
        with self._file.write() as connection:
            ledger_runs.refuse_while_active(connection)
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

    def begin_attempt(self, run_id: str, *, request_id: str = "", from_step: int | None = None) -> Attempt:
        """Put a failed or cancelled run back to PENDING under a new epoch and return the attempt.

        Args:
            run_id: The run.
            request_id: Kept with the answer, see `find_answer`; empty: not.
            from_step: Committed steps that stay, the others are rolled back first; None: all.

        Raises:
            NotFoundError: There is no such run.
            InvalidArgumentError: It does not have so many steps.
            FailedPreconditionError: It runs or has succeeded (RUN_NOT_RESUMABLE), another is active (RUN_ACTIVE), or
                the checkpoint of that step is gone (CHECKPOINT_REMOVED).
        """
        with self._file.write() as connection:
            run = ledger_runs.get_run(connection, run_id)
            if run.state not in RESUMABLE_STATES:
                message = f"Run {run_id!r} is {run.state.value}; only a failed or cancelled run can be resumed."
                raise FailedPreconditionError(message, field="run_id", reason="RUN_NOT_RESUMABLE")
            ledger_runs.refuse_while_active(connection)
            rollback = None
            if from_step is not None:
                ledger_rollback.check_way_back(connection, run, from_step, field="from_step")
                rollback = ledger_rollback.roll_back(connection, run, from_step, reason="ResumeRun")
            attempt = self._next_attempt(connection, run, restarts=0)
            connection.execute("UPDATE runs SET alarm_rollbacks = 0 WHERE run_id = ?", (run_id,))
            begun = ledger_runs.get_run(connection, run_id)
            ledger_runs.remember_answer(connection, request_id, "ResumeRun", begun)
        _note(run, rollback)
        return attempt

    def restart_attempt(self, attempt: Attempt, *, reason: str, max_restarts: int) -> Attempt | None:
        """Put a run whose worker died back to PENDING under a new epoch; None if it has ended or ends now.

        A rollback that was asked for is made first; what it stopped is not counted as a restart. The run ends now as
        CANCELLED if that was asked for, and as FAILED for `reason` after `max_restarts` restarts since the last
        committed step.
        """
        with self._file.write() as connection:
            try:
                run = ledger_runs.check_epoch(connection, attempt)
            except AbortedError:
                return None
            rollback = ledger_rollback.settle(connection, run)
            following = self._restart(connection, run, reason=reason, max_restarts=max_restarts)
        _note(run, rollback)
        return following

    def _restart(
        self, connection: sqlite3.Connection, run: RunRecord, *, reason: str, max_restarts: int
    ) -> Attempt | None:
        query = "SELECT restarts FROM runs WHERE run_id = ?"
        (restarts,) = connection.execute(query, (run.run_id,)).fetchone()
        died = run.rollback_to is None
        if run.cancel_requested:
            self._end(connection, run, RunState.CANCELLED, error="", interrupted=False)
            return None
        if died and restarts >= max_restarts:
            error = reason + (f" ({restarts} restarts in a row brought no step)" if restarts else "")
            self._end(connection, run, RunState.FAILED, error=error, interrupted=False)
            return None
        return self._next_attempt(connection, run, restarts=restarts + died)

    def _next_attempt(self, connection: sqlite3.Connection, run: RunRecord, *, restarts: int) -> Attempt:
        ledger_steps.abandon_samples(connection, run.run_id)
        connection.execute(
            "UPDATE runs SET state = ?, epoch = epoch + 1, error = '', cancel_requested = 0, end_time = NULL,"
            " interrupted = 0, restarts = ? WHERE run_id = ?",
            (RunState.PENDING.value, restarts, run.run_id),
        )
        return Attempt(run.run_id, run.epoch + 1, self.directory(run.run_id))

    def acquire_lease(self, attempt: Attempt, *, seconds: float) -> Lease:
        """Make this process the one writer of a run and return its lease; from now on each write checks it.

        Raises:
            AbortedError: The attempt is over (STALE_EPOCH), or another process holds the lease (LEASE_HELD).
        """
        with self._file.write() as connection:
            ledger_runs.check_epoch(connection, attempt)
            now = self._clock_ns()
            lease = Lease(attempt.run_id, attempt.epoch, own_holder(), boot_id(), now + int(seconds * 1e9))
            ledger_runs.put_lease(connection, lease, now_ns=now)
        self._leases[attempt.run_id] = lease
        return lease

    def renew_lease(self, lease: Lease, *, seconds: float) -> Lease:
        """Return the lease, valid for some more time; one that expired and that nobody took is valid again.

        Raises:
            AbortedError: LEASE_LOST.
        """
        expires_ns = self._clock_ns() + int(seconds * 1e9)
        with self._file.write() as connection:
            ledger_runs.check_lease(connection, lease.run_id, lease)
            connection.execute("UPDATE leases SET expires_ns = ? WHERE run_id = ?", (expires_ns, lease.run_id))
        return Lease(lease.run_id, lease.epoch, lease.holder, lease.boot_id, expires_ns)

    def mark_running(self, attempt: Attempt) -> None:
        """Say that the worker of this attempt is training.

        Raises:
            AbortedError: The attempt is over (STALE_EPOCH), or another process has the run (LEASE_LOST).
        """
        with self._file.write() as connection:
            self._check_writer(connection, attempt)
            connection.execute("UPDATE runs SET state = ? WHERE run_id = ?", (RunState.RUNNING.value, attempt.run_id))

    def pin_identity(self, attempt: Attempt, identity: RunIdentity) -> None:
        """Keep the hashes of what a run works with at its first attempt, and compare them at later ones.

        Raises:
            AbortedError: See `mark_running`.
            FailedPreconditionError: BASE_CHANGED, REWARD_MODEL_CHANGED or PROMPTS_CHANGED, with both hashes.
        """
        with self._file.write() as connection:
            self._check_writer(connection, attempt)
            ledger_runs.pin(connection, attempt.run_id, identity)

    def record_samples(self, attempt: Attempt, step: int, rows: Sequence[SampleRow]) -> None:
        """Record the completions of a rollout before the update that learns from them.

        Raises:
            AbortedError: See `mark_running`; or this attempt has recorded samples of the step (LEDGER_CONFLICT).
        """
        with self._file.write() as connection:
            self._check_writer(connection, attempt)
            ledger_steps.add_samples(connection, attempt, step, rows)

    def record_abandoned(self, attempt: Attempt, step: int, rows: Sequence[SampleRow]) -> None:
        """Record the completions of a rollout of which none will be trained on: it failed.

        Raises:
            AbortedError: See `mark_running`; or some of these rows are there already (LEDGER_CONFLICT).
        """
        with self._file.write() as connection:
            self._check_writer(connection, attempt)
            ledger_steps.add_samples(connection, attempt, step, rows, abandoned=True)

    def commit_step(self, attempt: Attempt, record: StepRecord, outcome: StepOutcome | None = None) -> None:
        """Commit a step in one transaction: its figures, that its samples are trained on, and its checkpoint.

        The version that it made, see `next_step`, is in use once `record_push` says so.

        Raises:
            AbortedError: See `mark_running`; or the step is not the next one (STEP_OUT_OF_ORDER).
            InternalError: The samples do not add up (SAMPLES_UNACCOUNTED).
        """
        with self._file.write() as connection:
            run = self._check_writer(connection, attempt)
            ledger_steps.insert_step(connection, run, record, outcome or StepOutcome())
            reach("commit.open")

    def record_push(self, attempt: Attempt, version: int, figures: Mapping[str, float]) -> None:
        """Say that the generator serves a version, and add the figures of the push to the step that made it.

        Raises:
            AbortedError: See `mark_running`; or no committed step made the version (PUSH_NOT_COMMITTED).
        """
        with self._file.write() as connection:
            run = self._check_writer(connection, attempt)
            ledger_steps.record_push(connection, run, version, figures)

    def retain_checkpoints(
        self, attempt: Attempt, *, count: int, hours: float | None = None, at_least: int = 1
    ) -> list[CheckpointRow]:
        """Mark all but the newest checkpoints as removed, and return those that stay, newest first.

        Args:
            attempt: Of the run.
            count: How many stay at most.
            hours: None older than this stays, but the newest always; None: no limit.
            at_least: How many of the newest stay however old they are.

        Raises:
            AbortedError: See `mark_running`.
        """
        with self._file.write() as connection:
            self._check_writer(connection, attempt)
            return ledger_steps.retain_checkpoints(
                connection, attempt.run_id, count=count, hours=hours, at_least=at_least
            )

    def finish(self, attempt: Attempt, state: RunState, *, error: str = "", interrupted: bool = False) -> bool:
        """End an attempt; return False, changing nothing, if it is over already.

        On a full disk the room that was set aside for this is given up.

        Args:
            attempt: What ends.
            state: How.
            error: Why it failed.
            interrupted: Whether a stop of the orchestrator has ended it, see `interrupted_run`.

        Raises:
            TetherError: It could not be recorded: see `Ledger`.
        """
        try:
            ended = self._finish(attempt, state, error=error, interrupted=interrupted)
        except ResourceExhaustedError:
            self._file.give_up_reserve()
            ended = self._finish(attempt, state, error=error, interrupted=interrupted)
        self._file.keep_reserve()
        return ended

    def _finish(self, attempt: Attempt, state: RunState, *, error: str, interrupted: bool) -> bool:
        with self._file.write() as connection:
            try:
                run = ledger_runs.check_epoch(connection, attempt)
            except AbortedError:
                return False
            if attempt.run_id in self._leases:  # the service, which takes none, ends what it has seen dead
                ledger_runs.check_lease(connection, attempt.run_id, self._leases[attempt.run_id])
            rollback = ledger_rollback.settle(connection, run)
            if rollback is not None and state is RunState.SUCCEEDED:  # asked for while it wrote its report
                state, error = RunState.FAILED, f"[ROLLED_BACK] {rollback.to_step} steps stay; resume the run to go on"
            self._end(connection, run, state, error=error, interrupted=interrupted)
        _note(run, rollback)
        return True

    def _end(
        self, connection: sqlite3.Connection, run: RunRecord, state: RunState, *, error: str, interrupted: bool
    ) -> None:
        connection.execute(
            "UPDATE runs SET state = ?, error = ?, end_time = ?, interrupted = ? WHERE run_id = ?",
            (state.value, error, time.time(), interrupted, run.run_id),
        )
        connection.execute("DELETE FROM leases WHERE run_id = ?", (run.run_id,))

    def request_rollback(self, run_id: str, *, to_step: int | None = None, request_id: str = "") -> RunRecord:
        """Take back the last steps of a run that has ended, or have that done once its worker has stopped.

        Args:
            run_id: The run.
            to_step: Committed steps that stay; None: all but the last one.
            request_id: A repeat with the same one returns the first answer; empty: not remembered.

        Raises:
            InvalidArgumentError: It has no such steps, or REQUEST_ID_REUSED: it was another request.
            NotFoundError: There is no such run.
            FailedPreconditionError: It has succeeded (RUN_ENDED), or the checkpoint of that step is gone
                (CHECKPOINT_REMOVED).
        """
        with self._file.write() as connection:
            answered = ledger_runs.find_answer(connection, request_id, "RollbackRun", run_id)
            if answered is not None:
                return answered
            rollback = ledger_rollback.request(connection, ledger_runs.get_run(connection, run_id), to_step)
            run = ledger_runs.get_run(connection, run_id)
            ledger_runs.remember_answer(connection, request_id, "RollbackRun", run)
        _note(run, rollback)
        return run

    def ask_rollback(self, attempt: Attempt, *, to_step: int, reason: str, most: int) -> None:
        """Have a run rolled back for an alarm once its worker, the caller, has stopped.

        Args:
            attempt: Of the caller.
            to_step: Committed steps that stay.
            reason: Which alarm it is for.
            most: How often that may be done without anybody resuming the run.

        Raises:
            AbortedError: See `mark_running`.
            FailedPreconditionError: CHECKPOINT_REMOVED, or ALARM: it was done so often already.
        """
        with self._file.write() as connection:
            run = self._check_writer(connection, attempt)
            ledger_rollback.ask_for_alarm(connection, run, to_step, reason=reason, most=most)

    def request_cancel(self, run_id: str, *, request_id: str = "") -> RunRecord:
        """Ask the worker of an active run to stop and return the run; a repeat changes nothing.

        Args:
            run_id: The run.
            request_id: A repeat with the same one returns the first answer; empty: not remembered.

        Raises:
            InvalidArgumentError: REQUEST_ID_REUSED: it was another request.
            NotFoundError: There is no such run.
            FailedPreconditionError: It has succeeded or failed (RUN_ENDED).
        """
        with self._file.write() as connection:
            answered = ledger_runs.find_answer(connection, request_id, "CancelRun", run_id)
            if answered is not None:
                return answered
            ledger_runs.request_cancel(connection, ledger_runs.get_run(connection, run_id))
            run = ledger_runs.get_run(connection, run_id)
            ledger_runs.remember_answer(connection, request_id, "CancelRun", run)
            return run

    def recount_steps(self) -> None:
        """Correct the counts of committed steps that differ from the steps there are."""
        with self._file.write() as connection:
            ledger_steps.recount(connection)

    def _check_writer(self, connection: sqlite3.Connection, attempt: Attempt) -> RunRecord:
        return ledger_runs.check_writer(connection, attempt, self._leases.get(attempt.run_id))


def _note(run: RunRecord, rollback: Rollback | None) -> None:
    """Put a rollback in the history, if one is kept."""
    if rollback is not None:
        record_history("rolled_back", run=run.run_id, branch=rollback.branch, to_step=rollback.to_step)
