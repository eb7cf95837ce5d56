"""The adapter folder: one owner, write-once versions, no links, nothing outside, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.upload_inputs import opened
from tether.errors import InvalidArgumentError, ResourceExhaustedError
from tether_services.generator.storage import write_at
from tether_services.generator.verification import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME

TARGET = ("run-a", 3, "ab" * 32)


def test_two_owners_of_one_folder_are_refused(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(InvalidArgumentError) as caught:
        opened(tmp_path)
    assert caught.value.violations[0].field == "adapters.folder"
    first.close()
    opened(tmp_path).close()


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError):
        opened(tmp_path / "file" / "inside")


def test_start_drops_unfinished_uploads_and_keeps_versions_and_what_is_not_ours(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    storage.stage("one")
    storage.stage("two")
    kept = storage.store("two", TARGET, {MANIFEST_NAME: b"{}"})
    storage.stage("three")
    disowned = storage.store("three", TARGET, {MANIFEST_NAME: b"{}"})
    storage.disown(disowned)
    storage.disown(disowned)
    storage.close()
    (tmp_path / "notes.txt").write_text("mine")
    again = opened(tmp_path)
    assert again.find_stored() == [kept]
    assert not disowned.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "notes.txt", "staging", "versions"]
    assert list((tmp_path / "staging").iterdir()) == []
    again.close()
    again.close()


def test_what_is_set_aside_is_never_deleted(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    places = []
    for upload_id in ("one", "two"):
        storage.stage(upload_id)
        places.append(storage.set_aside(storage.store(upload_id, TARGET, {MANIFEST_NAME: b"{}"})))
    name = f"run-a-3-{'ab' * 6}"
    assert places == [tmp_path / "damaged" / name, tmp_path / "damaged" / f"{name}.2"]
    assert storage.find_stored() == []
    assert (places[1] / MANIFEST_NAME).is_file()
    storage.close()
    opened(tmp_path).close()
    assert all((place / MANIFEST_NAME).is_file() for place in places)


def test_temporary_folder_goes_with_its_owner() -> None:
    storage = opened(None)
    folder = storage.folder
    assert folder.stat().st_mode & 0o077 == 0
    storage.close()
    assert not folder.exists()


def test_staging_is_private_and_exclusive(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    folder = storage.stage("one")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    with pytest.raises(FileExistsError):
        storage.stage("one")
    storage.close()


def test_stored_version_is_write_once(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    storage.stage("one")
    folder = storage.store("one", TARGET, {CONFIG_NAME: b"two"})
    assert folder == tmp_path / "versions/run-a" / f"3-{'ab' * 6}"
    assert (folder / CONFIG_NAME).read_text() == "two"
    storage.stage("two")
    other = storage.store("two", TARGET, {CONFIG_NAME: b"four"})
    storage.stage("three")
    third = storage.store("three", TARGET, {CONFIG_NAME: b"eight"})
    assert [path.name for path in (other, third)] == [f"{folder.name}.2", f"{folder.name}.3"]
    assert (folder / CONFIG_NAME).read_text() == "two", "what an engine may still read stays as it was"
    storage.remove(folder)
    assert not folder.exists() and other.is_dir()
    storage.close()


def test_weights_reach_the_disk_before_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = opened(tmp_path)
    staged = storage.stage("one")
    write_at(staged / WEIGHTS_NAME, b"weights", 0)  # no sync: the stream broke
    done: list[str] = []
    fsync, rename = os.fsync, os.rename
    names = {path.stat().st_ino: path.name for path in [*staged.iterdir(), staged]}
    opened_before = [
        path.open("rb") for path in staged.iterdir()
    ]  # so that no later file gets the inode of one of them

    def note_fsync(descriptor: int) -> None:
        done.append(f"fsync {names.get(os.fstat(descriptor).st_ino, 'other')}")
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    storage.store("one", TARGET, {CONFIG_NAME: b"two"})
    # First the configuration, written anew: an inode of its own.
    assert done[1:] == [f"fsync {WEIGHTS_NAME}", "rename", "fsync one", "fsync other", "fsync other"]
    assert done[0].startswith("fsync ")
    storage.close()
    for file in opened_before:
        file.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = opened(tmp_path)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:3], offset))
    staged = storage.stage("one")
    write_at(staged / WEIGHTS_NAME, b"weights", 0)
    folder = storage.store("one", TARGET, {CONFIG_NAME: b"two"})
    assert (folder / WEIGHTS_NAME).read_bytes() == b"weights"
    assert (folder / CONFIG_NAME).read_text() == "two"
    storage.close()


def failing(number: int, *, after: int = 0) -> Callable[..., Any]:
    """An os function that fails from the given call on."""
    calls: list[object] = []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("made", [0, 1, 2])
def test_disk_without_room_or_inodes_leaves_no_staging_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, made: int
) -> None:
    storage = opened(tmp_path)
    fail = failing(number, after=max(0, made - 1))
    open_file = os.open

    def create(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            fail()
        return open_file(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", create)
        if made == 0:
            patch.setattr(os, "mkdir", fail)
        with pytest.raises(ResourceExhaustedError) as caught:
            storage.stage("one")
    assert caught.value.reason == "STORAGE_FULL"
    assert str(tmp_path) not in caught.value.message
    assert list((tmp_path / "staging").iterdir()) == []
    assert storage.stage("one").is_dir(), "it goes on once there is room"
    storage.close()


@pytest.mark.parametrize("function, after", [("pwrite", 0), ("rename", 0), ("fsync", 0), ("fsync", 2), ("fsync", 4)])
def test_failed_store_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, after: int
) -> None:
    storage = opened(tmp_path)
    storage.stage("one")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(errno.ENOSPC, after=after))
        with pytest.raises(ResourceExhaustedError):
            storage.store("one", TARGET, {CONFIG_NAME: b"two"})
    storage.discard("one")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "lock"]
    storage.stage("two")
    assert storage.store("two", TARGET, {}).name == f"3-{'ab' * 6}"
    storage.close()


def test_other_errors_of_the_disk_are_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = opened(tmp_path)
    storage.stage("one")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError) as caught:
        storage.store("one", TARGET, {})
    assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    storage.close()


def test_folder_outside_the_store_is_never_removed(tmp_path: Path) -> None:
    storage = opened(tmp_path / "store")
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in (outside, tmp_path / "store/versions/../../outside", tmp_path / "store/staging"):
        with pytest.raises(AssertionError):
            storage.remove(path)
    (tmp_path / "store/versions/link").symlink_to(outside)
    with pytest.raises(AssertionError):
        storage.remove(tmp_path / "store/versions/link")
    assert outside.is_dir()
    storage.close()


def test_links_are_not_followed_when_bytes_are_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("safe")
    link = tmp_path / "link"
    link.symlink_to(victim)
    with pytest.raises(OSError) as caught:
        write_at(link, b"evil", 0)
    assert caught.value.errno == errno.ELOOP
    assert victim.read_text() == "safe"


def test_what_must_stay_free_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    storage = opened(tmp_path, free_bytes=400)
    storage.check_space(600)
    with pytest.raises(ResourceExhaustedError, match="free_bytes") as caught:
        storage.check_space(601)
    assert caught.value.reason == "STORAGE_FULL"
    storage.close()
    storage = opened(tmp_path)
    with pytest.raises(ResourceExhaustedError):
        storage.check_space(1)  # 64 MiB unless set
    storage.close()


def test_quota_counts_uploads_and_versions(tmp_path: Path) -> None:
    storage = opened(tmp_path, free_bytes=0, quota_bytes=100)
    assert storage.usage_bytes() == 0
    storage.check_space(100)
    write_at(storage.stage("one") / WEIGHTS_NAME, b"x" * 30, 0)
    storage.store("one", TARGET, {CONFIG_NAME: b"{}"})
    write_at(storage.stage("two") / WEIGHTS_NAME, b"x" * 8, 0)
    assert storage.usage_bytes() == 40
    storage.check_space(60)
    with pytest.raises(ResourceExhaustedError, match="quota_bytes") as caught:
        storage.check_space(61)
    assert caught.value.reason == "STORAGE_FULL"
    storage.discard("two")
    storage.check_space(61)
    storage.close()
