"""Rankings and settings for tests of the reward stage, made by the tests themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.unit.recipe_inputs import write_labels
from tests.unit.stage_inputs import ANIMALS, write_base
from tether_services.recipes.config import RewardModelConfig

ADVERBS = ("badly", "slowly", "fairly well", "well", "very well indeed")
"""What makes an answer worse or better, the worst first."""


def write_rankings(path: Path, *, count: int, seed: int = 0, largest: int = 5) -> Path:
    """Write prompts with 2 to `largest` answers and their scores, 0 to 4; every third prompt of K > 2 has a tie."""
    rng = random.Random(seed)
    lines = []
    for index in range(count):
        size = rng.randint(2, largest)
        scores = rng.sample(range(len(ADVERBS)), size)
        if size > 2 and index % 3 == 0:
            scores[0] = scores[1]
        answers = [f" The {rng.choice(ANIMALS)} number {rng.randrange(99)} sang {ADVERBS[score]}." for score in scores]
        lines.append({"prompt": f"How did song {seed}-{index} go?", "answers": answers, "scores": scores})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_ranked_pairs(path: Path, *, count: int, seed: int = 0, margin: float | None = None) -> Path:
    """Write prompts with a better and a worse answer."""
    rng = random.Random(seed)
    lines = []
    for index in range(count):
        worse, better = sorted(rng.sample(range(len(ADVERBS)), 2))
        answers = [f" The {rng.choice(ANIMALS)} sang {ADVERBS[place]}." for place in (better, worse)]
        line = {"prompt": f"How did song {index} go?", "chosen": answers[0], "rejected": answers[1], "margin": margin}
        lines.append({key: value for key, value in line.items() if value is not None})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def reward_config(
    inputs: Path, output: Path, *, training: dict[str, Any] | None = None, **changes: Any
) -> RewardModelConfig:
    """Return the settings of a run of 20 steps and some seconds over rankings, on a tiny base."""
    values: dict[str, Any] = {
        "output": output,
        "base": str(write_base(inputs / "base")),
        "data": {"sources": [str(write_rankings(inputs / "rankings.jsonl", count=90))], "validation_fraction": 0.2},
        "max_tokens": 64,
        "lora": {"rank": 4, "alpha": 8},
        "threads": 1,
    }
    return RewardModelConfig.model_validate(values | changes | {"training": TRAINING | (training or {})})


def labelled_config(inputs: Path, output: Path, **changes: Any) -> RewardModelConfig:
    """Return the settings of a run of some seconds over labelled sentences, on a tiny base."""
    data = {
        "sources": [str(write_labels(inputs / "train.csv", count=400, seed=1))],
        "validation_sources": [str(write_labels(inputs / "dev.csv", count=60, seed=2))],
    }
    values: dict[str, Any] = {"data": data, "group_size": 4}
    return reward_config(inputs, output, **values | changes)


TRAINING = {
    "learning_rate": 0.01,
    "rows_per_step": 8,
    "micro_batch_rows": 4,
    "num_epochs": 2,
    "log_every": 5,
    "eval_every": 20,
    "trackers": (),
}
"""Steps of a fraction of a second."""
