"""Rankings and settings for tests of the preference stage, over the words of the tiny policy."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.rpc.run_services import write_tiny_policy
from tether_services.recipes.config import DpoConfig

LIKED, DISLIKED = range(10, 15), range(25, 30)


def write_pairs(path: Path, *, count: int = 40, seed: int = 0) -> Path:
    """Write pairs whose better answer has words of one kind and whose worse one words of another, of any length."""
    rng = random.Random(seed)

    def answer(kind: range) -> str:
        return "".join(f" w{rng.choice(kind)}" for _ in range(rng.randint(1, 5)))

    rows = [
        {"prompt": f"w{4 + n % 40} w{rng.randrange(4, 44)} w{n // 40 + 4}", "chosen": answer(LIKED)}
        | {"rejected": answer(DISLIKED)}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_rankings(path: Path, *, count: int = 12, seed: int = 0) -> Path:
    """Write rankings of three to five answers; the first two share a rank."""
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        answers = [f" w{rng.choice(LIKED)} w{k + 4} w{rng.choice(DISLIKED)}" for k in range(3 + n % 3)]
        rows.append({"prompt": f"w{4 + n} w{5 + n}", "answers": answers, "ranks": [1, *range(1, len(answers))]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dpo_config(folder: Path, **changes: Any) -> DpoConfig:
    """Return the settings of a run of some seconds in `folder`, with a tiny base in `folder/base`."""
    base = folder / "base"
    if not base.exists():
        write_tiny_policy(base)
    data = changes.pop("data", None) or {"sources": [str(write_pairs(folder / "pairs.jsonl"))]}
    training = {
        "learning_rate": 0.005,
        "schedule": "linear",
        "num_epochs": 2,
        "rows_per_step": 8,
        "micro_batch_rows": 4,
        "log_every": 1,
        "eval_every": 4,
        "checkpoint_every": 4,
        "trackers": (),
    }
    values: dict[str, Any] = {
        "output": folder / "dpo",
        "base": str(base),
        "data": {"validation_fraction": 0.25} | data,
        "lora": {"rank": 4, "alpha": 8},
        "max_tokens": 32,
        "threads": 1,
        "device": "cpu",
    }
    return DpoConfig.model_validate(values | {"training": training | changes.pop("training", {})} | changes)
