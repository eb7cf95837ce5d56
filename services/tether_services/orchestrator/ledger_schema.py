"""The tables of the ledger, and how the file of an earlier version gets them.

`PRAGMA user_version` holds the version of a file; files of version 1 were written without one.
"""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

from tether.errors import FailedPreconditionError

__all__ = ["SCHEMA_VERSION", "prepare"]

SCHEMA_VERSION = 2
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
_NEW_COLUMNS = {
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
_NEW_TABLES = (
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
    _upgrade_from_1(connection, state_dir)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _upgrade_from_1(connection: sqlite3.Connection, state_dir: Path) -> None:
    for table, columns in _NEW_COLUMNS.items():
        for column in columns:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    for statement in _NEW_TABLES:
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
