"""The folder of a run: what is kept, what goes, and files that appear whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tether_services.orchestrator.run_files import RunFiles
from tether_services.runtime.durable import write_text


def filled(folder: Path, *versions: int) -> RunFiles:
    files = RunFiles(folder / "demo")
    for version in versions:
        for directory in (files.checkpoint(version), files.adapter(version)):
            directory.mkdir(parents=True)
            (directory / "content").write_text(str(version))
    return files


def versions(files: RunFiles, kind: str) -> list[int]:
    return sorted(int(path.name) for path in (files.directory / kind).iterdir())


def test_what_was_never_committed_is_dropped(tmp_path: Path) -> None:
    files = filled(tmp_path, 1, 2, 3, 4)
    files.drop_uncommitted(2)
    assert versions(files, "checkpoints") == versions(files, "adapters") == [1, 2]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    files = filled(tmp_path, 1, 2, 3, 4)
    files.keep_newest(4, 2)
    assert versions(files, "checkpoints") == versions(files, "adapters") == [3, 4]


def test_files_that_are_not_versions_stay(tmp_path: Path) -> None:
    files = filled(tmp_path, 1)
    (files.directory / "checkpoints" / "1-notes").mkdir()
    files.drop_uncommitted(0)
    assert [path.name for path in (files.directory / "checkpoints").iterdir()] == ["1-notes"]


def test_an_older_export_makes_room(tmp_path: Path) -> None:
    files = filled(tmp_path, 1)
    assert not files.new_adapter_directory(1).exists()
    assert files.checkpoint(1).exists()


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
