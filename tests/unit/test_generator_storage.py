"""The adapter folder: one owner, write-once versions, no links, nothing outside."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from tether_services.generator.storage import AdapterStorage, write_at
from tether_services.generator.uploads import MAX_OPEN_UPLOADS, Declaration, DeclaredFile, Upload, Uploads
from tether_services.generator.verification import CONFIG_NAME, WEIGHTS_NAME

TARGET = ("run-a", 3, "ab" * 32)


def opened(folder: Path | None) -> AdapterStorage:
    storage = AdapterStorage(folder)
    storage.open()
    return storage


def declare(version: int = 1, *, sha256: str = "a" * 64, request_id: str | None = None, size: int = 6) -> Declaration:
    return Declaration(
        request_id=request_id or f"request-{version}-{sha256[:1]}",
        run_id="run-a",
        policy_version=version,
        rank=2,
        target_modules=frozenset({"q_proj"}),
        files=(DeclaredFile(CONFIG_NAME, 4, "b" * 64), DeclaredFile(WEIGHTS_NAME, size, sha256)),
        probes=(),
        differs_from_base=True,
    )


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


def test_start_clears_what_a_killed_process_left_but_nothing_else(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    storage.stage("one")
    storage.close()
    (tmp_path / "notes.txt").write_text("mine")
    again = opened(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lock", "notes.txt", "staging", "versions"]
    again.close()
    again.close()


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
    folder = storage.store("one", TARGET, {"r": 2})
    assert folder == tmp_path / "versions/run-a" / f"3-{'ab' * 6}"
    assert (folder / CONFIG_NAME).read_text() == '{\n  "r": 2\n}'
    storage.stage("two")
    with pytest.raises(FailedPreconditionError) as caught:
        storage.store("two", TARGET, {})
    assert caught.value.reason == "VERSION_EXISTS"
    assert (folder / CONFIG_NAME).read_text() == '{\n  "r": 2\n}'
    storage.remove(folder)
    assert not folder.exists()
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


def test_full_disk_is_refused_before_any_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = opened(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 1024 * 1024 + 100))
    storage.check_space(100)
    with pytest.raises(ResourceExhaustedError) as caught:
        storage.check_space(101)
    assert caught.value.reason == "STORAGE_FULL"
    uploads = Uploads(storage, expire_seconds=60)
    uploads.begin(declare(1, size=60))
    with pytest.raises(ResourceExhaustedError):
        uploads.begin(declare(2, size=60))  # what the open upload will still take counts
    storage.close()


def test_disk_that_fills_during_an_upload_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = opened(tmp_path)
    upload = Uploads(storage, expire_seconds=60).begin(declare())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tether_services.generator.uploads.write_at", full)
    with pytest.raises(ResourceExhaustedError):
        asyncio.run(upload.write(b"1234", offset=0))
    assert upload.received_bytes == 0
    storage.close()


def write(upload: Upload, data: bytes, offset: int) -> None:
    asyncio.run(upload.write(data, offset=offset))


def test_bytes_land_in_their_files(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    upload = Uploads(storage, expire_seconds=60).begin(declare())
    write(upload, b"con", 0)
    write(upload, b"fwei", 3)
    write(upload, b"ght", 7)
    assert (upload.folder / CONFIG_NAME).read_bytes() == b"conf"
    assert (upload.folder / WEIGHTS_NAME).read_bytes() == b"weight"
    assert asyncio.run(upload.sync()) == 10
    storage.close()


def test_bytes_of_two_streams_are_never_mixed(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    upload = Uploads(storage, expire_seconds=60).begin(declare())

    async def scenario() -> list[object]:
        writes = [upload.write(data, offset=0) for data in (b"aaaa", b"bbbb")]
        return list(await asyncio.gather(*writes, return_exceptions=True))

    results = asyncio.run(scenario())
    assert results[0] is None
    assert isinstance(results[1], FailedPreconditionError)
    assert (upload.folder / CONFIG_NAME).read_bytes() == b"aaaa"
    storage.close()


def test_upload_that_is_being_committed_takes_no_bytes_and_does_not_expire(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=1e-9)
    upload = uploads.begin(declare())
    upload.committing = True
    with pytest.raises(FailedPreconditionError):
        write(upload, b"x", 0)
    uploads.expire()
    assert uploads.get(upload.upload_id) is upload
    upload.committing = False
    with pytest.raises(NotFoundError):
        for _ in range(3):
            uploads.get(upload.upload_id)
    assert not upload.folder.exists()
    storage.close()


def test_open_uploads_are_counted_and_forgotten_ones_make_room(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=60)
    kept = [uploads.begin(declare(version)) for version in range(1, MAX_OPEN_UPLOADS + 1)]
    with pytest.raises(ResourceExhaustedError):
        uploads.begin(declare(99))
    uploads.forget(kept[0])
    assert uploads.begin(declare(99)).folder.is_dir()
    storage.close()


def test_same_content_is_the_same_upload_whatever_its_request_id(tmp_path: Path) -> None:
    storage = opened(tmp_path)
    uploads = Uploads(storage, expire_seconds=60)
    first = uploads.begin(declare(1, request_id="one"))
    assert uploads.begin(declare(1, request_id="two")) is first
    with pytest.raises(InvalidArgumentError):
        uploads.begin(declare(2, request_id="one"))
    replaced = uploads.begin(declare(1, sha256="c" * 64, request_id="three"))
    assert replaced is not first
    assert not first.folder.exists()
    storage.close()
