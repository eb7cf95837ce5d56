"""Folders that appear whole or not at all, whatever happens to the writer and the disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.small_disk import run_on_disk
from tether.errors import FailedPreconditionError, ResourceExhaustedError
from tether_services.runtime.durable import as_storage_error, remove_directory, sweep_leftovers, write_directory

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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is brought to the disk and renamed, in order, by path."""
    done: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        done.append(f"fsync {os.readlink(f'/proc/self/fd/{handle}')}")
        real_fsync(handle)

    def rename(self: Path, target: Path) -> Path:
        done.append(f"rename {self} {target}")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, calls: list[str]
) -> None:
    target = tmp_path / "deep" / "target"
    write_directory(target, FILES)
    (renamed,) = [number for number, call in enumerate(calls) if call.startswith("rename")]
    before, after = calls[:renamed], calls[renamed + 1 :]
    staging = calls[renamed].split()[1]
    assert before[0] == f"fsync {tmp_path}", "the new parent is known to the disk first"
    assert {f"fsync {staging}/a.json", f"fsync {staging}/b.safetensors", f"fsync {staging}"} <= set(before)
    assert after == [f"fsync {target.parent}"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceExhaustedError, match="free some space") as caught:
        write_directory(tmp_path / "target", FILES)
    assert caught.value.reason == "STORAGE_FULL"
    assert str(tmp_path / "target") in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "STORAGE_FULL"), (errno.EDQUOT, "STORAGE_FULL"), (errno.EROFS, "STORAGE_READ_ONLY")],
)
def test_errors_of_the_disk_are_told_from_others(tmp_path: Path, number: int, reason: str) -> None:
    named = as_storage_error(OSError(number, "x"), tmp_path)
    assert named is not None and named.reason == reason
    assert as_storage_error(OSError(errno.ENOENT, "x"), tmp_path) is None


def test_what_a_killed_writer_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    write_directory(tmp_path / "000001", FILES)
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tether_services.runtime import durable\n"
        "durable.flush_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"durable.write_directory(Path(sys.argv[1]) / '000002', {FILES!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".000002.")]
    assert len(left) == 1
    assert sweep_leftovers(tmp_path) == left
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]


def test_a_folder_that_is_removed_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_directory(tmp_path / "target", FILES)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed right after the rename
    remove_directory(tmp_path / "target")
    assert not (tmp_path / "target").exists()
    (left,) = tmp_path.iterdir()
    monkeypatch.undo()
    assert sweep_leftovers(tmp_path) == [left]
    assert list(tmp_path.iterdir()) == []


def test_removing_what_is_not_there_is_a_no_op(tmp_path: Path) -> None:
    remove_directory(tmp_path / "target")
    assert sweep_leftovers(tmp_path / "nowhere") == []


ON_DISK = """
import os, sys
from pathlib import Path
from tether.errors import TetherError
from tether_services.runtime.durable import remove_directory, write_directory

folder, fill = Path(sys.argv[1]), sys.argv[2]
old, new = {"weights": b"o" * 300_000}, {"weights": b"n" * 300_000, "state.json": b"{}"}
if fill != "read-only":
    write_directory(folder / "000001", old)
if fill == "bytes":
    (folder / "filler").write_bytes(b"x" * 600_000)
if fill == "files":
    fillers = []
    try:
        for number in range(100):
            (folder / f"filler-{number}").mkdir()
            fillers.append(folder / f"filler-{number}")
    except OSError:
        pass
try:
    write_directory(folder / "000002", new)
    print("written")
except TetherError as error:
    print(error.reason)
print(sorted(path.name for path in folder.iterdir() if not path.name.startswith("filler")))
if fill == "bytes":
    (folder / "filler").unlink()
if fill == "files":
    for path in fillers[-6:]:
        path.rmdir()
if fill != "read-only":
    write_directory(folder / "000002", new)
    print(sum(len(path.read_bytes()) for path in folder.glob("0*/*")))
"""


@pytest.mark.parametrize(("fill", "options"), [("bytes", "size=1m"), ("files", "size=4m,nr_inodes=20")])
def test_on_a_disk_that_is_really_full_the_old_stays_the_new_leaves_nothing_and_is_written_later(
    tmp_path: Path, fill: str, options: str
) -> None:
    first, left, size = run_on_disk(tmp_path / "disk", ON_DISK, fill, options=options).splitlines()
    assert (first, left, size) == ("STORAGE_FULL", "['000001']", "600002")


def test_a_read_only_file_system_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    remount = f"mount -o remount,ro {folder}"
    first, left = run_on_disk(folder, ON_DISK, "read-only", prepare=remount).splitlines()
    assert (first, left) == ("STORAGE_READ_ONLY", "[]")


def test_a_folder_can_be_removed_from_a_full_disk(tmp_path: Path) -> None:
    code = ON_DISK.split('try:\n    write_directory(folder / "000002"')[0]
    code += "remove_directory(folder / '000001')\nprint([p.name for p in folder.iterdir() if p.name[0] in '.0'])\n"
    for fill, options in (("bytes", "size=1m"), ("files", "size=4m,nr_inodes=20")):
        assert run_on_disk(tmp_path / fill, code, fill, options=options) == "[]\n"
