"""Checkpoints: safetensors and JSON, written whole or not at all, and verified before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from tether.errors import NotFoundError
from tether_services.orchestrator.checkpoint_files import FORMAT, STATE_FILE, TENSOR_FILES, check_hash, parse_state
from tether_services.runtime.durable import write_directory

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]


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
    files = dict(zip(TENSOR_FILES, (save(checkpoint.weights), save(checkpoint.optimiser)), strict=True))
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    state = {"format": FORMAT, "sha256": hashes, **checkpoint.state}
    files[STATE_FILE] = (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()
    write_directory(directory, files, points="checkpoint")


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return the checkpoint in `directory`, after comparing the hashes of its files.

    Raises:
        NotFoundError: A file is missing.
        FailedPreconditionError: A file is damaged or of another format.
    """
    state = parse_state(_read(directory / STATE_FILE))
    weights, optimiser = (_read_tensors(directory / name, state["sha256"]) for name in TENSOR_FILES)
    return Checkpoint(weights, optimiser, state)


def _read_tensors(path: Path, hashes: dict[str, str]) -> dict[str, Tensor]:
    content = _read(path)
    check_hash(path, hashlib.sha256(content).hexdigest(), hashes)
    tensors: dict[str, Tensor] = load(content)
    return tensors


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"no checkpoint file at {path}", field="checkpoint") from error
