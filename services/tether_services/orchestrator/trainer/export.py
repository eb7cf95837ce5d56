"""The policy adapter as the generator takes it: PEFT's two files, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from tether.errors import FailedPreconditionError
from tether_services.orchestrator.trainer.critic_start import LoraShape
from tether_services.runtime.durable import write_directory

__all__ = ["AdapterFile", "AdapterFiles", "export_adapter"]


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One file of an exported adapter."""

    name: str
    size_bytes: int
    sha256: str
    """Lower-case hex."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An exported adapter and what a receiver is told about it before the bytes."""

    directory: Path
    policy_version: int
    files: tuple[AdapterFile, ...]
    """adapter_config.json and adapter_model.safetensors."""
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    base_sha256: str
    """Content hash of the base model it belongs to."""
    is_identity: bool
    """True while every B is 0: the adapter then changes nothing, and log-probabilities equal the base's."""


def export_adapter(
    directory: Path,
    parameters: Mapping[str, Tensor],
    shape: LoraShape,
    *,
    policy_version: int,
    base_sha256: str,
) -> AdapterFiles:
    """Write the adapter as a new directory and return what it holds.

    The bytes depend on the weights and the shape alone, so equal adapters have equal hashes.

    Args:
        directory: Created; may exist only with the same content.
        parameters: By their PEFT name.
        shape: Rank, scale and targets.
        policy_version: Of the policy with this adapter, from 1; not written into the files.
        base_sha256: Content hash of the base model.

    Raises:
        FailedPreconditionError: A weight is not finite, or the directory exists with other content.
    """
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    _require_finite(tensors)
    files = {
        "adapter_config.json": config_json(shape),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    write_directory(directory, files)
    return AdapterFiles(
        directory=directory,
        policy_version=policy_version,
        files=tuple(AdapterFile(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in files.items()),
        rank=shape.rank,
        alpha=shape.alpha,
        target_modules=shape.target_modules,
        base_sha256=base_sha256,
        is_identity=all(bool(t.eq(0).all()) for name, t in tensors.items() if ".lora_B." in name),
    )


def _require_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FailedPreconditionError(f"{name} is not finite; the adapter is not exported", reason="NON_FINITE")


def config_json(shape: LoraShape) -> bytes:
    """Return adapter_config.json: the plain features that every engine loads, and no path of this machine."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "target_modules": list(shape.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": shape.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
