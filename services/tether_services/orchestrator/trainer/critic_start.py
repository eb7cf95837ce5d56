"""The start of the critic: a reward model's LoRA adapter and score head.

The folder is what PEFT writes for a sequence-classification model with `modules_to_save=["score"]`
(adapter_config.json, adapter_model.safetensors), plus optionally tether_reward.json:
{"base": relative path, "gain": g, "bias": b} for score = g * (raw - b).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.orchestrator.progress import note_work
from tether_services.runtime.content_hash import hash_model_folder

__all__ = ["CriticStart", "LoraShape", "read_critic_start"]

_FIELD = "reward_model"
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "alora_invocation_tokens",
)


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What decides the tensors and the scale of a LoRA adapter."""

    rank: int
    """Inner dimension, at least 1."""
    alpha: float
    """The update is scaled by alpha / rank, or by alpha / sqrt(rank) with rank-stabilised scaling."""
    target_modules: tuple[str, ...]
    """Names of the linear layers that have an adapter, sorted."""
    use_rslora: bool = False
    """Rank-stabilised scaling."""


@dataclass(frozen=True, slots=True)
class CriticStart:
    """A reward model's adapter and head, ready to become the critic."""

    shape: LoraShape
    tensors: dict[str, Tensor]
    """LoRA tensors by their PEFT name, without an adapter name."""
    head_weight: Tensor
    """[1, h] float32: gain times the score head."""
    head_bias: Tensor
    """[1] float32: -gain * bias."""


def read_critic_start(folder: Path, *, base_sha256: str) -> CriticStart:
    """Return the critic's start from a reward model folder over the base with the given content hash.

    Raises:
        NotFoundError: The folder or one of its files is missing.
        InvalidArgumentError: It is not a plain LoRA adapter with a score head, or a file cannot be read.
        FailedPreconditionError: It was trained on another base.
    """
    shape = _read_shape(_read_json(folder / "adapter_config.json"))
    gain, bias = _read_normalisation(folder, base_sha256)
    tensors = _read_tensors(folder / "adapter_model.safetensors")
    head = tensors.pop("base_model.model.score.weight", None)
    if head is None or head.ndim != 2 or head.shape[0] != 1:
        raise InvalidArgumentError(f"{folder} has no score head of one output among its saved modules", field=_FIELD)
    weight = gain * head.float()
    return CriticStart(shape, tensors, head_weight=weight, head_bias=weight.new_tensor([-gain * bias]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise NotFoundError(f"no {path.name} in {path.parent}", field=_FIELD) from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}", field=_FIELD) from error
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"{path} is not a JSON object", field=_FIELD)
    return content


def _read_shape(config: dict[str, Any]) -> LoraShape:
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        what = ", ".join(unsupported) or "another type or biases"
        message = f"the critic can only start from a plain LoRA adapter, not from one with {what}"
        raise InvalidArgumentError(message, field=_FIELD)
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets:
        raise InvalidArgumentError("adapter_config.json must list its target_modules by name", field=_FIELD)
    rank, alpha = _number(config, "r"), _number(config, "lora_alpha")
    return LoraShape(int(rank), alpha, tuple(sorted(targets)), bool(config.get("use_rslora")))


def _number(content: dict[str, Any], key: str) -> float:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidArgumentError(f"{key} must be a finite number, got {value!r}", field=_FIELD)
    return value


def _read_normalisation(folder: Path, base_sha256: str) -> tuple[float, float]:
    """Return gain and bias of the score, 1 and 0 where the folder states none, after checking the base it names."""
    if not (folder / "tether_reward.json").exists():
        return 1.0, 0.0
    content = _read_json(folder / "tether_reward.json")
    base = (folder / str(content.get("base", ""))).resolve()
    if hash_model_folder(base, on_chunk=note_work) != base_sha256:
        message = f"the reward model in {folder} was trained on another base; start the critic without it"
        raise FailedPreconditionError(message, field=_FIELD, reason="BASE_MISMATCH")
    return _number(content, "gain"), _number(content, "bias")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise NotFoundError(f"no {path.name} in {path.parent}", field=_FIELD) from error
    except SafetensorError as error:
        raise InvalidArgumentError(f"{path} is not a safetensors file: {error}", field=_FIELD) from error
    return tensors
