"""Small inputs for the offline stages, made by the tests themselves."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether_services.recipes.config import PretrainConfig

SEPARATOR = "<|endoftext|>"
ANIMALS = ("cat", "dog", "fox", "hen", "owl", "pig", "cow", "bee")
GOOD = ("warm", "happy", "lovely", "bright", "kind")
BAD = ("cold", "sad", "ugly", "dark", "mean")


def write_stories(path: Path, *, count: int, seed: int = 0) -> Path:
    """Write short separated stories of a fixed pattern, and an unfinished one at the end."""
    rng = random.Random(seed)
    stories = [
        f"One day a {rng.choice(GOOD + BAD)} {rng.choice(ANIMALS)} met a {rng.choice(ANIMALS)}.\n"
        f"The {rng.choice(ANIMALS)} said {rng.randrange(1000)} words."
        for _ in range(count)
    ]
    path.write_text("".join(f"{story}\n{SEPARATOR}\n" for story in stories) + "One day a", encoding="utf-8")
    return path


def write_labels(path: Path, *, count: int, seed: int) -> Path:
    """Write a CSV of sentences whose label one word decides."""
    rng = random.Random(seed)
    rows = ["label,sentence"]
    for index in range(count):
        label = index % 2
        word = rng.choice(GOOD if label else BAD)
        rows.append(f"{label},The {rng.choice(ANIMALS)} was {word} in film number {seed * 10000 + index}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def pretrain_config(folder: Path, *, training: Mapping[str, Any] | None = None, **changes: Any) -> PretrainConfig:
    """Return the settings of a run of about a second over stories in `folder`."""
    values: dict[str, Any] = {
        "output": folder / "policy",
        "data": {"sources": (str(write_stories(folder / "stories.txt", count=200)),)},
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 1,
        "intermediate_size": 64,
        "context_tokens": 64,
        "block_tokens": 32,
        "threads": 1,
    }
    schedule = {
        "rows_per_step": 4,
        "micro_batch_rows": 4,
        "max_steps": 40,
        "warmup_fraction": 0.125,
        "learning_rate": 0.01,
        "log_every": 5,
        "eval_every": 20,
        "checkpoint_every": 20,
    }
    return PretrainConfig(**values | changes | {"training": schedule | dict(training or {})})
