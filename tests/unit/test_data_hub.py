"""Data sets read by the `datasets` library: folders and Parquet files, and names that cannot be found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_inputs import data_config, pair, write_rows
from tether.errors import InvalidArgumentError
from tether_services.recipes.data.hub import UNKNOWN_REVISION, DataSetName, find_revision, parse_name
from tether_services.recipes.data.reading import read_parts, read_rankings
from tether_services.recipes.data.records import Ranking


def write_parquet(path: Path, rows: list[dict[str, str]]) -> str:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", DataSetName("org/name", None, "train")),
        ("org/name:test", DataSetName("org/name", None, "test")),
        ("org/name/helpful:train", DataSetName("org/name", "helpful", "train")),
        ("org/name/helpful", DataSetName("org/name", "helpful", "train")),
    ],
)
def test_a_hub_name_has_parts(source: str, expected: DataSetName) -> None:
    assert parse_name(source, field="sources") == expected


@pytest.mark.parametrize("source", ["name", "a/b/c/d", "org/name:", "org//x", "../name", "/no/such/folder", "org/", ""])
def test_anything_else_is_refused_with_the_forms(source: str) -> None:
    with pytest.raises(InvalidArgumentError, match="org/name/config:split") as caught:
        parse_name(source, field="validation_sources")
    assert caught.value.violations[0].field == "validation_sources"


def test_a_folder_and_its_splits_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [pair(n) for n in range(6)])
    write_rows(folder / "test.jsonl", [pair(n) for n in range(6, 9)])
    data = read_rankings(data_config(str(folder), validation_sources=(f"{folder}:test",)))
    assert [record.prompt for record in data.train] == [f"Question {n}?" for n in range(6)]
    assert [str(record.place) for record in data.validation] == [f"{folder}:test:{n}" for n in (1, 2, 3)]


def test_a_parquet_file_and_a_folder_of_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    source = write_parquet(tmp_path / "rows" / "train.parquet", [pair(n) for n in range(4)])
    for name in (source, str(tmp_path / "rows")):
        [part] = read_parts(data_config(name), kind=None)
        assert [record.prompt for record in part.records if isinstance(record, Ranking)] == [
            f"Question {n}?" for n in range(4)
        ]


def test_broken_rows_of_a_data_set_are_counted_with_their_number(tmp_path: Path) -> None:
    rows = [pair(0), {**pair(1), "chosen": " "}, {**pair(2), "chosen": "x" * 3000}, pair(3)]
    source = write_parquet(tmp_path / "rows.parquet", rows)
    [part] = read_parts(data_config(source, max_row_bytes=2000), kind=None)
    assert part.tally.malformed == {"empty_answer": 1, "row_too_long": 1}
    assert [place.split(" ")[0] for place in part.tally.first_malformed] == [f"{source}:2:", f"{source}:3:"]


def test_an_absent_split_names_those_that_are_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [pair(1)])
    with pytest.raises(InvalidArgumentError, match="has no split 'test'; there are train"):
        read_rankings(data_config(f"{tmp_path}:test"))


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.xml").write_text("<a><b>1</b></a>", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="is not in one of the formats json, csv, parquet"):
        read_rankings(data_config(str(folder)))


def test_a_folder_with_a_loading_script_runs_none_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="cannot read the data set"):
        read_rankings(data_config(str(folder)))
    assert not (tmp_path / "ran").exists()


def test_a_broken_file_of_a_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(InvalidArgumentError, match=r"cannot read the data set .*rows\.parquet"):
        read_rankings(data_config(str(tmp_path / "rows.parquet")))


def test_the_revision_of_a_data_set_is_the_commit_that_the_library_reads(tmp_path: Path) -> None:
    from datasets.packaged_modules.json.json import Json

    source, asked = write_rows(tmp_path / "train.jsonl", [pair(1)]), []

    def load(path: str, config: str | None) -> Any:
        asked.append((path, config))
        return Json(hash="0123456789" * 4, data_files=source)

    assert find_revision("org/name/helpful:test", load=load) == "0123456789" * 4
    assert asked == [("org/name", "helpful")]


def test_a_revision_that_is_no_commit_is_unknown(tmp_path: Path) -> None:
    from datasets import load_dataset_builder

    write_rows(tmp_path / "train.jsonl", [pair(1)])
    local = load_dataset_builder(str(tmp_path))
    assert local.hash, "of the library itself, for what is not on a hub"
    assert find_revision("org/name", load=lambda path, config: local) == UNKNOWN_REVISION
    assert find_revision("no name at all", load=lambda path, config: local) == UNKNOWN_REVISION


def test_a_hub_that_cannot_be_asked_leaves_the_revision_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_revision("org/absent") == UNKNOWN_REVISION


def test_a_hub_is_asked_once_so_that_one_revision_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.packaged_modules.json.json import Json

    source, asked = write_rows(tmp_path / "train.jsonl", [pair(n) for n in range(40)]), []

    def load(path: str, config: str | None) -> Any:
        asked.append(path)
        return Json(hash=f"{len(asked):040}", data_files={"train": [source]})

    monkeypatch.setattr("datasets.load_dataset_builder", load)
    assert find_revision("org/asked-once") == f"{1:040}"
    for _ in range(2):
        assert len(read_parts(data_config("org/asked-once"), kind=None)[0].records) == 40
    assert asked == ["org/asked-once"]


def test_a_hub_that_cannot_be_reached_is_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidArgumentError, match=r"cannot read the data set org/absent.*make the hub reachable"):
        read_rankings(data_config("org/absent"))
