"""Files that are read again when they change."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from tether.errors import InvalidArgumentError
from tether_services.runtime.reloading import Reloaded

LONG_AGO = 1_000_000_000_000_000_000
"""Nanoseconds since 1970."""


class Files:
    """A file of a number, and how often it was read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "number"
        self.num_reads = 0
        self.registry = CollectorRegistry()
        self.write("1")
        stale = Gauge("stale", "x", ["file"], registry=self.registry)
        self.reloaded = Reloaded("number", [self.path], self.load, stale=stale)

    def write(self, text: str, *, time_ns: int = LONG_AGO) -> None:
        self.path.write_text(text)
        os.utime(self.path, ns=(time_ns, time_ns))

    def load(self) -> int:
        self.num_reads += 1
        try:
            return int(self.path.read_text())
        except (ValueError, OSError) as error:
            raise InvalidArgumentError("no number") from error

    def stale(self) -> float | None:
        return self.registry.get_sample_value("stale", {"file": "number"})


def test_a_file_is_read_again_when_it_changes_and_only_then(tmp_path: Path) -> None:
    files = Files(tmp_path)
    assert [files.reloaded.refresh() for _ in range(5)] == [1] * 5 and files.num_reads == 1
    files.write("2", time_ns=LONG_AGO + 1)
    assert [files.reloaded.refresh() for _ in range(5)] == [2] * 5 and files.num_reads == 2


def test_a_file_of_the_same_size_and_time_in_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    files = Files(tmp_path)
    beside = tmp_path / "beside"
    beside.write_text("3")
    os.utime(beside, ns=(LONG_AGO, LONG_AGO))
    os.replace(beside, files.path)
    assert files.reloaded.refresh() == 3


def test_a_file_that_has_just_changed_is_read_until_its_time_can_be_trusted(tmp_path: Path) -> None:
    """Two changes within one tick of the file system's clock leave the same size and time behind."""
    files = Files(tmp_path)
    files.path.write_text("4")
    assert files.reloaded.refresh() == 4
    num_reads = files.num_reads
    files.reloaded.refresh()
    assert files.num_reads == num_reads + 1
    files.write("4", time_ns=LONG_AGO + 2)
    files.reloaded.refresh()
    num_reads = files.num_reads
    files.reloaded.refresh()
    assert files.num_reads == num_reads


def test_a_broken_file_keeps_the_last_good_value_and_is_complained_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = Files(tmp_path)
    files.write("x", time_ns=LONG_AGO + 1)
    assert [files.reloaded.refresh() for _ in range(3)] == [1] * 3
    files.path.unlink()
    assert files.reloaded.refresh() == 1
    assert files.stale() == 1
    assert [record.message for record in caplog.records] == ["credentials not reloaded"]
    files.write("5", time_ns=LONG_AGO + 2)
    assert (files.reloaded.refresh(), files.stale()) == (5, 0)


def test_an_error_that_nobody_foresaw_keeps_the_last_good_value_too(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.path.unlink()
    files.path.mkdir()
    files.load = lambda: 1 // 0  # type: ignore[method-assign]
    files.reloaded._load = files.load
    assert (files.reloaded.refresh(), files.stale()) == (1, 1)


def test_a_file_that_is_broken_from_the_start_is_refused(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write("x")
    with pytest.raises(InvalidArgumentError):
        Reloaded("number", [files.path], files.load)


def test_many_threads_see_each_change_and_read_it_once(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write("7", time_ns=LONG_AGO + 1)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(files.reloaded.refresh())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [7] * 16 and files.num_reads == 2
