"""The tables of the ledger, and how the file of an earlier version gets them.

`PRAGMA user_version` holds the version of a file; files of version 1 were written without one. Version 2 brought
samples, checkpoints, pushes and leases, version 3 rollbacks.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from tether.errors import FailedPreconditionError

__all__ = ["SCHEMA_VERSION", "prepare"]

SCHEMA_VERSION = 3
_RUNS = """
CREATE TABLE runs (
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
)
"""
_STEPS = """
CREATE TABLE steps (
    run_id TEXT NOT NULL REFERENCES runs (run_id),
    step INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    policy_version INTEGER NOT NULL,
    metrics TEXT NOT NULL,
    distributions TEXT NOT NULL,
    commit_time REAL NOT NULL,
    PRIMARY KEY (run_id, step)
)
"""
VERSION_1 = (_RUNS, _STEPS)
_COLUMNS_OF_2 = {
    "runs": (
        "committed_steps INTEGER NOT NULL DEFAULT 0",
        "base_sha256 TEXT NOT NULL DEFAULT ''",
        "reward_sha256 TEXT NOT NULL DEFAULT ''",
        "prompts_sha256 TEXT NOT NULL DEFAULT ''",
        "restarts INTEGER NOT NULL DEFAULT 0",  # automatic ones since the last committed step
        "interrupted INTEGER NOT NULL DEFAULT 0",  # 1: ended by a stop of the orchestrator
    ),
    "steps": (
        "adapter_sha256 TEXT NOT NULL DEFAULT ''",
        "asked INTEGER NOT NULL DEFAULT 0",
        "generated INTEGER NOT NULL DEFAULT 0",
        "trained INTEGER NOT NULL DEFAULT 0",
        "dropped TEXT NOT NULL DEFAULT '{}'",
    ),
}
_TABLES_OF_2 = (
    # Every completion that arrived. It is trained on at most once: the index refuses a second time.
    """
    CREATE TABLE samples (
        run_id TEXT NOT NULL,
        step INTEGER NOT NULL,
        sample INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        prompt_sha256 TEXT NOT NULL,
        policy_version INTEGER NOT NULL,
        adapter_sha256 TEXT NOT NULL,
        tokens INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('generated', 'trained', 'dropped', 'abandoned')),
        reason TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (run_id, step, sample, epoch)
    ) WITHOUT ROWID
    """,
    "CREATE UNIQUE INDEX trained_once ON samples (run_id, step, sample) WHERE state = 'trained'",
    """
    CREATE TABLE checkpoints (
        run_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        path TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('durable', 'removed')),
        create_time REAL NOT NULL,
        PRIMARY KEY (run_id, version)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE pushes (
        run_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        adapter_sha256 TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('open', 'active')),
        time REAL NOT NULL,
        PRIMARY KEY (run_id, version)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE leases (
        run_id TEXT PRIMARY KEY,
        epoch INTEGER NOT NULL,
        holder TEXT NOT NULL,
        boot_id TEXT NOT NULL,
        expires_ns INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE requests (
        request_id TEXT PRIMARY KEY,
        method TEXT NOT NULL,
        run_id TEXT NOT NULL,
        answer TEXT NOT NULL,
        time REAL NOT NULL
    ) WITHOUT ROWID
    """,
)


def _added(columns_by_table: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(
        f"ALTER TABLE {table} ADD COLUMN {column}" for table, columns in columns_by_table.items() for column in columns
    )


FROM_1_TO_2 = (*_added(_COLUMNS_OF_2), *_TABLES_OF_2)
_COLUMNS_OF_3 = {
    "runs": (
        "branch INTEGER NOT NULL DEFAULT 0",  # rollbacks so far
        "rollback_to INTEGER",  # steps that are to stay, of a rollback that is made once the worker has stopped
        "rollback_reason TEXT NOT NULL DEFAULT ''",
        "alarm_rollbacks INTEGER NOT NULL DEFAULT 0",  # since somebody started or resumed the run
    ),
    # Versions go on counting where steps are made again: a version never stands for two contents.
    "steps": ("new_version INTEGER NOT NULL DEFAULT 0",),
}
_STATEMENTS_OF_3 = (
    "UPDATE steps SET new_version = step + 1",
    "CREATE UNIQUE INDEX made_once ON steps (run_id, new_version)",
    """
    CREATE TABLE rollbacks (
        run_id TEXT NOT NULL,
        branch INTEGER NOT NULL,
        from_step INTEGER NOT NULL,
        to_step INTEGER NOT NULL,
        reason TEXT NOT NULL,
        time REAL NOT NULL,
        PRIMARY KEY (run_id, branch)
    ) WITHOUT ROWID
    """,
    # Rows of `steps` that do not count any more, with the branch that they were rolled back by.
    """
    CREATE TABLE rolled_back_steps (
        run_id TEXT NOT NULL,
        step INTEGER NOT NULL,
        branch INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        policy_version INTEGER NOT NULL,
        new_version INTEGER NOT NULL,
        adapter_sha256 TEXT NOT NULL,
        asked INTEGER NOT NULL,
        generated INTEGER NOT NULL,
        trained INTEGER NOT NULL,
        dropped TEXT NOT NULL,
        metrics TEXT NOT NULL,
        distributions TEXT NOT NULL,
        commit_time REAL NOT NULL,
        PRIMARY KEY (run_id, new_version)
    ) WITHOUT ROWID
    """,
    "ALTER TABLE pushes RENAME TO pushes_of_2",
    """
    CREATE TABLE pushes (
        run_id TEXT NOT NULL,
        version INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        adapter_sha256 TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('open', 'active', 'rolled_back')),
        time REAL NOT NULL,
        PRIMARY KEY (run_id, version)
    ) WITHOUT ROWID
    """,
    "INSERT INTO pushes SELECT * FROM pushes_of_2",
    "DROP TABLE pushes_of_2",
)


def prepare(connection: sqlite3.Connection, state_dir: Path) -> None:
    """Give the file the tables of this version. To be called in a transaction.

    Raises:
        FailedPreconditionError: LEDGER_NEWER: a later version of tether has written it.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        path = state_dir / "ledger.sqlite"
        message = f"{path} is of version {version}, this program reads {SCHEMA_VERSION}: upgrade the program."
        raise FailedPreconditionError(message, field="state_dir", reason="LEDGER_NEWER")
    is_empty = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone() is None
    if is_empty:
        for statement in VERSION_1:
            connection.execute(statement)
    if version < 2:
        _upgrade_from_1(connection, state_dir)
    _upgrade_from_2(connection)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _upgrade_from_2(connection: sqlite3.Connection) -> None:
    for statement in (*_added(_COLUMNS_OF_3), *_STATEMENTS_OF_3):
        connection.execute(statement)


def _upgrade_from_1(connection: sqlite3.Connection, state_dir: Path) -> None:
    for statement in FROM_1_TO_2:
        connection.execute(statement)
    connection.execute(
        "UPDATE runs SET committed_steps = (SELECT COUNT(*) FROM steps WHERE steps.run_id = runs.run_id)"
    )
    for run_id, step, epoch, commit_time in connection.execute(
        "SELECT run_id, step, epoch, commit_time FROM steps"
    ).fetchall():
        _adopt_checkpoint(connection, state_dir, run_id, step + 1, epoch, commit_time)
    _adopt_counts(connection)


def _adopt_checkpoint(
    connection: sqlite3.Connection, state_dir: Path, run_id: str, version: int, epoch: int, commit_time: float
) -> None:
    """Record the checkpoint of a step of version 1 if it is still there."""
    path = f"checkpoints/{version:06d}"
    folder = state_dir / run_id / path
    state_file = folder / "state.json"
    if not state_file.is_file():
        return
    size = sum(file.stat().st_size for file in folder.iterdir())
    connection.execute(
        "INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, 'durable', ?)",
        (run_id, version, epoch, path, hashlib.sha256(state_file.read_bytes()).hexdigest(), size, commit_time),
    )


def _adopt_counts(connection: sqlite3.Connection) -> None:
    """Take the counts of the steps of version 1 from their figures."""
    connection.execute(
        """
        UPDATE steps SET
            generated = COALESCE(CAST(json_extract(metrics, '$.samples_generated') AS INTEGER), 0),
            trained = COALESCE(CAST(json_extract(metrics, '$.samples_trained') AS INTEGER), 0),
            asked = COALESCE(CAST(json_extract(metrics, '$.samples_generated') AS INTEGER), 0),
            dropped = (
                SELECT json_group_object(substr(each.key, 9), CAST(each.value AS INTEGER))
                FROM json_each(steps.metrics) AS each
                WHERE each.key LIKE 'dropped!_%' ESCAPE '!' AND each.value > 0
            )
        """
    )
