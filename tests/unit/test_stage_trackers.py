"""Where the figures of a stage also go."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.interruption import ctrl_c_when
from tests.unit.recipe_inputs import pretrain_config
from tether.errors import InvalidArgumentError
from tether_services.recipes.config import PretrainConfig
from tether_services.recipes.pretrain import run_pretrain
from tether_services.recipes.stage import Mode
from tether_services.recipes.training import check_trackers, trainer_arguments

SCHEDULE = {"max_steps": 12, "eval_every": 4, "checkpoint_every": 4, "log_every": 2}


def config(folder: Path, **training: Any) -> PretrainConfig:
    return pretrain_config(folder, training=SCHEDULE | training)


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return a figure by step as TensorBoard reads it."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def history(folder: Path, name: str) -> list[tuple[int, float]]:
    rows = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [(row["step"], row[name]) for row in rows if name in row]


def assert_same(shown: list[tuple[int, float]], written: list[tuple[int, float]]) -> None:
    """TensorBoard keeps 32 bits of a figure."""
    assert [step for step, _ in shown] == [step for step, _ in written]
    assert [value for _, value in shown] == pytest.approx([value for _, value in written])


def test_tensorboard_shows_the_figures_of_the_history(tmp_path: Path) -> None:
    output = run_pretrain(config(tmp_path))
    for shown, name in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/learning_rate", "learning_rate")):
        assert_same(curve(output, shown), history(output, name))
    assert [step for step, _ in curve(output, "train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in curve(output, "eval/loss")] == [4, 8, 12]


def test_after_an_interruption_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    settings = config(tmp_path, max_steps=40)
    with (
        ctrl_c_when((settings.output / "checkpoints" / "checkpoint-8" / "complete").is_file),
        pytest.raises(KeyboardInterrupt),
    ):
        run_pretrain(settings)
    run_pretrain(settings, Mode(resume=True))
    assert_same(curve(settings.output, "train/loss"), history(settings.output, "loss"))


def test_without_trackers_no_tensorboard_files_are_written(tmp_path: Path) -> None:
    output = run_pretrain(config(tmp_path, trackers=(), max_steps=4))
    assert (output / "history.jsonl").is_file()
    assert not (output / "tensorboard").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    settings = config(tmp_path, trackers=("tensorboard", name))
    with pytest.raises(InvalidArgumentError, match=f"pip install {name}") as caught:
        run_pretrain(settings)
    assert caught.value.violations[0].field == "training.trackers"
    assert not settings.output.exists()


def test_installed_trackers_are_accepted() -> None:
    check_trackers(("tensorboard",))
    check_trackers(())


def test_other_trackers_are_the_library_s_and_the_run_is_called_after_the_folder(tmp_path: Path) -> None:
    arguments = trainer_arguments(config(tmp_path, trackers=("tensorboard", "mlflow")), num_rows=8, folder=tmp_path)
    assert arguments["report_to"] == ["mlflow"]  # the frame writes for TensorBoard itself
    assert arguments["run_name"] == "policy"


def test_runs_are_grouped_under_a_name_that_the_environment_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    run_pretrain(config(tmp_path, max_steps=4))
    assert (os.environ["WANDB_PROJECT"], os.environ["MLFLOW_EXPERIMENT_NAME"]) == ("mine", "tether")
