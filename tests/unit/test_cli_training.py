"""`tether train STAGE`: what it takes, what it says, and how it ends."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import tomli_w

from tests.unit.interruption import ctrl_c_when
from tests.unit.recipe_inputs import pretrain_config
from tether_services.cli.main import STAGES, main
from tether_services.cli.training_commands import COMMANDS
from tether_services.recipes.artifact import portable
from tether_services.recipes.config import PretrainConfig


def write_config(folder: Path, *, max_steps: int = 40) -> list[str]:
    """Write the settings of a short pretraining and return the command."""
    config = pretrain_config(folder, training={"max_steps": max_steps, "eval_every": 5, "checkpoint_every": 5})
    values = config.model_dump(mode="json", exclude_none=True)
    (folder / "config.toml").write_text(tomli_w.dumps(values))
    return ["train", "pretrain", "--config", str(folder / "config.toml")]


def test_every_stage_of_the_parser_has_its_settings_and_its_own_environment() -> None:
    assert tuple(COMMANDS) == STAGES
    assert len({command.env_prefix for command in COMMANDS.values()}) == len(STAGES)


def test_a_stage_prints_the_folder_that_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*write_config(tmp_path, max_steps=5), "--set", f"output={tmp_path / 'other'}", "--set", "seed=3"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'other'}\n"
    assert json.loads((tmp_path / "other" / "manifest.json").read_text())["config"]["seed"] == 3


def test_settings_can_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TETHER_PRETRAIN__TRAINING__MAX_STEPS", "0")
    with pytest.raises(SystemExit) as ended:
        main(write_config(tmp_path))
    assert ended.value.code == 42
    assert "training.max_steps" in capsys.readouterr().err


def test_a_dry_run_prints_an_estimate_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*write_config(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for word in ("tokens", "memory", "optimiser steps", "time"):
        assert word in shown
    assert str(tmp_path) not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "stories.txt"]


def test_ctrl_c_says_how_to_go_on_and_resume_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = write_config(tmp_path)
    with ctrl_c_when((tmp_path / "policy" / "checkpoints" / "checkpoint-10" / "complete").is_file):
        assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; go on with --resume"
    assert main(command) == 1
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    parts, whole = tmp_path / "policy", tmp_path / "whole"
    assert main([*command, "--set", f"output={whole}"]) == 0
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (parts / "checkpoints").exists()


def test_ctrl_c_in_a_dry_run_does_not_offer_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write_config(tmp_path)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with ctrl_c_when(lambda: any((tmp_path / "scratch").glob("tether-stage-*"))):
        assert main([*command, "--dry-run"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_resume_and_dry_run_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*write_config(tmp_path), "--dry-run", "--resume"])
    assert ended.value.code == 2
    assert "--resume" in capsys.readouterr().err


def test_an_error_of_a_stage_is_one_line_that_names_the_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = f"data.sources=['{tmp_path / 'absent.txt'}']"
    assert main([*write_config(tmp_path), "--set", sources]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "absent.txt" in line and "sources" in line and "Traceback" not in line


def test_a_finished_stage_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = write_config(tmp_path, max_steps=5)
    assert main(command) == 0
    before = (tmp_path / "policy" / "manifest.json").stat().st_mtime_ns
    assert main(command) == 1
    assert "finished" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "policy" / "manifest.json").stat().st_mtime_ns == before


def test_help_lists_nested_settings_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "reward", "--help"])
    shown = capsys.readouterr().out
    for line in ("data.sources = required", "lora.rank = 16", "training.schedule = ", "demonstrations = null"):
        assert f"\n  {line}" in shown
    assert "\n  demonstrations.max_rows = null" in shown


def test_the_settings_in_the_manifest_start_the_same_stage(tmp_path: Path) -> None:
    assert main(write_config(tmp_path, max_steps=5)) == 0
    written = json.loads((tmp_path / "policy" / "manifest.json").read_text())["config"]
    again = PretrainConfig.model_validate(written)
    assert portable(again) == written
