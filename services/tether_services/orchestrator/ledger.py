"""The step ledger: one SQLite file that says which runs exist and which steps are committed.

A step is committed exactly once and without gaps, together with its samples and its checkpoint. Every writer names its
epoch and holds the lease of the run; a writer of an earlier attempt is refused, so a worker that was thought dead can
never write beside its successor. Transactions are short: the service process reads while a worker writes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from tether.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from tether_services.orchestrator import ledger_rollback, ledger_runs, ledger_schema, ledger_steps
from tether_services.orchestrator.alarms import RollbackDueError
from tether_services.orchestrator.lease import boot_clock_ns
from tether_services.orchestrator.ledger_file import LedgerFile
from tether_services.orchestrator.ledger_writing import LedgerWriter
from tether_services.orchestrator.records import RESUMABLE_STATES, Attempt, Rollback, RunRecord, RunState
from tether_services.runtime.history import record as record_history

__all__ = ["Ledger"]

BUSY_SECONDS = 10.0
"""How long a transaction waits for one of another process unless told otherwise."""


class Ledger(LedgerWriter):
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
        super().__init__(
            state_dir, LedgerFile(state_dir / "ledger.sqlite", busy_seconds=busy_seconds), clock_ns=clock_ns
        )
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

    def begin_attempt(
        self, run_id: str, *, request_id: str = "", from_step: int | None = None, by_hand: bool = True
    ) -> Attempt:
        """Put a failed or cancelled run back to PENDING under a new epoch and return the attempt.

        Args:
            run_id: The run.
            request_id: Kept with the answer, see `find_answer`; empty: not.
            from_step: Committed steps that stay, the others are rolled back first; None: all.
            by_hand: Whether somebody asked for it: only then the rollbacks by alarms are counted anew.

        Raises:
            NotFoundError: There is no such run.
            InvalidArgumentError: It does not have so many steps.
            FailedPreconditionError: It runs or has succeeded (RUN_NOT_RESUMABLE), another is active (RUN_ACTIVE), or
                the checkpoint of that step is gone (CHECKPOINT_REMOVED) or damaged (CHECKPOINT_DAMAGED).
        """
        if from_step is not None:
            self.verify_checkpoint(run_id, from_step, field="from_step")
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
            if by_hand:
                connection.execute("UPDATE runs SET alarm_rollbacks = 0 WHERE run_id = ?", (run_id,))
            begun = ledger_runs.get_run(connection, run_id)
            ledger_runs.remember_answer(connection, request_id, "ResumeRun", begun, argument=from_step)
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
            RollbackDueError: It would have succeeded, but is to be rolled back: another attempt follows.
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
            if run.rollback_to is not None and state is RunState.SUCCEEDED:  # asked for while it wrote its report
                raise RollbackDueError("RollbackRun was called")
            rollback = ledger_rollback.settle(connection, run)
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
                (CHECKPOINT_REMOVED) or damaged (CHECKPOINT_DAMAGED).
        """
        answered = self.find_answer(request_id, method="RollbackRun", run_id=run_id, argument=to_step)
        if answered is not None:
            return answered
        stay = self.get_run(run_id).num_committed_steps - 1 if to_step is None else to_step
        self.verify_checkpoint(run_id, stay, field="to_step")
        with self._file.write() as connection:
            answered = ledger_runs.find_answer(connection, request_id, "RollbackRun", run_id, argument=to_step)
            if answered is not None:
                return answered
            rollback = ledger_rollback.request(connection, ledger_runs.get_run(connection, run_id), to_step)
            run = ledger_runs.get_run(connection, run_id)
            ledger_runs.remember_answer(connection, request_id, "RollbackRun", run, argument=to_step)
        _note(run, rollback)
        return run

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


def _note(run: RunRecord, rollback: Rollback | None) -> None:
    """Put a rollback in the history, if one is kept."""
    if rollback is not None:
        record_history("rolled_back", run=run.run_id, branch=rollback.branch, to_step=rollback.to_step)
