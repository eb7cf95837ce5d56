"""What the ledger does when its disk is full, its file damaged or held: a clear error, nothing lost, no run stuck."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_inputs import step_record
from tests.unit.small_disk import run_on_disk
from tether.errors import FailedPreconditionError, ResourceExhaustedError, UnavailableError
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.ledger_file import RESERVE_BYTES, LedgerFile
from tether_services.orchestrator.records import Attempt, RunState, StepRecord


def new_run(ledger: Ledger) -> Attempt:
    return ledger.create_run("demo", config_toml="x = 1", total_steps=50)


def stop_growing(ledger: Ledger, *, pages: int = 1) -> None:
    """Have SQLite report a full disk whenever the file would have to grow."""
    writer_of(ledger._file).execute(f"PRAGMA max_page_count = {pages}")


def writer_of(file: LedgerFile) -> sqlite3.Connection:
    assert file._writer is not None
    return file._writer


def large_record(step: int) -> StepRecord:
    """Return a record that does not fit on a page."""
    return StepRecord(step, step, {f"figure {number}": 0.1 for number in range(2000)})


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    ledger.commit_step(attempt, step_record(0))
    stop_growing(ledger)
    with pytest.raises(ResourceExhaustedError, match="free some space") as caught:
        ledger.commit_step(attempt, large_record(1))
    assert caught.value.reason == "STORAGE_FULL"
    assert str(tmp_path) in caught.value.message
    assert ledger.get_run("demo").num_committed_steps == 1
    writer_of(ledger._file).execute("PRAGMA max_page_count = 100000")
    ledger.commit_step(attempt, step_record(1))
    assert ledger.get_run("demo").num_committed_steps == 2


def test_an_error_inside_a_transaction_is_not_hidden_by_the_rollback(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(ZeroDivisionError), ledger._file.write() as connection:
        connection.execute("ROLLBACK")  # as SQLite does by itself for some errors
        raise ZeroDivisionError
    new_run(ledger)


class FailingConnection(sqlite3.Connection):
    """A connection to a disk that takes nothing any more from the end of a transaction on."""

    def execute(self, sql: str, *given: Any) -> sqlite3.Cursor:
        if sql in ("COMMIT", "ROLLBACK"):
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *given)


def test_a_writer_that_could_not_be_opened_again_is_opened_by_the_next_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    ledger._file._writer = sqlite3.connect(
        tmp_path / "ledger.sqlite", factory=FailingConnection, isolation_level=None, check_same_thread=False
    )

    def refuse(file: LedgerFile) -> sqlite3.Connection:
        raise sqlite3.OperationalError("unable to open database file")

    with monkeypatch.context() as patched:
        patched.setattr(LedgerFile, "_connect", refuse)
        for _ in range(3):
            with pytest.raises(FailedPreconditionError) as caught:
                new_run(ledger)
            assert caught.value.reason == "LEDGER_UNWRITABLE"
    new_run(ledger)
    assert ledger.get_run("demo").state is RunState.PENDING


def test_a_closed_connection_has_a_name_and_a_wrong_number_of_values_is_a_defect(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(sqlite3.ProgrammingError), ledger._file.write() as connection:
        connection.execute("SELECT ?", ())
    ledger.close()
    with pytest.raises(FailedPreconditionError) as caught:
        new_run(ledger)
    assert caught.value.reason == "LEDGER_UNWRITABLE"


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    new_run(ledger)
    with pytest.raises(KeyboardInterrupt), ledger._file.write() as connection:
        connection.execute("UPDATE runs SET state = 'FAILED'")
        raise KeyboardInterrupt
    assert ledger.get_run("demo").state is RunState.PENDING


def test_a_file_that_another_process_holds_is_named_after_the_wait(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, busy_seconds=0.1)
    holder = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnavailableError, match="held by another process") as caught:
        new_run(ledger)
    assert caught.value.reason == "LEDGER_BUSY"
    assert caught.value.retry_after_seconds
    assert ledger.list_runs() == [], "reading goes on"
    holder.execute("COMMIT")
    holder.close()
    new_run(ledger)


def test_a_writer_waits_for_another_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, busy_seconds=10)
    holder = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, lambda: holder.execute("COMMIT"))
    timer.start()
    new_run(ledger)
    timer.join()
    holder.close()


def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"this is no database" * 1000)
    with pytest.raises(FailedPreconditionError, match="recover") as caught:
        Ledger(tmp_path)
    assert caught.value.reason == "LEDGER_DAMAGED"


def test_the_log_of_the_file_stays_while_a_ledger_is_open(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    new_run(ledger)
    log = tmp_path / "ledger.sqlite-wal"
    before = log.stat().st_ino
    for _ in range(3):
        ledger.get_run("demo")
        ledger.request_cancel("demo")
        assert log.stat().st_ino == before


def test_many_threads_use_one_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    errors: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(20):
                ledger.get_run("demo")
                ledger.request_cancel("demo")
                ledger.list_steps("demo")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    ledger.commit_step(attempt, step_record(0))


def test_room_for_the_end_of_a_run_is_set_aside(tmp_path: Path) -> None:
    Ledger(tmp_path)
    assert (tmp_path / "reserve").stat().st_size == RESERVE_BYTES


def test_the_end_of_a_run_is_recorded_with_the_room_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    attempt = new_run(ledger)
    stop_growing(ledger)
    given_up = []

    def give_up(file: LedgerFile) -> None:
        given_up.append(file)
        writer_of(file).execute("PRAGMA max_page_count = 100000")  # what the room on the disk means to SQLite

    monkeypatch.setattr(LedgerFile, "give_up_reserve", give_up)
    assert ledger.finish(attempt, RunState.FAILED, error="x" * 100_000)
    assert given_up
    assert ledger.get_run("demo").state is RunState.FAILED


FULL_DISK = """
import os, sys
from pathlib import Path
from tests.unit.run_inputs import step_record
from tether.errors import ResourceExhaustedError
from tether_services.orchestrator import ledger as module
from tether_services.orchestrator.ledger_file import LedgerFile
from tether_services.orchestrator.records import RunState

folder, protected = Path(sys.argv[1]), sys.argv[2] == "protected"
if not protected:
    LedgerFile.keep_reserve = lambda self: None
ledger = module.Ledger(folder)
attempt = ledger.create_run("demo", config_toml="x = 1", total_steps=3)
ledger.commit_step(attempt, step_record(0))
filler = (folder / "filler").open("wb", buffering=0)
size = 65536
while size:
    try:
        filler.write(b"x" * size)
    except OSError:
        size //= 2
ended = committed = "yes"
try:
    for step in range(1, 60):
        ledger.commit_step(attempt, step_record(step))
except ResourceExhaustedError as error:
    committed = error.reason
try:
    ledger.finish(attempt, RunState.FAILED, error="STORAGE_FULL")
except ResourceExhaustedError as error:
    ended = error.reason
run = ledger.get_run("demo")
print(committed, ended, run.state.value)
os.unlink(folder / "filler")
if run.state is RunState.FAILED:
    second = ledger.begin_attempt("demo")
    ledger.commit_step(second, step_record(run.num_committed_steps))
    print("resumed after", run.num_committed_steps)
"""


def test_on_a_disk_that_is_really_full_the_run_ends_and_goes_on_later(tmp_path: Path) -> None:
    first, second = run_on_disk(tmp_path / "disk", FULL_DISK, "protected").splitlines()
    assert first == "STORAGE_FULL yes FAILED"
    assert second.startswith("resumed after ")


def test_without_the_room_set_aside_the_run_would_stay_active(tmp_path: Path) -> None:
    """The control of the test above."""
    (first,) = run_on_disk(tmp_path / "disk", FULL_DISK, "bare").splitlines()
    assert first == "STORAGE_FULL STORAGE_FULL PENDING"
