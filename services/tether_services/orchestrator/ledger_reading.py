"""What can be asked of the ledger. Nobody who only reads has to wait for its writer."""

from __future__ import annotations

from pathlib import Path

from tether.errors import FailedPreconditionError, TetherError
from tether_services.orchestrator import ledger_rollback, ledger_runs, ledger_steps
from tether_services.orchestrator.checkpoint_files import verify_tensors
from tether_services.orchestrator.lease import Lease
from tether_services.orchestrator.ledger_file import LedgerFile
from tether_services.orchestrator.records import Rollback, RunRecord, StepNumbers, StepRecord, StepState
from tether_services.orchestrator.run_files import RunFiles

__all__ = ["LedgerReader"]


class LedgerReader:
    """Runs and steps as they are in the file."""

    def __init__(self, state_dir: Path, file: LedgerFile) -> None:
        self.state_dir = state_dir
        self._file = file

    def directory(self, run_id: str) -> Path:
        """Return the folder of a run."""
        return self.state_dir / run_id

    def get_lease(self, run_id: str) -> Lease | None:
        """Return the lease of a run; None if nobody has taken it."""
        with self._file.read() as connection:
            return ledger_runs.read_lease(connection, run_id)

    def find_answer(
        self, request_id: str, *, method: str, run_id: str, argument: int | None = None
    ) -> RunRecord | None:
        """Return the run as a request of that id was answered; None if there was none, or the id is empty.

        Raises:
            InvalidArgumentError: REQUEST_ID_REUSED: it was another request.
        """
        with self._file.read() as connection:
            return ledger_runs.find_answer(connection, request_id, method, run_id, argument=argument)

    def get_run(self, run_id: str) -> RunRecord:
        """Return a run.

        Raises:
            NotFoundError: There is none of that id.
        """
        with self._file.read() as connection:
            return ledger_runs.get_run(connection, run_id)

    def list_runs(self, *, start: int = 0, limit: int = 200) -> list[RunRecord]:
        """Return up to `limit` runs, newest first, leaving out the first `start`."""
        query = f"SELECT {ledger_runs.RUN_COLUMNS} FROM runs ORDER BY number DESC LIMIT ? OFFSET ?"
        with self._file.read() as connection:
            return [ledger_runs.read_run(row) for row in connection.execute(query, (limit, start)).fetchall()]

    def active_run(self) -> RunRecord | None:
        """Return the run that is pending or running; None if there is none."""
        return self._find_run("state IN (?, ?)", ledger_runs.ACTIVE)

    def interrupted_run(self) -> RunRecord | None:
        """Return the newest run that a stop of the orchestrator ended and nobody resumed; None if there is none."""
        return self._find_run("interrupted = 1", ())

    def _find_run(self, condition: str, values: tuple[str, ...]) -> RunRecord | None:
        query = f"SELECT {ledger_runs.RUN_COLUMNS} FROM runs WHERE {condition} ORDER BY number DESC LIMIT 1"
        with self._file.read() as connection:
            row = connection.execute(query, values).fetchone()
        return ledger_runs.read_run(row) if row else None

    def has_open_push(self, run_id: str) -> bool:
        """Return whether the newest committed version of a run has not been recorded as in use."""
        with self._file.read() as connection:
            newest = ledger_steps.newest_push(connection, run_id)
        return newest is not None and newest[1] == "open"

    def list_steps(
        self, run_id: str, *, first_step: int = 0, limit: int = 1000, pushed_only: bool = False
    ) -> list[StepRecord]:
        """Return up to `limit` committed steps from `first_step` on, in order; `pushed_only`: of recorded pushes."""
        with self._file.read() as connection:
            return ledger_steps.list_records(
                connection, run_id, first_step=first_step, limit=limit, pushed_only=pushed_only
            )

    def list_states(self, run_id: str, *, first_step: int = 0, limit: int = 1000) -> list[StepState]:
        """Return up to `limit` committed steps from `first_step` on, with what they left behind."""
        with self._file.read() as connection:
            return ledger_steps.list_states(connection, run_id, first_step=first_step, limit=limit)

    def last_commit(self, run_id: str) -> StepState | None:
        """Return the last committed step of a run; None if it has none."""
        committed = self.get_run(run_id).num_committed_steps
        states = self.list_states(run_id, first_step=committed - 1, limit=1) if committed else []
        return states[0] if states else None

    def count_samples(self, run_id: str) -> dict[str, int]:
        """Return how many samples of a run are in each state: generated (in flight), trained, dropped, abandoned."""
        with self._file.read() as connection:
            return ledger_steps.count_sample_states(connection, run_id)

    def count_unaccounted(self, run_id: str, *, first_step: int, end_step: int) -> int:
        """Return how many samples of committed steps are neither trained on nor dropped; see `ledger_steps`."""
        with self._file.read() as connection:
            return ledger_steps.count_unaccounted(connection, run_id, first_step=first_step, end_step=end_step)

    def next_step(self, run_id: str) -> StepNumbers:
        """Return the numbers of the next step of a run."""
        with self._file.read() as connection:
            return ledger_steps.next_numbers(connection, ledger_runs.get_run(connection, run_id))

    def list_rollbacks(self, run_id: str) -> list[Rollback]:
        """Return the rollbacks of a run, oldest first."""
        with self._file.read() as connection:
            return ledger_rollback.list_rollbacks(connection, run_id)

    def list_ways_back(self, run_id: str) -> list[int]:
        """Return the numbers of steps that a run can be rolled back to: 0, and those whose checkpoint is kept."""
        with self._file.read() as connection:
            return ledger_rollback.list_ways_back(connection, run_id)

    def verify_checkpoint(self, run_id: str, to_step: int, *, field: str) -> None:
        """Refuse to go back to a number of steps whose checkpoint could not be loaded: what is newer would be lost.

        A number without a checkpoint in the ledger is left to `ledger_rollback.check_way_back`. The files are read
        outside of any transaction, since that can take long.

        Args:
            run_id: The run.
            to_step: Steps that are to stay.
            field: Name of that in the request.

        Raises:
            FailedPreconditionError: CHECKPOINT_DAMAGED: files are missing or damaged; names the other ways back.
        """
        states = self.list_states(run_id, first_step=to_step - 1, limit=1) if to_step > 0 else []
        row = states[0].checkpoint if states else None
        if row is None:
            return
        try:
            verify_tensors(RunFiles(self.directory(run_id)).find_checkpoint(row))
        except (TetherError, OSError) as error:
            ways = self.list_ways_back(run_id)
            if to_step not in ways:  # removed meanwhile
                return
            others = ", ".join(str(way) for way in ways if way != to_step)
            why = error.message.rstrip(".") if isinstance(error, TetherError) else error
            message = (
                f"The checkpoint of run {run_id!r} after {to_step} steps cannot be loaded: {why}."
                f" Nothing was taken back. It can go back to {others} (0: begin anew)."
            )
            raise FailedPreconditionError(message, field=field, reason="CHECKPOINT_DAMAGED") from error
