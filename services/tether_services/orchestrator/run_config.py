"""Reads a run configuration and checks everything that can be checked before a model is loaded."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tether.errors import FieldViolation, InvalidArgumentError, TetherError
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.presets import lay_over, read_preset
from tether_services.orchestrator.prompt_sources import is_dataset, load_prompt_lists, load_prompts
from tether_services.orchestrator.prompts import split_prompts
from tether_services.orchestrator.run_rules import find_contradictions, find_idle
from tether_services.runtime.model_folder import is_hub_name
from tether_services.runtime.settings import validate

__all__ = ["MAX_CONFIG_BYTES", "check_run_config", "check_run_settings", "lay_over_defaults", "parse_run_config"]

MAX_CONFIG_BYTES = 256 * 1024


def parse_run_config(text: str) -> RunConfig:
    """Return the validated configuration of a TOML document, laid over the preset that it names.

    Raises:
        InvalidArgumentError: It is too long, not TOML, or has invalid keys, each named with its path.
    """
    if not text.strip() or len(text.encode()) > MAX_CONFIG_BYTES:
        message = f"The configuration must have 1 to {MAX_CONFIG_BYTES} bytes."
        raise InvalidArgumentError(message, field="config_toml")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the last for thousands of nested brackets
        raise InvalidArgumentError(f"The configuration is not valid TOML: {error}", field="config_toml") from None
    return validate(RunConfig, lay_over_defaults(values, read_preset(values.get("preset"))))


def lay_over_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run over weaker ones, of which those are left out that have no effect with them.

    What the run sets itself stays: `check_run_config` refuses it if it has no effect.

    Example: values with `ppo.advantage = "grpo"` over defaults with `ppo.lam = 1.0` are without `ppo.lam`.

    Args:
        values: What somebody has chosen for this run.
        defaults: What a preset or a packaged configuration says.

    Raises:
        InvalidArgumentError: Together they have invalid keys, each named with its path.
    """
    merged = lay_over(defaults, values)
    for violation in find_idle(validate(RunConfig, merged)):
        _drop_default(merged, values, violation.field.split("."))
    return merged


def _drop_default(merged: dict[str, Any], values: Mapping[str, Any], path: list[str]) -> None:
    """Remove the setting at a path, in place, unless the values have it."""
    *tables, name = path
    for table in tables:
        merged, values = merged[table], values.get(table, {})
    if name not in values:
        del merged[name]


def check_run_config(config: RunConfig) -> None:
    """Refuse a configuration whose files are missing or do not fit, or whose settings are idle or contradictory.

    Raises:
        InvalidArgumentError: One violation per bad field.
    """
    violations = [
        *_check_model(config.model),
        *_check_reward_model(config.reward_model),
        *_check_prompts(config),
        *_check_pretraining_text(config.ppo.ptx_text),
        *find_idle(config),
        *find_contradictions(config),
    ]
    _refuse(violations)


def check_run_settings(config: RunConfig) -> None:
    """Refuse a configuration whose settings are idle or contradictory, wherever its files are.

    Raises:
        InvalidArgumentError: One violation per bad field.
    """
    _refuse([*find_idle(config), *find_contradictions(config)])


def _refuse(violations: Sequence[FieldViolation]) -> None:
    if violations:
        message = f"The configuration has {len(violations)} invalid key(s)."
        raise InvalidArgumentError(message, reason="INVALID_CONFIG", violations=tuple(violations))


def _check_model(model: str) -> list[FieldViolation]:
    if is_hub_name(model):
        return []
    folder = Path(model)
    if not os.path.isdir(folder):  # unlike Path.is_dir, also False for a name that no file can have
        return [FieldViolation("model", f"no folder {model!r}; a hub name has the form owner/name")]
    if not any(folder.glob("*.safetensors")):
        return [FieldViolation("model", f"{model!r} has no *.safetensors file")]
    return _check_json(folder / "config.json", field="model", key="model_type")


def _check_reward_model(reward_model: str) -> list[FieldViolation]:
    if not reward_model:
        return []
    folder = Path(reward_model)
    if not os.path.isfile(folder / "adapter_model.safetensors"):
        description = f"{reward_model!r} has no adapter_model.safetensors; the critic starts from a LoRA reward model"
        return [FieldViolation("reward_model", description)]
    return _check_json(folder / "adapter_config.json", field="reward_model", key="peft_type")


def _check_json(path: Path, *, field: str, key: str) -> list[FieldViolation]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return [FieldViolation(field, f"cannot read {path}: {error.strerror}")]
    except ValueError as error:
        return [FieldViolation(field, f"{path} is not JSON: {error}")]
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        return [FieldViolation(field, f"{path} does not name its {key}")]
    return []


def _check_prompts(config: RunConfig) -> list[FieldViolation]:
    try:
        if is_dataset(config.prompts) or is_dataset(config.evaluation_prompts):
            return []  # read by the worker only: the library for it is heavy, and a hub may be slow
        split_prompts(config, *load_prompt_lists(config))
    except TetherError as error:
        return list(error.violations)
    return []


def _check_pretraining_text(source: str) -> list[FieldViolation]:
    if not source or is_dataset(source):
        return []
    try:
        load_prompts(source, field="ppo.ptx_text")
    except TetherError as error:
        return list(error.violations)
    return []
