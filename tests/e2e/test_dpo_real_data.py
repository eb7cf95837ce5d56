"""The preference stage on real pairs and rankings, a few steps on the packaged base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.preference_inputs import dpo_config
from tether_services.recipes.dpo import run_dpo

DATA = Path(__file__).parents[3] / "shared/data"
PACKAGED_POLICY = Path(__file__).parents[2] / "services/tether_services/demo/models/policy"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"the data is not there: {DATA} (../shared is not part of the repository)"
    ),
]


def trained(folder: Path, source: str, **changes: Any) -> Any:
    """Return the manifest of a short training on a file of the data."""
    values: dict[str, Any] = {
        "base": str(PACKAGED_POLICY),
        "data": {"sources": [str(DATA / source)]} | changes.pop("data", {}),
        "training": {"max_steps": 4, "eval_every": 4, "rows_per_step": 8, "micro_batch_rows": 8},
        "max_tokens": 128,
    }
    run_dpo(dpo_config(folder, **values | changes))
    return json.loads((folder / "dpo" / "manifest.json").read_text())


def test_pairs_of_short_answers_are_learned_and_the_length_baseline_is_near_a_half(tmp_path: Path) -> None:
    training = {"max_steps": 12, "eval_every": 12, "rows_per_step": 16, "micro_batch_rows": 8, "learning_rate": 0.002}
    manifest = trained(
        tmp_path,
        "preference/rasbt-preference.json",
        data={"max_rows": 300, "validation_fraction": 0.2},
        training=training,
    )
    metrics, report = manifest["metrics"], manifest["data_report"]
    left_out = metrics["overlong_records"] + sum(report["dropped"].values())
    assert metrics["train_pairs"] + metrics["validation_pairs"] + left_out == report["num_rows"] == 300
    assert metrics["accuracy"] > metrics["length_baseline"] + 0.1
    assert 0.4 < metrics["longer_wins"] < 0.65


def test_rankings_of_two_to_nine_answers_are_all_pairs_or_one_each(tmp_path: Path) -> None:
    counts = {}
    for pairs in ("all", "best_worst"):
        folder = tmp_path / pairs
        folder.mkdir()
        training = {"max_steps": 1, "eval_every": 100, "rows_per_step": 4, "micro_batch_rows": 4}
        manifest = trained(
            folder, "ranking/oasst-trees.jsonl", pairs=pairs, overlong="truncate", max_tokens=32, training=training
        )
        metrics = manifest["metrics"]
        counts[pairs] = metrics["train_pairs"] + metrics["validation_pairs"] + metrics["alike_pairs"]
        groups = manifest["data_report"]["num_train"] + manifest["data_report"]["num_validation"]
        assert groups == 212, "as the data's README counts them"
    assert counts["best_worst"] == 212 < counts["all"] / 3


def test_transcripts_are_read_and_long_ones_dropped_and_counted(tmp_path: Path) -> None:
    manifest = trained(tmp_path, "preference/hh-helpful-base.jsonl.gz", data={"max_rows": 150})
    metrics, report = manifest["metrics"], manifest["data_report"]
    assert metrics["overlong_records"] > 0
    assert metrics["train_pairs"] + metrics["validation_pairs"] + metrics["overlong_records"] == (
        report["num_train"] + report["num_validation"]
    )
