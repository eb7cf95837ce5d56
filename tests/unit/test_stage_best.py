"""The weights of the lowest validation loss, and the figures that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.unit.stage_inputs import sft_config
from tether_services.recipes.sft import run_sft

DIVERGING = {
    "learning_rate": 0.05,
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "max_grad_norm": 1000.0,
    "max_steps": 4,
    "log_every": 1,
}
"""So high that the last step is not the best one."""


def run(folder: Path, name: str, **training: Any) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    steps = DIVERGING | {"eval_every": 1, "checkpoint_every": 1} | training
    output = run_sft(sft_config(folder, folder / name, training=steps))
    metrics = json.loads((output / "manifest.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    return output, metrics, [row for row in rows if "eval_loss" in row]


def test_the_weights_of_the_lowest_validation_loss_are_kept_and_their_figures_reported(tmp_path: Path) -> None:
    best, kept, measured = run(tmp_path, "best", keep_best=True)
    lowest = min(measured, key=lambda row: float(row["eval_loss"]))
    assert lowest["step"] < measured[-1]["step"], "else this test would show nothing"
    assert kept["loss"] == lowest["eval_loss"]
    last, ended, _ = run(tmp_path, "last")
    assert ended["loss"] == measured[-1]["eval_loss"]
    stopped, _, _ = run(tmp_path, "stopped", max_steps=lowest["step"])
    weights = [load_file(folder / "model.safetensors") for folder in (best, stopped, last)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert any(not weights[0][name].equal(weights[2][name]) for name in weights[0])
