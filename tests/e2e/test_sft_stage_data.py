"""Supervised fine-tuning on real data, a few steps on each file; skipped where ../shared/data is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_inputs import shared_file
from tests.unit.stage_inputs import PACKAGED_POLICY
from tether_services.recipes.config import SftConfig
from tether_services.recipes.sft import run_sft

SHORT = {"max_steps": 8, "eval_every": 8, "checkpoint_every": 8, "rows_per_step": 8, "learning_rate": 0.003}
FILES = {
    "sft/rasbt-instruction.json": 1100,
    "sft/self-instruct-seeds.jsonl": 175,
    "preference/hh-helpful-base.jsonl.gz": 2354,
}
"""Rows by file; of pairs the better answer is learned."""


@pytest.mark.parametrize("name", FILES)
def test_real_demonstrations_are_learned_and_every_row_is_accounted_for(name: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "output": tmp_path / "out",
        "base": str(PACKAGED_POLICY),
        "data": {"sources": [shared_file(name)], "max_malformed_share": 0.02},
        "max_tokens": 256,
        "overlong": "drop",
        "lora": {"rank": 4},
        "packing": True,
        "threads": 1,
        "training": SHORT,
    }
    run_sft(SftConfig.model_validate(values))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    metrics, report = manifest["metrics"], manifest["data_report"]
    left_out = sum(report["dropped"].values()) + sum(report["malformed"].values()) + metrics["overlong_records"]
    assert metrics["train_rows"] + metrics["validation_rows"] + left_out == report["num_rows"] == FILES[name]
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert metrics["loss"] < losses[0] < 9.0
