from __future__ import annotations

from pathlib import Path

import pytest

from tether.errors import FailedPreconditionError
from tether_services.runtime.durable import write_directory

FILES = {"a.json": b"{}", "b.safetensors": b"\x00" * 100}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_directory_appears_with_all_its_files_and_no_leftovers(tmp_path: Path) -> None:
    write_directory(tmp_path / "deep" / "target", FILES)
    assert contents(tmp_path / "deep" / "target") == FILES
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["target"]


def test_the_same_content_again_is_a_no_op(tmp_path: Path) -> None:
    write_directory(tmp_path / "target", FILES)
    before = (tmp_path / "target" / "a.json").stat().st_mtime_ns
    write_directory(tmp_path / "target", FILES)
    assert (tmp_path / "target" / "a.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("files", [FILES | {"a.json": b"[]"}, FILES | {"c": b""}, {"a.json": b"{}"}])
def test_other_content_is_refused_and_kept(tmp_path: Path, files: dict[str, bytes]) -> None:
    write_directory(tmp_path / "target", FILES)
    with pytest.raises(FailedPreconditionError):
        write_directory(tmp_path / "target", files)
    assert contents(tmp_path / "target") == FILES


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("a file")
    with pytest.raises(FailedPreconditionError):
        write_directory(tmp_path / "target", FILES)


def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_directory(tmp_path / "target", {"a.json": b"{}", "missing-folder/b": b""})
    assert list(tmp_path.iterdir()) == []
