"""Statements about runs, and the checks that fence off everyone but the one writer. All are called in a transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import asdict
from typing import Any

from tether.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.orchestrator.lease import Lease, boot_id, is_alive
from tether_services.orchestrator.records import ACTIVE_STATES, FINAL_STATES, Attempt, RunIdentity, RunRecord, RunState

__all__ = [
    "ACTIVE",
    "RUN_COLUMNS",
    "check_epoch",
    "check_lease",
    "check_writer",
    "find_answer",
    "get_run",
    "pin",
    "put_lease",
    "read_lease",
    "read_run",
    "refuse_while_active",
    "remember_answer",
    "request_cancel",
]

RUN_COLUMNS = """
    run_id, state, epoch, committed_steps, total_steps, policy_version, error, cancel_requested, create_time, end_time,
    config_toml, branch, rollback_to
"""
KEPT_ANSWER_SECONDS = 7 * 86400.0
"""Far longer than anybody repeats a request."""
_PINS = {
    "base_sha256": ("BASE_CHANGED", "`model` names a base model", "put the old files back"),
    "reward_sha256": ("REWARD_MODEL_CHANGED", "the reward service serves a model", "have it serve the old one"),
    "prompts_sha256": (
        "PROMPTS_CHANGED",
        "the prompts (`prompts`, `evaluation_prompts`, `ppo.ptx_text`, as the tokenizer reads them) are",
        "put the old files back",
    ),
}
"""Column -> (reason, what has changed, the way out)."""
ACTIVE = tuple(sorted(state.value for state in ACTIVE_STATES))


def get_run(connection: sqlite3.Connection, run_id: str) -> RunRecord:
    """Return a run.

    Raises:
        NotFoundError: There is none of that id.
    """
    row = connection.execute(f"SELECT {RUN_COLUMNS} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    if row is None:
        raise NotFoundError(f"There is no run named {run_id!r}.", field="run_id", reason="RUN_NOT_FOUND")
    return read_run(row)


def read_run(row: tuple[Any, ...]) -> RunRecord:
    """Return a row of RUN_COLUMNS as a run."""
    run_id, state, epoch, committed, total, version, error, cancel, *rest = row
    return RunRecord(run_id, RunState(state), epoch, committed, total, version, error, bool(cancel), *rest)


def pin(connection: sqlite3.Connection, run_id: str, identity: RunIdentity) -> None:
    """Keep the hashes of an identity where a run has none, and compare them where it has.

    Raises:
        FailedPreconditionError: BASE_CHANGED, REWARD_MODEL_CHANGED or PROMPTS_CHANGED, with both hashes.
    """
    for column, (reason, what, way_out) in _PINS.items():
        now: str = getattr(identity, column)
        (pinned,) = connection.execute(f"SELECT {column} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        if pinned and now != pinned:
            message = (
                f"{what} of hash {now}, the run began with {pinned}: {way_out} and resume,"
                " or start a new run with what is there now"
            )
            raise FailedPreconditionError(message, reason=reason)
        connection.execute(f"UPDATE runs SET {column} = ? WHERE run_id = ?", (now, run_id))


def refuse_while_active(connection: sqlite3.Connection) -> None:
    """Refuse to begin a run beside an active one.

    Raises:
        FailedPreconditionError: RUN_ACTIVE.
    """
    row = connection.execute("SELECT run_id, state FROM runs WHERE state IN (?, ?)", ACTIVE).fetchone()
    if row:
        message = f"Run {row[0]!r} is {row[1]} and uses the trainer; wait for its end or cancel it."
        raise FailedPreconditionError(message, field="run_id", reason="RUN_ACTIVE")


def request_cancel(connection: sqlite3.Connection, run: RunRecord) -> None:
    """Ask the worker of an active run to stop.

    Raises:
        FailedPreconditionError: RUN_ENDED: it has succeeded or failed.
    """
    if run.state in FINAL_STATES - {RunState.CANCELLED}:
        message = f"Run {run.run_id!r} has ended already: {run.state.value}."
        raise FailedPreconditionError(message, field="run_id", reason="RUN_ENDED")
    if run.state is not RunState.CANCELLED:
        connection.execute("UPDATE runs SET cancel_requested = 1 WHERE run_id = ?", (run.run_id,))


def check_epoch(connection: sqlite3.Connection, attempt: Attempt) -> RunRecord:
    """Return the run of an attempt that is still its latest and goes on.

    Raises:
        AbortedError: STALE_EPOCH.
    """
    run = get_run(connection, attempt.run_id)
    if run.epoch != attempt.epoch or run.state in FINAL_STATES:
        message = (
            f"Attempt {attempt.epoch} of run {run.run_id!r} is over: attempt {run.epoch} is {run.state.value}."
            " This worker must stop."
        )
        raise AbortedError(message, reason="STALE_EPOCH")
    return run


def check_writer(connection: sqlite3.Connection, attempt: Attempt, own: Lease | None) -> RunRecord:
    """Return the run of an attempt if the caller is its one writer.

    Args:
        connection: In a transaction.
        attempt: What the caller works on.
        own: The lease that the caller has taken; None: none, and nobody else may hold one.

    Raises:
        AbortedError: STALE_EPOCH, or LEASE_LOST: another process has the run.
    """
    run = check_epoch(connection, attempt)
    check_lease(connection, attempt.run_id, own)
    return run


def check_lease(connection: sqlite3.Connection, run_id: str, own: Lease | None) -> None:
    """Refuse a caller that is not the holder of a run's lease.

    An own lease that has expired and that nobody has taken since is as good as before.

    Raises:
        AbortedError: LEASE_LOST.
    """
    held = read_lease(connection, run_id)
    if own is None and held is None:
        return
    if own is None or held is None or (held.epoch, held.holder, held.boot_id) != (own.epoch, own.holder, own.boot_id):
        holder = f"process {held.holder} of attempt {held.epoch}" if held else "nobody"
        message = f"The lease of run {run_id!r} is held by {holder}. This worker must stop."
        raise AbortedError(message, reason="LEASE_LOST")


def read_lease(connection: sqlite3.Connection, run_id: str) -> Lease | None:
    """Return the lease of a run; None if nobody has taken it."""
    query = "SELECT run_id, epoch, holder, boot_id, expires_ns FROM leases WHERE run_id = ?"
    row = connection.execute(query, (run_id,)).fetchone()
    return Lease(*row) if row else None


def put_lease(connection: sqlite3.Connection, lease: Lease, *, now_ns: int) -> None:
    """Record a lease in the place of one that nobody holds any more.

    Raises:
        AbortedError: LEASE_HELD: another process holds it.
    """
    held = read_lease(connection, lease.run_id)
    if held is not None and held.holder != lease.holder and not _is_over(held, now_ns):
        message = f"Process {held.holder} holds the lease of run {lease.run_id!r} for attempt {held.epoch}."
        raise AbortedError(message, reason="LEASE_HELD")
    connection.execute(
        "INSERT OR REPLACE INTO leases (run_id, epoch, holder, boot_id, expires_ns) VALUES (?, ?, ?, ?, ?)",
        (lease.run_id, lease.epoch, lease.holder, lease.boot_id, lease.expires_ns),
    )


def _is_over(lease: Lease, now_ns: int) -> bool:
    return lease.boot_id != boot_id() or lease.expires_ns <= now_ns or not is_alive(lease)


def find_answer(
    connection: sqlite3.Connection, request_id: str, method: str, run_id: str, *, argument: int | None = None
) -> RunRecord | None:
    """Return what a request was answered with; None if there was none of that id, or the id is empty.

    Args:
        connection: To read with.
        request_id: Of the request.
        method: That was called.
        run_id: Of the run that it was called for.
        argument: What else it was called with: the steps that stay.

    Raises:
        InvalidArgumentError: REQUEST_ID_REUSED: it was another request.
    """
    query = "SELECT method, run_id, answer FROM requests WHERE request_id = ?"
    row = connection.execute(query, (request_id,)).fetchone() if request_id else None
    if row is None:
        return None
    if row[:2] != (method, run_id):
        message = f"This request_id was used for {row[0]} of run {row[1]!r}; every request needs a new one."
        raise InvalidArgumentError(message, field="request_id", reason="REQUEST_ID_REUSED")
    answer = json.loads(row[2])
    before = answer.pop("argument", argument)  # files of earlier programs have none
    if before != argument:
        message = f"This request_id was used for {method} with other steps to stay; every request needs a new one."
        raise InvalidArgumentError(message, field="request_id", reason="REQUEST_ID_REUSED")
    return RunRecord(**answer | {"state": RunState(answer["state"])})


def remember_answer(
    connection: sqlite3.Connection, request_id: str, method: str, run: RunRecord, *, argument: int | None = None
) -> None:
    """Keep the answer to a request, in the transaction of its effect; an empty id is not remembered."""
    if not request_id:
        return
    now = time.time()
    connection.execute("DELETE FROM requests WHERE time < ?", (now - KEPT_ANSWER_SECONDS,))
    answer = json.dumps(asdict(run) | {"state": run.state.value, "argument": argument})
    connection.execute(
        "INSERT INTO requests (request_id, method, run_id, answer, time) VALUES (?, ?, ?, ?, ?)",
        (request_id, method, run.run_id, answer, now),
    )
