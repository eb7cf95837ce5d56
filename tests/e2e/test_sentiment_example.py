"""The small reward model of examples/sentiment on public labelled sentences, by its documented commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.unit.data_inputs import shared_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "sentiment"
WANTED_ACCURACY = 0.86
"""Share of the pairs of a positive and a negative sentence that the model has to put in the right order."""
MOST_PARAMETERS = 5_000_000


def train(stage: str, name: str, *settings: str) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "tether_services", "train", stage, "--config", str(EXAMPLE / name), *options]
    subprocess.run(command, check=True, timeout=600)


def test_a_model_of_half_a_million_weights_ranks_unseen_sentences(tmp_path: Path) -> None:
    sentences, unseen = (shared_file(f"sentiment/sst-{part}.csv") for part in ("train", "dev"))
    train("pretrain", "base.toml", f"output={tmp_path}/base", f"data.sources=['{sentences}']")
    train(
        "reward",
        "reward.toml",
        f"base={tmp_path}/base",
        f"output={tmp_path}/reward",
        f"data.sources=['{sentences}']",
        f"data.validation_sources=['{unseen}']",
    )
    base, reward = (json.loads((tmp_path / part / "manifest.json").read_text()) for part in ("base", "reward"))
    overall = reward["metrics"]["evaluation"]["overall"]
    assert overall["num_pairs"] == 444 * 428
    assert base["metrics"]["parameter_count"] < MOST_PARAMETERS
    assert overall["accuracy"] >= WANTED_ACCURACY
