"""Statements that take committed steps back. All are called in a transaction.

The steps move to `rolled_back_steps`, so that `steps` holds each number once. Their versions stay used: what is made
again gets new ones. A rollback of an active run is kept in `runs` until its worker has stopped, and is made in the
transaction that ends its attempt or begins the next one: nobody ever writes to a branch that is not there any more.
"""

from __future__ import annotations

import sqlite3
import time

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.orchestrator.records import FINAL_STATES, Rollback, RunRecord, RunState

__all__ = ["ask_for_alarm", "check_way_back", "list_rollbacks", "list_ways_back", "request", "roll_back", "settle"]

_STEP_COLUMNS = """
    run_id, step, epoch, policy_version, new_version, adapter_sha256, asked, generated, trained, dropped, metrics,
    distributions, commit_time
"""


def list_ways_back(connection: sqlite3.Connection, run_id: str) -> list[int]:
    """Return the numbers of steps that a run can be rolled back to: 0, and those whose checkpoint is kept."""
    query = """
        SELECT step + 1 FROM steps JOIN checkpoints ON checkpoints.run_id = steps.run_id
            AND checkpoints.version = steps.new_version AND checkpoints.state = 'durable'
        WHERE steps.run_id = ? ORDER BY step
    """
    return [0, *(row[0] for row in connection.execute(query, (run_id,)).fetchall())]


def check_way_back(connection: sqlite3.Connection, run: RunRecord, to_step: int, *, field: str) -> None:
    """Refuse a number of steps that a run cannot be rolled back to.

    Args:
        connection: In a transaction.
        run: The run.
        to_step: Steps that are to stay.
        field: Name of that in the request.

    Raises:
        InvalidArgumentError: The run does not have so many.
        FailedPreconditionError: CHECKPOINT_REMOVED: the checkpoint of that step is gone; names those that are there.
    """
    if not 0 <= to_step <= run.num_committed_steps:
        message = f"{to_step} is not a number of its {run.num_committed_steps} committed steps."
        raise InvalidArgumentError(message, field=field)
    ways = list_ways_back(connection, run.run_id)
    if to_step not in (*ways, run.num_committed_steps):
        kept = ", ".join(map(str, ways))
        message = (
            f"The checkpoint of run {run.run_id!r} after {to_step} steps is not kept any more; it can go back to {kept}"
            " (0: begin anew)."
        )
        raise FailedPreconditionError(message, field=field, reason="CHECKPOINT_REMOVED")


def request(connection: sqlite3.Connection, run: RunRecord, to_step: int | None) -> Rollback | None:
    """Roll a run back if it has ended, and return that; else have it done once its worker has stopped.

    Args:
        connection: In a transaction.
        run: The run.
        to_step: Committed steps that are to stay; None: all but the last one.

    Raises:
        InvalidArgumentError: There is no step after those.
        FailedPreconditionError: RUN_ENDED: it has succeeded; or see `check_way_back`.
    """
    if run.state is RunState.SUCCEEDED:
        message = f"Run {run.run_id!r} has succeeded and cannot be rolled back; start a new run."
        raise FailedPreconditionError(message, field="run_id", reason="RUN_ENDED")
    stay = run.num_committed_steps - 1 if to_step is None else to_step
    if not 0 <= stay < run.num_committed_steps:
        message = f"Run {run.run_id!r} has {run.num_committed_steps} committed steps; fewer must stay."
        raise InvalidArgumentError(message, field="to_step")
    check_way_back(connection, run, stay, field="to_step")
    if run.state in FINAL_STATES:
        return roll_back(connection, run, stay, reason="RollbackRun")
    _ask(connection, run, stay, reason="RollbackRun")
    return None


def ask_for_alarm(connection: sqlite3.Connection, run: RunRecord, to_step: int, *, reason: str, most: int) -> None:
    """Have a run rolled back for an alarm once its worker has stopped, and count that.

    Raises:
        FailedPreconditionError: ALARM: it was done `most` times already, or no committed step would be taken back, so
            that the same step would follow; or see `check_way_back`.
    """
    query = "SELECT alarm_rollbacks FROM runs WHERE run_id = ?"
    (rolled_back,) = connection.execute(query, (run.run_id,)).fetchone()
    if rolled_back >= most:
        message = f"alarms have rolled the run back {rolled_back} times already (alarms.max_rollbacks)"
        raise FailedPreconditionError(message, reason="ALARM")
    if to_step >= run.num_committed_steps:
        raise FailedPreconditionError("no committed step could be taken back", reason="ALARM")
    check_way_back(connection, run, to_step, field="alarms.rollback_steps")
    _ask(connection, run, to_step, reason=reason)
    connection.execute("UPDATE runs SET alarm_rollbacks = alarm_rollbacks + 1 WHERE run_id = ?", (run.run_id,))


def _ask(connection: sqlite3.Connection, run: RunRecord, to_step: int, *, reason: str) -> None:
    """Keep what is to be rolled back once the worker has stopped; of two wishes the further one counts."""
    if run.rollback_to is None or to_step < run.rollback_to:
        connection.execute(
            "UPDATE runs SET rollback_to = ?, rollback_reason = ? WHERE run_id = ?", (to_step, reason, run.run_id)
        )


def settle(connection: sqlite3.Connection, run: RunRecord) -> Rollback | None:
    """Make the rollback that a run was asked for, and return it; None if there is none to make."""
    if run.rollback_to is None:
        return None
    query = "SELECT rollback_reason FROM runs WHERE run_id = ?"
    (reason,) = connection.execute(query, (run.run_id,)).fetchone()
    return roll_back(connection, run, run.rollback_to, reason=reason)


def roll_back(connection: sqlite3.Connection, run: RunRecord, to_step: int, *, reason: str) -> Rollback | None:
    """Take back all steps of a run but the first `to_step`, and return that; None if it has no more than those.

    Their samples are abandoned, their checkpoints removed, and their versions are pushed to nobody any more.
    What the generator serves changes when the next attempt takes the run up.
    """
    connection.execute("UPDATE runs SET rollback_to = NULL, rollback_reason = '' WHERE run_id = ?", (run.run_id,))
    if to_step >= run.num_committed_steps:
        return None
    rollback = Rollback(run.branch + 1, run.num_committed_steps, to_step, reason, time.time())
    key = (run.run_id, to_step)
    versions = "SELECT new_version FROM steps WHERE run_id = ? AND step >= ?"
    for table, state in (("checkpoints", "removed"), ("pushes", "rolled_back")):
        connection.execute(
            f"UPDATE {table} SET state = '{state}' WHERE run_id = ? AND version IN ({versions})", (run.run_id, *key)
        )
    connection.execute(
        "UPDATE samples SET state = 'abandoned', reason = 'rolled_back'"
        " WHERE run_id = ? AND step >= ? AND state IN ('trained', 'generated')",
        key,
    )
    connection.execute(
        f"INSERT INTO rolled_back_steps ({_STEP_COLUMNS}, branch)"
        f" SELECT {_STEP_COLUMNS}, ? FROM steps WHERE run_id = ? AND step >= ?",
        (rollback.branch, *key),
    )
    connection.execute("DELETE FROM steps WHERE run_id = ? AND step >= ?", key)
    connection.execute(
        "INSERT INTO rollbacks (run_id, branch, from_step, to_step, reason, time) VALUES (?, ?, ?, ?, ?, ?)",
        (run.run_id, rollback.branch, rollback.from_step, to_step, reason, rollback.time),
    )
    connection.execute(
        "UPDATE runs SET branch = ?, committed_steps = ? WHERE run_id = ?", (rollback.branch, to_step, run.run_id)
    )
    return rollback


def list_rollbacks(connection: sqlite3.Connection, run_id: str) -> list[Rollback]:
    """Return the rollbacks of a run, oldest first."""
    query = "SELECT branch, from_step, to_step, reason, time FROM rollbacks WHERE run_id = ? ORDER BY branch"
    return [Rollback(*row) for row in connection.execute(query, (run_id,)).fetchall()]
