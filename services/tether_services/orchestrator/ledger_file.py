"""The SQLite file of the ledger: one connection to read and one to write per process, and errors that say what to do.

The connections stay open: the last one to close would remove the write-ahead log, and on a full disk the next could
not make it again, so that not even a read would succeed.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tether.errors import (
    AbortedError,
    FailedPreconditionError,
    ResourceExhaustedError,
    TetherError,
    UnavailableError,
)

__all__ = ["LedgerFile", "name_sqlite_error"]

RESERVE_BYTES = 1024 * 1024
"""Room that is given up when the disk is full, so that the end of a run can still be recorded."""
_BUSY_RETRY_SECONDS = 1.0
_FULL = frozenset({sqlite3.SQLITE_FULL})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_UNWRITABLE = frozenset(
    {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
)


class LedgerFile:
    """Transactions on one SQLite file, from any thread of this process."""

    def __init__(self, path: Path, *, busy_seconds: float) -> None:
        """Open the file, which is made where it does not exist.

        Args:
            path: The file.
            busy_seconds: How long a transaction waits for one of another process; they take milliseconds.

        Raises:
            TetherError: See `name_sqlite_error`.
        """
        self.path = path
        self._busy_seconds = busy_seconds
        self._write_lock, self._read_lock = threading.RLock(), threading.RLock()
        with _named(path):
            self._writer: sqlite3.Connection | None = self._connect()
            self._reader = self._connect()
        self.keep_reserve()

    def close(self) -> None:
        """Close both connections."""
        with self._write_lock, self._read_lock:
            if self._writer is not None:
                self._writer.close()
            self._reader.close()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection to read with; a writer is never waited for."""
        with self._read_lock, _named(self.path):
            yield self._reader

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Run a block as one transaction that no other writer can interleave with.

        Raises:
            TetherError: The block raised it, or see `name_sqlite_error`; nothing of the block stays.
        """
        with self._write_lock, _named(self.path):
            if self._writer is None:
                self._writer = self._connect()
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:  # whatever happened, nothing of the block may stay
                self._roll_back(connection)
                raise

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        """Undo what is left of a transaction; of some errors SQLite has undone it already."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:  # of no use any more; the error that led here says why, and the next write opens another
            connection.close()
            self._writer = None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
        )
        weakref.finalize(self, connection.close)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    @property
    def _reserve(self) -> Path:
        return self.path.with_name("reserve")

    def keep_reserve(self) -> None:
        """Set room aside on the disk, if there is any."""
        with suppress(OSError):  # a full disk; the next one that has room keeps it
            if self._reserve.exists() and self._reserve.stat().st_size == RESERVE_BYTES:
                return
            if shutil.disk_usage(self.path.parent).free < 2 * RESERVE_BYTES:
                return
            with self._reserve.open("wb") as file:
                file.write(b"\0" * RESERVE_BYTES)
                file.flush()
                os.fsync(file.fileno())

    def give_up_reserve(self) -> None:
        """Make the room that was set aside available."""
        self._reserve.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        named = name_sqlite_error(error, path)
        if named is None:  # a defect of the statement
            raise
        raise named from error


def name_sqlite_error(error: sqlite3.Error, path: Path) -> TetherError | None:
    """Return an error that says what is wrong with the file and the way out; None for a defect of the caller."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _FULL or (code in _UNWRITABLE and _is_full(path.parent)):
        message = f"The disk of {path} is full ({error}). What is committed is safe; free some space, then resume."
        return ResourceExhaustedError(message, reason="STORAGE_FULL")
    if code in _BUSY:
        message = f"{path} is held by another process ({error}); find it (fuser {path}) and let it go on or end it."
        return UnavailableError(message, reason="LEDGER_BUSY", retry_after_seconds=_BUSY_RETRY_SECONDS)
    if code in _DAMAGED:
        message = (
            f"{path} is damaged ({error}). Stop the orchestrator, keep a copy, and restore the file from a backup or"
            f" recover it: sqlite3 {path.name} .recover"
        )
        return FailedPreconditionError(message, reason="LEDGER_DAMAGED")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return AbortedError(f"{path} holds this already ({error}).", reason="LEDGER_CONFLICT")
    closed = isinstance(error, sqlite3.ProgrammingError) and "closed database" in str(error)
    if code in _UNWRITABLE or closed or isinstance(error, sqlite3.OperationalError):
        message = f"{path} cannot be read or written ({error}): check its permissions, its mount and its disk."
        return FailedPreconditionError(message, reason="LEDGER_UNWRITABLE")
    return None


def _is_full(folder: Path) -> bool:
    """Return whether a file could not grow or be made on this disk."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return status.f_bavail == 0 or (status.f_files > 0 and status.f_favail == 0)
