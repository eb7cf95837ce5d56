from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.run_inputs import run_config
from tether.errors import InvalidArgumentError
from tether_services.orchestrator.prompt_sources import is_dataset, load_prompts
from tether_services.orchestrator.run_config import check_run_config


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_rows(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_file_is_read_as_before(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("One day\nOnce\n")
    assert not is_dataset(str(file))
    assert load_prompts(str(file), field="prompts") == ["One day", "Once"]


def test_a_folder_of_data_files_gives_its_prompt_column(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "data", [{"id": 1, "prompt": "One day", "text": "x"}, {"id": 2, "prompt": "Once"}])
    assert is_dataset(str(folder))
    assert load_prompts(str(folder), field="prompts") == ["One day", "Once"]


def test_a_column_named_text_serves_where_there_is_no_prompt(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "data", [{"text": "One day"}])
    assert load_prompts(str(folder), field="prompts") == ["One day"]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"question": "Why?"}], "it has question"),
        ([{"prompt": "One day"}, {"prompt": " "}], "row 1"),
        ([{"prompt": 3}], "row 0"),
    ],
)
def test_a_data_set_without_prompts_is_refused(tmp_path: Path, rows: list[dict[str, object]], complaint: str) -> None:
    folder = write_rows(tmp_path / "data", rows)
    with pytest.raises(InvalidArgumentError, match=complaint) as caught:
        load_prompts(str(folder), field="evaluation_prompts")
    assert caught.value.violations[0].field == "evaluation_prompts"


def test_a_hub_name_that_cannot_be_reached_is_a_clear_error() -> None:
    assert is_dataset("no-such-owner/no-such-set")
    with pytest.raises(InvalidArgumentError, match="no-such-owner/no-such-set") as caught:
        load_prompts("no-such-owner/no-such-set", field="prompts")
    assert caught.value.violations[0].field == "prompts"


def test_a_missing_file_is_no_hub_name() -> None:
    assert not is_dataset("stories/prompts.txt")
    assert not is_dataset("prompts.jsonl")


def test_a_data_set_passes_the_checks_that_come_before_the_run(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "data", [{"prompt": "One day"}])
    config = run_config(tmp_path)
    check_run_config(config.model_copy(update={"prompts": str(folder)}))
