"""Writes what a scenario does and sees as history lines, and reads the ledger of an orchestrator into such lines."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Awaitable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import grpc.aio

from tests.reliability.checker import Line, Verdict, check, read_history
from tether.errors import TetherError
from tether.orchestrator import Run

__all__ = ["STATE_FILES", "WEIGHTS", "Recorder", "dump_ledger", "hash_file"]

T = TypeVar("T")
STATE_FILES: Final = ("weights.safetensors", "optimiser.safetensors")
"""Of a checkpoint: what the trainer continues from, random state included."""
WEIGHTS: Final = "adapter_model.safetensors"


class Recorder:
    """Appends to one history file; the processes of the scenario may append to it too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._calls = itertools.count(1)

    def record(self, kind: str, **fields: object) -> None:
        """Append a line."""
        line = {"t": time.monotonic(), "pid": os.getpid(), "kind": kind, **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def add(self, lines: Iterator[Line]) -> None:
        """Append lines as they are."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    async def call(self, method: str, deadline_seconds: float, answer: Awaitable[T]) -> T:
        """Return the answer of a call, recording when it was sent and how it ended.

        Args:
            method: Its name.
            deadline_seconds: The deadline that the call carries.
            answer: The call.
        """
        number, code = f"{os.getpid()}-{next(self._calls)}", "OK"
        self.record("sent", call=number, method=method, deadline_seconds=deadline_seconds)
        try:
            return await answer
        except TetherError as error:
            code = error.code.name
            raise
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            raise
        except BaseException as error:  # not an answer of the contract at all: recorded as what it is
            code = type(error).__name__
            raise
        finally:
            self.record("ended", call=number, code=code)

    async def observe(self, get_run: Awaitable[Run]) -> Run:
        """Return a run, recording how many steps of it are committed, and when that was asked."""
        asked = time.monotonic()
        run = await get_run
        self.record("observed", run=run.run_id, committed=run.committed_step_count, asked=asked)
        return run

    def observe_states(self, run_folder: Path, *, run: str, like: str) -> None:
        """Record the hashes of all adapters and checkpoints that a run has kept."""
        for folder in sorted(run_folder.glob("adapters/[0-9]*")):
            version = _version(folder)
            self.record(
                "state", like=like, run=run, policy_version=version, part="adapter", sha256=hash_file(folder / WEIGHTS)
            )
        for folder in sorted(run_folder.glob("checkpoints/[0-9]*")):
            for name in STATE_FILES:
                digest = hash_file(folder / name)
                self.record("state", like=like, run=run, policy_version=_version(folder), part=name, sha256=digest)

    def judge(self) -> Verdict:
        """Return the checker's verdict on everything recorded so far."""
        return check(read_history(self.path))


def _version(folder: Path) -> int:
    """Return the version that a folder is of: 7 for `000007` and `000007-e3`."""
    return int(folder.name.partition("-")[0])


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file; of a missing one that it is missing."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def dump_ledger(state_dir: Path, run: Run) -> Iterator[Line]:
    """Yield the ledger's rows of a run as history lines, read by SQL and not by the product's code.

    Args:
        state_dir: Holds ledger.sqlite.
        run: What the orchestrator says about it.
    """
    state = {"run": run.run_id, "state": run.state.upper()}
    yield {"kind": "ledger_run", **state, "committed": run.committed_step_count, "total": run.total_step_count}
    with closing(sqlite3.connect(f"file:{state_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
        for table, kind, names in (
            ("steps", "ledger_step", ("step", "epoch", "branch", "rolled_back")),
            ("samples", "ledger_sample", ("step", "sample", "state", "branch", "epoch")),
        ):
            for row in _rows(connection, table, names, run.run_id):
                yield {"kind": kind, "run": run.run_id, **row}


def _rows(connection: sqlite3.Connection, table: str, names: tuple[str, ...], run_id: str) -> Iterator[dict[str, Any]]:
    """Yield the named columns, as far as the table has them."""
    known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    columns = [name for name in names if name in known]
    if columns:
        query = f"SELECT {', '.join(columns)} FROM {table} WHERE run_id = ? ORDER BY rowid"
        if table == "samples":
            query = query.replace(" ORDER BY rowid", " ORDER BY step, sample")
        for row in connection.execute(query, (run_id,)):
            yield dict(zip(columns, row, strict=True))
