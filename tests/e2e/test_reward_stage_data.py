"""The reward stage on public human data beside the checkout, a few steps each: pairs, rankings of up to 9, levels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_inputs import shared_file
from tests.unit.stage_inputs import PACKAGED_POLICY
from tether_services.recipes.config import RewardModelConfig
from tether_services.recipes.reward_model import run_reward_model

PREPARE = Path(__file__).parents[2] / "examples" / "truthfulqa" / "prepare.py"


def run_few_steps(folder: Path, data: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], str]:
    """Train an adapter on the packaged base for three steps and return the figures and the page."""
    values: dict[str, Any] = {
        "output": folder / "reward",
        "base": str(PACKAGED_POLICY),
        "data": data,
        "max_tokens": 192,
        "overlong": "truncate",
        "threads": 1,
        "training": {"max_steps": 3, "rows_per_step": 4, "micro_batch_rows": 2, "trackers": ()},
    }
    output = run_reward_model(RewardModelConfig.model_validate(values | changes))
    manifest = json.loads((output / "manifest.json").read_text())
    return manifest["metrics"], (output / "evaluation.md").read_text(encoding="ascii")


def test_rankings_of_two_to_nine_answers_go_through_the_stage(tmp_path: Path) -> None:
    trees = shared_file("ranking/oasst-trees.jsonl")
    found, page = run_few_steps(tmp_path, {"sources": [trees], "validation_fraction": 0.1})
    assert found["train_rankings"] + found["validation_rankings"] == 212
    assert found["longer_wins_in_all_data"] == pytest.approx(0.698, abs=5e-4)
    sizes = {int(size) for size in found["evaluation"]["by_size"]}
    assert sizes <= set(range(2, 10))
    counts = [part["num_pairs"] for part in found["evaluation"]["by_size"].values()]
    assert sum(counts) == found["evaluation"]["overall"]["num_pairs"]
    assert all(f"\n| {size} |" in page for size in sizes)


def test_levels_of_truth_and_help_go_through_the_stage(tmp_path: Path) -> None:
    judgements = [shared_file(f"ranking/truthfulqa-{name}.jsonl") for name in ("truth", "info")]
    ranked = tmp_path / "ranked.jsonl"
    subprocess.run([sys.executable, str(PREPARE), *judgements, str(ranked)], check=True, timeout=120)
    data = {"sources": [str(ranked)], "validation_fraction": 0.02}
    found, page = run_few_steps(tmp_path, data, max_tokens=96)
    assert found["train_rankings"] + found["validation_rankings"] == 615
    assert found["longer_wins_in_all_data"] == pytest.approx(0.494, abs=2e-3)
    assert found["evaluation"]["num_tied"] > 0
    assert max(map(int, found["evaluation"]["by_size"])) > 20
    assert "ties and left out" in page


def test_pairs_of_dialogues_state_the_length_baseline(tmp_path: Path) -> None:
    pairs = shared_file("preference/hh-helpful-base.jsonl.gz")
    found, page = run_few_steps(tmp_path, {"sources": [pairs], "validation_fraction": 0.02})
    assert found["longer_wins_in_all_data"] == pytest.approx(0.598, abs=2e-3)
    assert set(found["evaluation"]["by_size"]) == {"2"}
    assert f"the longer answer wins {found['longer_wins_in_all_data']:.4f}" in page
