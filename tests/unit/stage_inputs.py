"""Small inputs for the stages after the pretraining, made by the tests themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.unit.tiny_llama import write_tiny_llama
from tether_services.recipes.config import SftConfig

PACKAGED_POLICY = Path(__file__).parents[2] / "services/tether_services/demo/models/policy"
ANIMALS = ("cat", "dog", "fox", "hen", "owl", "pig", "cow", "bee")


def write_base(folder: Path, **overrides: Any) -> Path:
    """Write a random Llama of two layers with the tokenizer of the packaged base, and return its folder."""
    if folder.exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED_POLICY)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_tiny_llama(folder, **(shape | overrides))
    tokenizer.save_pretrained(folder)
    return folder


def write_demonstrations(path: Path, *, count: int, seed: int = 0) -> Path:
    """Write instructions with one to three sentences as the answer; every instruction is another one."""
    rng = random.Random(seed)
    lines = []
    for index in range(count):
        first, second = rng.choices(ANIMALS, k=2)
        answer = " ".join(f"The {rng.choice(ANIMALS)} saw a {second}." for _ in range(rng.randint(1, 3)))
        lines.append({"instruction": f"Tell of {first} number {seed}-{index}.", "input": "", "output": answer})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def sft_config(inputs: Path, output: Path, *, training: dict[str, Any] | None = None, **changes: Any) -> SftConfig:
    """Return the settings of a fine-tuning of 20 steps and a second or two on a tiny base."""
    values: dict[str, Any] = {
        "output": output,
        "base": str(write_base(inputs / "base")),
        "data": {"sources": [str(write_demonstrations(inputs / "demonstrations.jsonl", count=90))]},
        "max_tokens": 96,
        "lora": {"rank": 4, "alpha": 8},
        "threads": 1,
        "training": {
            "learning_rate": 0.003,
            "rows_per_step": 8,
            "micro_batch_rows": 4,
            "num_epochs": 2,
            "log_every": 5,
            "eval_every": 4,
            "checkpoint_every": 2,
        }
        | (training or {}),
    }
    return SftConfig.model_validate(values | changes)
