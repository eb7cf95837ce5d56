"""Every setting of the training reaches the trainer, and a loss that is no number ends the stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from tests.unit.stage_inputs import sft_config
from tether.errors import FailedPreconditionError
from tether_services.recipes.config import SftConfig, TrainingSettings
from tether_services.recipes.sft import run_sft
from tether_services.recipes.training import FINAL_SHARE, count_steps, trainer_arguments

NUM_ROWS = 90
PLAIN: dict[str, Any] = {"rows_per_step": 8, "micro_batch_rows": 4, "num_epochs": 2}
"""Leads to 24 steps."""
EFFECTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("learning_rate", 0.02, {"learning_rate": 0.02}),
    ("schedule", "linear", {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": None}),
    ("schedule", "constant", {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": None}),
    ("warmup_fraction", 0.5, {"warmup_steps": 12}),
    ("weight_decay", 0.3, {"weight_decay": 0.3}),
    ("max_grad_norm", 0.7, {"max_grad_norm": 0.7}),
    ("optimizer", "adamw_8bit", {"optim": "adamw_bnb_8bit"}),
    ("num_epochs", 0.5, {"num_train_epochs": 0.5, "warmup_steps": 1}),
    ("max_steps", 200, {"max_steps": 200, "warmup_steps": 10}),
    ("rows_per_step", 16, {"gradient_accumulation_steps": 4, "warmup_steps": 1}),
    (
        "micro_batch_rows",
        8,
        {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1},
    ),
    ("gradient_checkpointing", True, {"gradient_checkpointing": True}),
    ("log_every", 3, {"logging_steps": 3}),
    ("eval_every", 7, {"eval_steps": 7}),
    ("checkpoint_every", 9, {"save_steps": 9}),
    (
        "keep_best",
        True,
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False},
    ),
    ("trackers", ("tensorboard", "wandb"), {"report_to": ["wandb"]}),
]
"""A setting, another value, and what changes in the trainer's arguments."""
ELSEWHERE = {"keep_checkpoints"}
"""Settings that the trainer is not told: the guard of the checkpoints, tested with it, keeps their number."""


def arguments(config: SftConfig, folder: Path) -> dict[str, Any]:
    return trainer_arguments(config, num_rows=NUM_ROWS, folder=folder)


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if value != before[name]}


@pytest.mark.parametrize(("name", "value", "expected"), EFFECTS, ids=lambda value: str(value)[:20])
def test_a_setting_changes_these_arguments_and_no_others(
    name: str, value: Any, expected: dict[str, Any], tmp_path: Path
) -> None:
    before = sft_config(tmp_path, tmp_path / "out").model_copy(update={"training": TrainingSettings(**PLAIN)})
    after = before.model_copy(update={"training": before.training.model_copy(update={name: value})})
    found = changed(arguments(before, tmp_path), arguments(after, tmp_path))
    assert found == expected


def test_no_setting_is_without_effect() -> None:
    assert {name for name, _, _ in EFFECTS} | ELSEWHERE == set(TrainingSettings.model_fields)


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"seed": 4}, {"seed": 4, "data_seed": 4}), ({"dtype": "bfloat16"}, {"bf16": True})],
)
def test_settings_of_the_stage_reach_the_trainer_too(
    change: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    before = sft_config(tmp_path, tmp_path / "out")
    assert changed(arguments(before, tmp_path), arguments(before.model_copy(update=change), tmp_path)) == expected


def test_the_library_accepts_the_arguments_and_prints_no_bars(tmp_path: Path) -> None:
    accepted = TrainingArguments(**arguments(sft_config(tmp_path, tmp_path / "out"), tmp_path / "work"))
    assert accepted.disable_tqdm and accepted.report_to == []
    assert accepted.lr_scheduler_kwargs == {"min_lr_rate": FINAL_SHARE}
    assert (accepted.adam_beta1, accepted.adam_beta2) == (0.9, 0.95)


@pytest.mark.parametrize(
    ("num_rows", "training", "expected"),
    [
        (90, PLAIN, 24),
        (88, PLAIN, 22),
        (89, PLAIN | {"num_epochs": 0.5}, 6),
        (3, PLAIN | {"num_epochs": 0.1}, 1),
        (90, PLAIN | {"max_steps": 5}, 5),
    ],
)
def test_the_steps_of_a_run_are_known_before(
    num_rows: int, training: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    config = sft_config(tmp_path, tmp_path / "out").model_copy(update={"training": TrainingSettings(**training)})
    assert count_steps(config, num_rows=num_rows) == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_rises_and_ends_as_the_schedule_says(schedule: str, tmp_path: Path) -> None:
    training = {"schedule": schedule, "warmup_fraction": 0.25, "log_every": 1, "max_steps": 8, "learning_rate": 0.01}
    config = sft_config(tmp_path, tmp_path / "out", training=training)
    run_sft(config)
    rows = [json.loads(line) for line in (config.output / "history.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])
    ends = {"linear": 0.01 / 6, "cosine": 0.01 * (0.1 + 0.9 * 0.0669873), "constant": 0.01}
    assert rates[7] == pytest.approx(ends[schedule], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_stage_and_frees_the_folder(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    path = Path(config.base) / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("inf"))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FailedPreconditionError, match="loss is nan at step 2; give a lower training") as caught:
        run_sft(config)
    assert (caught.value.reason, caught.value.violations[0].field) == ("NON_FINITE", "training.learning_rate")
    assert not config.output.exists()
