"""From what a user typed to a folder with a model in it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from tether.errors import InvalidArgumentError

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
MAX_HUB_NAME_CHARS = 96
"""The hub gives no longer names."""
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Weights in safetensors, configuration and tokenizer; never pickles or code."""

Dtype = Literal["float32", "bfloat16"]
"""Precision of weights and arithmetic; log-probabilities and scores are computed in float32 in any case."""
Quantization = Literal["none", "int8", "nf4"]
"""How the weights of the linear layers are kept: as they are, in 8 bits, or in 4 bits (both with bitsandbytes)."""


def is_hub_name(name: str) -> bool:
    """Return whether a name is to be looked up on a hub: owner/name, and nothing of that name here."""
    return len(name) <= MAX_HUB_NAME_CHARS and bool(HUB_NAME.fullmatch(name)) and not os.path.exists(name)


def find_model_folder(model: str, *, field: str) -> Path:
    """Return the local folder of a model.

    Args:
        model: A folder, or a hub name such as "org/name", which is looked up in the local cache and then downloaded.
        field: Name of the setting, for errors.

    Raises:
        InvalidArgumentError: There is no such folder, and it is not a hub name that can be resolved.
    """
    folder = Path(model).expanduser()
    if model and os.path.isdir(folder):  # unlike Path.is_dir, also False for a name that no file can have
        return folder.resolve()
    if not is_hub_name(model):
        raise InvalidArgumentError(f"{model!r} is neither a folder nor a hub name (org/name).", field=field)
    return _download(model, field=field)


def _download(model: str, *, field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidArgumentError(
            f"There is no folder {model!r}, and the hub could not give a model of that name "
            f"({type(error).__name__}). Name a local folder, or make the hub reachable.",
            field=field,
        ) from error


def pick_device(device: str) -> str:
    """Return the torch device for a setting: "auto" is the GPU where there is one, else the CPU."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
