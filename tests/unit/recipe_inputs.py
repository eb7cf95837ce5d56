"""Small inputs for the offline stages, made by the tests themselves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tether_services.recipes.config import PretrainConfig, RewardModelConfig

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


def pretrain_config(folder: Path, **changes: Any) -> PretrainConfig:
    """Return the settings of a run of about a second over stories in `folder`."""
    values: dict[str, Any] = {
        "output": folder / "policy",
        "text_files": (write_stories(folder / "stories.txt", count=200),),
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 1,
        "intermediate_size": 64,
        "context_tokens": 64,
        "block_tokens": 32,
        "blocks_per_step": 4,
        "num_steps": 40,
        "warmup_steps": 5,
        "learning_rate": 0.01,
        "eval_every": 20,
        "threads": 1,
    }
    return PretrainConfig(**values | changes)


def reward_config(folder: Path, base: Path, **changes: Any) -> RewardModelConfig:
    """Return the settings of a run of a few seconds over labelled sentences in `folder`."""
    values: dict[str, Any] = {
        "output": folder / "reward",
        "base": base,
        "train_files": (write_labels(folder / "train.csv", count=400, seed=1),),
        "validation_files": (write_labels(folder / "dev.csv", count=60, seed=2),),
        "demonstration_files": (write_stories(folder / "demonstrations.txt", count=100, seed=5),),
        "demonstration_tokens": 20,
        "max_length": 64,
        "lora_rank": 4,
        "lora_alpha": 8,
        "num_epochs": 8,
        "group_size": 4,
        "groups_per_step": 4,
        "learning_rate": 0.01,
        "threads": 1,
    }
    return RewardModelConfig(**values | changes)
