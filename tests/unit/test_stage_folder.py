"""The output folder of a stage: who may write it, what may be in it, and how to go on."""

from __future__ import annotations

import json
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_inputs import fields_of
from tests.unit.stage_inputs import sft_config, write_base, write_demonstrations
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.recipes.artifact import describe_beginning, describe_sources
from tether_services.recipes.config import SftConfig
from tether_services.recipes.data.hub import UNKNOWN_REVISION
from tether_services.recipes.stage import Mode, open_stage

RESUME = Mode(resume=True)


def begin(config: SftConfig) -> None:
    """Leave the folder as a process that was killed after its first checkpoint does."""
    with open_stage("sft", config, Mode()) as stage:
        (stage.work / "checkpoint-2").mkdir()


def finish(config: SftConfig) -> None:
    with open_stage("sft", config, Mode()) as stage:
        stage.finish(metrics={"loss": 1.0}, data={})


def go_on(config: SftConfig, mode: Mode = RESUME, *, name: str = "sft") -> bool:
    """Return whether the stage finds itself finished."""
    with open_stage(name, config, mode) as stage:
        return stage.is_finished


def test_a_fresh_folder_is_taken_with_and_without_resume(tmp_path: Path) -> None:
    for name, mode in (("a", Mode()), ("b", RESUME)):
        config = sft_config(tmp_path, tmp_path / "deep" / name)
        assert not go_on(config, mode)
        assert config.output.is_dir()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    config.output.mkdir()
    (config.output / "thesis.txt").write_text("my only copy")
    for mode in (Mode(), RESUME):
        (description,) = fields_of(lambda mode=mode: go_on(config, mode)).values()  # type: ignore[misc]
        assert "holds thesis.txt; name another folder" in description
    assert (config.output / "thesis.txt").read_text() == "my only copy"


def test_an_unfinished_stage_goes_on_with_resume_alone(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    begin(config)
    (description,) = fields_of(lambda: go_on(config, Mode())).values()
    assert "holds an unfinished stage; go on with --resume, or name another folder" in description
    assert not go_on(config)


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    finish(config)
    (description,) = fields_of(lambda: go_on(config, Mode())).values()
    assert "holds a finished stage" in description
    assert go_on(config)
    assert sorted(path.name for path in config.output.iterdir()) == ["manifest.json"]


@pytest.mark.parametrize("prepare", [begin, finish])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"learning_rate": 0.002}}, "config.training.learning_rate"),
        ({"lora": {"rank": 8, "alpha": 8}}, "config.lora.rank"),
        ({"seed": 1, "threads": 2}, "config.threads, config.seed"),
    ],
)
def test_other_settings_are_refused_by_name(prepare: Any, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    prepare(sft_config(tmp_path, tmp_path / "out"))
    with pytest.raises(FailedPreconditionError, match="other settings or data") as caught:
        go_on(sft_config(tmp_path, tmp_path / "out", **change))
    assert f"({named})" in caught.value.message
    assert (caught.value.violations[0].field, caught.value.reason) == ("output", "SETTINGS_CHANGED")


@pytest.mark.parametrize("prepare", [begin, finish])
def test_other_data_a_changed_base_and_another_stage_are_refused(prepare: Any, tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    prepare(config)
    with pytest.raises(FailedPreconditionError, match=r"\(stage\)"):
        go_on(config, name="dpo")
    text = write_demonstrations(tmp_path / "demonstrations.jsonl", count=90).read_text()
    (tmp_path / "demonstrations.jsonl").write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(FailedPreconditionError, match=r"\(data\)"):
        go_on(config)
    (tmp_path / "demonstrations.jsonl").write_text(text)
    settings = tmp_path / "base" / "config.json"
    settings.write_text(settings.read_text() + " ")
    with pytest.raises(FailedPreconditionError, match=r"\(parent\.sha256\)"):
        go_on(config)


@pytest.mark.parametrize("prepare", [begin, finish])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_changed_tokenizer_beside_the_same_weights_is_refused(prepare: Any, name: str, tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    prepare(config)
    path = tmp_path / "base" / name
    path.write_text((path.read_text() if path.exists() else "") + " ")
    with pytest.raises(FailedPreconditionError, match=r"\(parent\.tokenizer_sha256\)"):
        go_on(config)


def test_the_manifest_states_data_and_base_as_they_were_at_the_start(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    before = describe_beginning("sft", config, parent=Path(config.base))
    with open_stage("sft", config, Mode()) as stage:
        write_demonstrations(tmp_path / "demonstrations.jsonl", count=3)
        (tmp_path / "base" / "model.safetensors").write_bytes(b"other weights")
        stage.finish(metrics={}, data={})
    manifest = json.loads((config.output / "manifest.json").read_text())
    assert {name: manifest[name] for name in before} == json.loads(json.dumps(before))
    assert describe_beginning("sft", config, parent=Path(config.base)) != before


@pytest.mark.parametrize(("at_first", "later"), [("a" * 40, "b" * 40), (UNKNOWN_REVISION, "b" * 40)])
def test_a_data_set_that_changed_on_its_hub_is_refused(
    at_first: str, later: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(tmp_path, tmp_path / "out", data={"sources": ["org/set"]})
    answer_with_revision(monkeypatch, at_first)
    begin(config)
    answer_with_revision(monkeypatch, later)
    with pytest.raises(FailedPreconditionError, match=r"\(data\)"):
        go_on(config)


def test_a_finished_stage_stays_finished_where_its_hub_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config(tmp_path, tmp_path / "out", data={"sources": ["org/set"]})
    answer_with_revision(monkeypatch, "a" * 40)
    finish(config)
    answer_with_revision(monkeypatch, UNKNOWN_REVISION)
    assert go_on(config)
    entry = json.loads((config.output / "manifest.json").read_text())["data"]
    assert entry == [{"name": "org/set", "revision": "a" * 40}]


def answer_with_revision(monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    """Let hub data sets have a revision without a hub."""
    described = partial(describe_sources, revision_of=lambda name: revision)
    monkeypatch.setattr("tether_services.recipes.artifact.describe_sources", described)


def test_the_folder_may_move_with_what_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    begin(sft_config(tmp_path / "old", tmp_path / "old" / "out"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert not go_on(sft_config(tmp_path / "new", tmp_path / "new" / "out"))


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    with open_stage("sft", config, Mode()):
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            assert "another process is writing" in pool.apply(second_run, (config,))
    assert not go_on(config)


def second_run(config: SftConfig) -> str:
    try:
        go_on(config)
    except InvalidArgumentError as error:
        return error.message
    return "not refused"


def test_a_stage_that_fails_before_its_first_checkpoint_frees_the_folder(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    with pytest.raises(InvalidArgumentError), open_stage("sft", config, Mode()):
        raise InvalidArgumentError("no such layer", field="lora.target_modules")
    assert not config.output.exists()
    assert not go_on(sft_config(tmp_path, tmp_path / "out", seed=5), Mode())


def test_a_stage_that_fails_after_a_checkpoint_can_go_on(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    with pytest.raises(FailedPreconditionError), open_stage("sft", config, Mode()) as stage:
        (stage.work / "checkpoint-2").mkdir()
        raise FailedPreconditionError("disk full")
    assert not go_on(config)
    assert (config.output / "checkpoints" / "checkpoint-2").is_dir()


def test_what_a_kill_leaves_is_removed(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    finish(config)
    (config.output / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (config.output / ".history.jsonl.x1y2_3ab").write_text("{")
    assert go_on(config)
    assert sorted(path.name for path in config.output.iterdir()) == ["manifest.json"]


def test_a_kill_before_the_settings_were_written_is_a_fresh_start(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    (config.output / "checkpoints").mkdir(parents=True)
    assert not go_on(config, Mode())
    assert json.loads((config.output / "checkpoints" / "stage.json").read_text())["stage"] == "sft"


def test_a_place_that_cannot_be_written_and_a_base_that_is_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert list(fields_of(lambda: go_on(sft_config(tmp_path, tmp_path / "file" / "out")))) == ["output"]
    base = write_base(tmp_path / "empty")
    (base / "model.safetensors").unlink()
    assert list(fields_of(lambda: go_on(sft_config(tmp_path, tmp_path / "out", base=str(base))))) == ["base"]


def test_a_dry_run_takes_no_folder(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    finish(config)
    with open_stage("sft", config, Mode(dry_run=True)) as stage:
        assert not stage.is_finished
        assert stage.work.is_dir() and config.output not in stage.work.parents
    assert not stage.work.exists()


def test_a_stage_that_ended_before_its_first_checkpoint_may_begin_again_with_other_settings(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    with pytest.raises(RuntimeError, match="out of memory"), open_stage("sft", config, Mode()) as stage:
        (config.output / "tensorboard").mkdir()
        (stage.work / "kept.json").write_text("{}")
        raise RuntimeError("out of memory")
    assert not go_on(config, Mode()), "the same again"
    assert (config.output / "checkpoints" / "kept.json").is_file(), "what the same settings have computed stays"
    smaller = config.model_copy(update={"max_tokens": 48})
    assert not go_on(smaller, RESUME)
    assert not (config.output / "checkpoints" / "kept.json").exists()
    (config.output / "checkpoints" / "checkpoint-2").mkdir()
    with pytest.raises(FailedPreconditionError, match="max_tokens"):
        go_on(config)


def test_a_refused_stage_leaves_no_folder(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out", base=str(tmp_path / "nothing"))
    with pytest.raises(InvalidArgumentError):
        go_on(config, Mode())
    assert not config.output.exists()


def test_hidden_files_of_the_user_stay_and_half_written_ones_go(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    finish(config)
    kept, left = config.output / ".gitattributes", config.output / ".history.jsonl.a1b2c3d4"
    for path in (kept, left):
        path.write_text("x")
    assert go_on(config)
    assert kept.exists() and not left.exists()
