"""Checkpoints: safetensors and JSON, written whole or not at all, and verified before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from tether.errors import FailedPreconditionError, NotFoundError
from tether_services.runtime.durable import write_directory

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]

_FORMAT = 1
_TENSOR_FILES = ("weights.safetensors", "optimiser.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a trainer needs to continue bit for bit."""

    weights: dict[str, Tensor]
    """Adapters and value head, named `<adapter>/<parameter>`."""
    optimiser: dict[str, Tensor]
    """Optimiser state, named `<adapter>/<state>.<parameter>`, and the random state `rng`."""
    state: dict[str, Any]
    """Step counters and the identity of what the tensors fit: plain JSON values."""


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint as a new directory.

    Raises:
        FailedPreconditionError: The directory exists with other content.
    """
    files = dict(zip(_TENSOR_FILES, (save(checkpoint.weights), save(checkpoint.optimiser)), strict=True))
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    state = {"format": _FORMAT, "sha256": hashes, **checkpoint.state}
    files["state.json"] = (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()
    write_directory(directory, files, points="checkpoint")


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return the checkpoint in `directory`, after comparing the hashes of its files.

    Raises:
        NotFoundError: A file is missing.
        FailedPreconditionError: A file is damaged or of another format.
    """
    state = _parse_state(_read(directory / "state.json"))
    weights, optimiser = (_read_tensors(directory / name, state["sha256"]) for name in _TENSOR_FILES)
    return Checkpoint(weights, optimiser, state)


def _read_tensors(path: Path, hashes: dict[str, str]) -> dict[str, Tensor]:
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != hashes.get(path.name):
        message = f"{path} is damaged; continue from an earlier checkpoint"
        raise FailedPreconditionError(message, field="checkpoint", reason="CHECKPOINT_DAMAGED")
    tensors: dict[str, Tensor] = load(content)
    return tensors


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"no checkpoint file at {path}", field="checkpoint") from error


def _parse_state(content: bytes) -> dict[str, Any]:
    try:
        state = json.loads(content)
    except ValueError as error:
        raise FailedPreconditionError(
            "state.json is damaged; continue from an earlier checkpoint",
            field="checkpoint",
            reason="CHECKPOINT_DAMAGED",
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT or not isinstance(state.get("sha256"), dict):
        message = f"the checkpoint is not of format {_FORMAT}; use the version that wrote it"
        raise FailedPreconditionError(message, field="checkpoint", reason="CHECKPOINT_FORMAT")
    return state
