"""Settings of the offline stages: ranges, unknown keys, the default files, and a light import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tether.errors import InvalidArgumentError
from tether_services.recipes.config import PretrainConfig, RewardModelConfig, StageConfig
from tether_services.runtime.settings import load_settings

DEFAULTS = Path(__file__).resolve().parents[2] / "deploy" / "config"
PRETRAIN_PATHS = ["output=out", "text_files=['a.txt']"]
REWARD_PATHS = [
    "output=out",
    "base=policy",
    "train_files=['a.csv']",
    "validation_files=['b.csv']",
    "demonstration_files=['c.txt']",
]


def load_pretrain(*overrides: str) -> PretrainConfig:
    return load_settings(
        PretrainConfig, env_prefix="TETHER_PRETRAIN__", overrides=[*PRETRAIN_PATHS, *overrides], environ={}
    )


@pytest.mark.parametrize(
    ("model", "file", "paths"),
    [(PretrainConfig, "pretrain.toml", PRETRAIN_PATHS), (RewardModelConfig, "reward_model.toml", REWARD_PATHS)],
)
def test_the_default_file_needs_only_the_paths(model: type[StageConfig], file: str, paths: list[str]) -> None:
    loaded = load_settings(model, env_prefix="X__", config=DEFAULTS / file, overrides=paths, environ={})
    assert loaded.output == Path("out")
    with pytest.raises(InvalidArgumentError) as caught:
        load_settings(model, env_prefix="X__", config=DEFAULTS / file, environ={})
    assert {violation.field for violation in caught.value.violations} == {path.split("=")[0] for path in paths}


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("hidden=64", "hidden"),
        ("head_dim=48", "head_dim"),
        ("learning_rate=0.0", "learning_rate"),
        ("learning_rate=nan", "learning_rate"),
        ("vocab_size=100", "vocab_size"),
        ("held_out_fraction=0.0", "held_out_fraction"),
        ("text_files=[]", "text_files"),
        ("num_steps=many", "num_steps"),
        ("weights_dtype=int8", "weights_dtype"),
    ],
)
def test_a_bad_key_is_named(override: str, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load_pretrain(override)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("override", "word"),
    [("hidden_size=80", "head_dim"), ("context_tokens=64", "block_tokens"), ("warmup_steps=9999", "num_steps")],
)
def test_sizes_that_do_not_fit_each_other_are_refused(override: str, word: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load_pretrain(override)
    assert word in caught.value.violations[0].description


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    config = load_pretrain()
    with pytest.raises(ValidationError, match="frozen"):
        config.num_steps = 1


@pytest.mark.parametrize("model", [PretrainConfig, RewardModelConfig])
def test_every_setting_is_described(model: type[Any]) -> None:
    missing = [name for name, field in model.model_fields.items() if not (field.description or "").endswith(".")]
    assert missing == []


def test_reading_the_settings_loads_no_tensor_library() -> None:
    code = "import sys, tether_services.recipes.config; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
