"""What the worker of an attempt writes to the ledger. Every write names its attempt and holds the lease of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection

from tether_services.orchestrator import ledger_rollback, ledger_runs, ledger_steps
from tether_services.orchestrator.lease import Lease, boot_id, own_holder
from tether_services.orchestrator.ledger_file import LedgerFile
from tether_services.orchestrator.ledger_reading import LedgerReader
from tether_services.orchestrator.records import (
    Attempt,
    CheckpointRow,
    RunIdentity,
    RunRecord,
    RunState,
    SampleRow,
    StepOutcome,
    StepRecord,
)
from tether_services.runtime.fault_points import reach

__all__ = ["LedgerWriter"]


class LedgerWriter(LedgerReader):
    """Leases, and the steps of a run with what belongs to them."""

    def __init__(self, state_dir: Path, file: LedgerFile, *, clock_ns: Callable[[], int]) -> None:
        super().__init__(state_dir, file)
        self._clock_ns = clock_ns
        self._leases: dict[str, Lease] = {}

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

    def ask_rollback(self, attempt: Attempt, *, to_step: int, reason: str, most: int) -> None:
        """Have a run rolled back for an alarm once its worker, the caller, has stopped.

        Args:
            attempt: Of the caller.
            to_step: Committed steps that stay.
            reason: Which alarm it is for.
            most: How often that may be done without anybody resuming the run.

        Raises:
            AbortedError: See `mark_running`.
            FailedPreconditionError: CHECKPOINT_REMOVED or CHECKPOINT_DAMAGED, or ALARM: it was done so often already,
                or no step can be taken back.
        """
        self.verify_checkpoint(attempt.run_id, to_step, field="alarms.rollback_steps")
        with self._file.write() as connection:
            run = self._check_writer(connection, attempt)
            ledger_rollback.ask_for_alarm(connection, run, to_step, reason=reason, most=most)

    def _check_writer(self, connection: Connection, attempt: Attempt) -> RunRecord:
        return ledger_runs.check_writer(connection, attempt, self._leases.get(attempt.run_id))
