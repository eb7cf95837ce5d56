"""The files of a checkpoint, verified without the libraries that load tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether.errors import FailedPreconditionError

__all__ = ["FORMAT", "STATE_FILE", "TENSOR_FILES", "check_hash", "parse_state", "verify_tensors"]

FORMAT = 1
STATE_FILE = "state.json"
"""It holds the hashes of the others."""
TENSOR_FILES = ("weights.safetensors", "optimiser.safetensors")


def verify_tensors(folder: Path) -> None:
    """Compare the tensor files of a checkpoint with the hashes in its state.

    Raises:
        FailedPreconditionError: One is damaged, or the state is (CHECKPOINT_DAMAGED, CHECKPOINT_FORMAT).
        OSError: One is missing or cannot be read.
    """
    hashes = parse_state((folder / STATE_FILE).read_bytes())["sha256"]
    for name in TENSOR_FILES:
        with (folder / name).open("rb") as file:
            check_hash(folder / name, hashlib.file_digest(file, "sha256").hexdigest(), hashes)


def check_hash(path: Path, sha256: str, hashes: Mapping[str, str]) -> None:
    """Refuse a file whose hash is not the one in the state.

    Raises:
        FailedPreconditionError: CHECKPOINT_DAMAGED.
    """
    if sha256 != hashes.get(path.name):
        message = f"{path} is damaged; continue from an earlier checkpoint"
        raise FailedPreconditionError(message, field="checkpoint", reason="CHECKPOINT_DAMAGED")


def parse_state(content: bytes) -> dict[str, Any]:
    """Return the state of a checkpoint.

    Raises:
        FailedPreconditionError: It is no JSON (CHECKPOINT_DAMAGED), or of another format (CHECKPOINT_FORMAT).
    """
    try:
        state = json.loads(content)
    except ValueError as error:
        raise FailedPreconditionError(
            "state.json is damaged; continue from an earlier checkpoint",
            field="checkpoint",
            reason="CHECKPOINT_DAMAGED",
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("sha256"), dict):
        message = f"the checkpoint is not of format {FORMAT}; use the version that wrote it"
        raise FailedPreconditionError(message, field="checkpoint", reason="CHECKPOINT_FORMAT")
    return state
