"""The folder of a run: what is kept, what goes, and files that appear whole."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tether.errors import FailedPreconditionError, NotFoundError
from tether_services.orchestrator.records import CheckpointRow
from tether_services.orchestrator.run_files import RunFiles
from tether_services.runtime.durable import remove_directory, write_directory, write_text

CONFIG = b"{}"


def filled(folder: Path, *versions: int, epoch: int = 1) -> tuple[RunFiles, list[CheckpointRow]]:
    """Return the folder of a run with checkpoints and adapters of these versions, and what the ledger says of them."""
    files, rows = RunFiles(folder / "demo"), []
    for version in versions:
        checkpoint = files.new_checkpoint(version, epoch)
        write_directory(checkpoint, {"state.json": f"state {version}".encode(), "weights": b"w" * version})
        weights = f"adapter {version}".encode()
        write_directory(files.adapter(version), {"adapter_model.safetensors": weights, "adapter_config.json": CONFIG})
        rows.append(files.describe_checkpoint(checkpoint, version))
    return files, rows


def names(files: RunFiles, kind: str) -> list[str]:
    return sorted(path.name for path in (files.directory / kind).iterdir())


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_checkpoint_is_described_by_path_hash_and_size(tmp_path: Path) -> None:
    _, (row,) = filled(tmp_path, 3, epoch=2)
    assert row == CheckpointRow(3, "checkpoints/000003-e2", sha256("state 3"), len("state 3") + 3)


def test_a_committed_checkpoint_is_found(tmp_path: Path) -> None:
    files, (row,) = filled(tmp_path, 3)
    assert files.find_checkpoint(row) == files.new_checkpoint(3, 1)
    assert files.find_checkpoint(replace(row, sha256="")) == files.new_checkpoint(3, 1), "hashes are new"


def test_a_checkpoint_that_is_gone_or_damaged_is_named_with_the_way_out(tmp_path: Path) -> None:
    files, (row,) = filled(tmp_path, 3)
    (files.directory / row.path / "state.json").write_text("state 4")
    with pytest.raises(FailedPreconditionError, match="from a copy") as damaged:
        files.find_checkpoint(row)
    assert damaged.value.reason == "CHECKPOINT_DAMAGED"
    remove_directory(files.directory / row.path)
    with pytest.raises(NotFoundError, match="from a copy") as gone:
        files.find_checkpoint(row)
    assert gone.value.reason == "CHECKPOINT_NOT_FOUND"


def test_the_kept_checkpoints_stay_with_their_adapters(tmp_path: Path) -> None:
    files, rows = filled(tmp_path, 1, 2, 3, 4)
    files.retain(rows[2:], committed=4)
    assert names(files, "checkpoints") == ["000003-e1", "000004-e1"]
    assert names(files, "adapters") == ["000003", "000004"]


def test_the_committed_adapter_stays_although_its_checkpoint_does_not(tmp_path: Path) -> None:
    files, _ = filled(tmp_path, 1, 2)
    files.retain([], committed=2)
    assert names(files, "checkpoints") == []
    assert names(files, "adapters") == ["000002"]


def test_a_sweep_removes_halves_and_what_no_attempt_committed(tmp_path: Path) -> None:
    files, rows = filled(tmp_path, 1, 2)
    filled(tmp_path, 3, epoch=1)
    filled(tmp_path, 2, epoch=2)
    (files.directory / "checkpoints" / ".000003-e1.abcd").mkdir()
    (files.directory / "adapters" / ".000003.abcd").mkdir()
    files.sweep(rows, committed=2)
    assert names(files, "checkpoints") == ["000001-e1", "000002-e1"]
    assert names(files, "adapters") == ["000001", "000002"]


def test_a_checkpoint_of_an_older_version_of_the_program_is_kept_or_removed_by_its_path(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "demo")
    for version in (1, 2):
        write_directory(files.directory / "checkpoints" / f"{version:06d}", {"state.json": b"{}"})
    files.retain([CheckpointRow(2, "checkpoints/000002", "", 2)], committed=2)
    assert names(files, "checkpoints") == ["000002"]


def test_files_that_are_not_versions_stay(tmp_path: Path) -> None:
    files, _ = filled(tmp_path, 1)
    for name in ("1-notes", "000001-backup"):
        (files.directory / "checkpoints" / name).mkdir()
    (files.directory / "adapters" / "average").mkdir()
    files.sweep([], committed=0)
    assert names(files, "checkpoints") == ["000001-backup", "1-notes"]
    assert names(files, "adapters") == ["average"]


def test_an_older_export_makes_way(tmp_path: Path) -> None:
    files, _ = filled(tmp_path, 1)
    assert not files.make_way(1, config=CONFIG).exists()


def test_the_committed_adapter_does_not_make_way(tmp_path: Path) -> None:
    files, _ = filled(tmp_path, 1)
    before = (files.adapter(1) / "adapter_model.safetensors").stat()
    assert files.make_way(1, config=CONFIG, committed_sha256=sha256("adapter 1")) == files.adapter(1)
    after = (files.adapter(1) / "adapter_model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("content", ["adapter 2", None])
def test_a_damaged_copy_of_the_committed_adapter_makes_way(tmp_path: Path, name: str, content: str | None) -> None:
    files, _ = filled(tmp_path, 1)
    file = files.adapter(1) / name
    file.unlink() if content is None else file.write_text(content)
    assert not files.make_way(1, config=CONFIG, committed_sha256=sha256("adapter 1")).exists()


def test_json_is_read_back_and_absent_json_is_none(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "demo")
    assert files.read_json("evaluation_before.json") is None
    files.write_json("evaluation_before.json", {"score_mean": 0.5})
    assert files.read_json("evaluation_before.json") == {"score_mean": 0.5}


def test_a_value_that_is_not_finite_is_refused_and_leaves_the_file(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "demo")
    files.write_json("x.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json("x.json", {"a": math.inf})
    assert files.read_json("x.json") == {"a": 1}


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "report.html", "\udcff")
    assert list(tmp_path.iterdir()) == []
