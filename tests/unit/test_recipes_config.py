"""Settings of the offline stages: ranges, unknown keys, the example files, and a light import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tether.errors import InvalidArgumentError
from tether_services.recipes.config import DpoConfig, PretrainConfig, RewardModelConfig, SftConfig, StageConfig
from tether_services.runtime.settings import load_settings

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "config"
OUTPUT_AND_DATA = ["output=out", "data.sources=['a.jsonl']"]
STAGES: dict[str, tuple[type[StageConfig], list[str]]] = {
    "pretrain.toml": (PretrainConfig, OUTPUT_AND_DATA),
    "sft.toml": (SftConfig, [*OUTPUT_AND_DATA, "base=policy"]),
    "reward_model.toml": (RewardModelConfig, [*OUTPUT_AND_DATA, "base=policy"]),
    "dpo.toml": (DpoConfig, [*OUTPUT_AND_DATA, "base=policy"]),
}


def load(file: str, *overrides: str) -> Any:
    """Return the settings of a stage without its example file."""
    model, required = STAGES[file]
    return load_settings(model, env_prefix="X__", overrides=[*required, *overrides], environ={})


def bad_fields(file: str, *overrides: str) -> list[str]:
    with pytest.raises(InvalidArgumentError) as caught:
        load(file, *overrides)
    return [violation.field for violation in caught.value.violations]


def complaint(file: str, *overrides: str) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        load(file, *overrides)
    (violation,) = caught.value.violations
    return violation.description


@pytest.mark.parametrize("file", STAGES)
def test_an_example_file_needs_only_folders_and_data(file: str) -> None:
    model, required = STAGES[file]
    loaded = load_settings(model, env_prefix="X__", config=EXAMPLES / file, overrides=required, environ={})
    assert (loaded.output, loaded.data.sources) == (Path("out"), ("a.jsonl",))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("hidden=64", "hidden"),
        ("head_dim=48", "head_dim"),
        ("training.learning_rate=0.0", "training.learning_rate"),
        ("training.learning_rate=nan", "training.learning_rate"),
        ("vocab_size=100", "vocab_size"),
        ("data.validation_fraction=0.0", "data.validation_fraction"),
        ("data.sources=[]", "data.sources"),
        ("training.max_steps=many", "training.max_steps"),
        ("training.warmup_fraction=1.0", "training.warmup_fraction"),
        ("weights_dtype=int8", "weights_dtype"),
    ],
)
def test_a_bad_key_is_named(override: str, field: str) -> None:
    assert bad_fields("pretrain.toml", override) == [field]


def test_an_unknown_tracker_is_refused_by_its_place_in_the_list() -> None:
    assert bad_fields("sft.toml", "training.trackers=['tensorboard', 'paper']") == ["training.trackers.1"]


@pytest.mark.parametrize(
    ("file", "overrides", "word"),
    [
        ("pretrain.toml", ["hidden_size=80"], "head_dim"),
        ("pretrain.toml", ["context_tokens=64"], "block_tokens"),
        ("pretrain.toml", ["training.optimizer=adamw_8bit"], "matrix_optimizer"),
        ("pretrain.toml", ["training.rows_per_step=9"], "micro_batch_rows"),
        ("pretrain.toml", ["training.checkpoint_every=10"], "eval_every"),
        ("sft.toml", ["quantization=nf4", "lora.rank=0"], "lora.rank"),
        ("dpo.toml", ["kind=ipo", "label_smoothing=0.1"], "label_smoothing"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(file: str, overrides: list[str], word: str) -> None:
    assert word in complaint(file, *overrides)


def test_adamw_in_8_bits_goes_with_adamw_for_the_matrices() -> None:
    loaded = load("pretrain.toml", "training.optimizer=adamw_8bit", "matrix_optimizer=adamw")
    assert loaded.training.optimizer == "adamw_8bit"


def test_a_pretraining_has_defaults_of_its_own_for_its_training() -> None:
    pretraining, fine_tuning = load("pretrain.toml").training, load("sft.toml").training
    assert (pretraining.keep_best, fine_tuning.keep_best) == (True, False)
    assert pretraining.learning_rate > fine_tuning.learning_rate


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    config = load("pretrain.toml")
    with pytest.raises(ValidationError, match="frozen"):
        config.training.max_steps = 1


@pytest.mark.parametrize("file", STAGES)
def test_every_setting_is_described(file: str) -> None:
    assert undescribed(STAGES[file][0]) == []


def undescribed(model: type[BaseModel]) -> list[str]:
    """Return the settings, nested ones included, whose description is no sentence."""
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += undescribed(field.annotation)
        elif not (field.description or "").endswith("."):
            found.append(name)
    return found


def test_reading_the_settings_loads_no_tensor_library() -> None:
    code = "import sys, tether_services.recipes.config; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
