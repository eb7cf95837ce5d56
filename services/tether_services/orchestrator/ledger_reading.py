"""What can be asked of the ledger. Nobody who only reads has to wait for its writer."""

from __future__ import annotations

from pathlib import Path

from tether_services.orchestrator import ledger_rollback, ledger_runs, ledger_steps
from tether_services.orchestrator.lease import Lease
from tether_services.orchestrator.ledger_file import LedgerFile
from tether_services.orchestrator.records import Rollback, RunRecord, StepNumbers, StepRecord, StepState

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

    def find_answer(self, request_id: str, *, method: str, run_id: str) -> RunRecord | None:
        """Return the run as a request of that id was answered; None if there was none, or the id is empty.

        Raises:
            InvalidArgumentError: REQUEST_ID_REUSED: it was another request.
        """
        with self._file.read() as connection:
            return ledger_runs.find_answer(connection, request_id, method, run_id)

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
