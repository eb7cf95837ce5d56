"""Loads transformers models for services that only read them. Needs transformers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from tether.errors import InvalidArgumentError


def load_pretrained(
    kind: Any, folder: Path, *, dtype: str, field: str, may_lack: Collection[str] = (), **options: object
) -> Any:
    """Return a frozen model in evaluation mode; only safetensors are read and no code from the folder runs.

    Args:
        kind: The transformers class, for example AutoModelForCausalLM.
        folder: Holds config.json and weights.
        dtype: "float32" or "bfloat16".
        field: Name of the setting, for errors.
        may_lack: Names of weights that the folder need not have, because they come from elsewhere.
        options: More arguments of `from_pretrained`.

    Raises:
        InvalidArgumentError: The folder does not hold such a model, or lacks some of its weights.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model, loading = kind.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InvalidArgumentError(f"{folder} cannot be loaded: {error}", field=field) from error
    missing = sorted(set(loading["missing_keys"]) - set(may_lack))
    if missing:  # transformers would fill these with random numbers
        names = ", ".join(missing[:5])
        raise InvalidArgumentError(f"{folder} lacks weights that this kind of model needs: {names}", field=field)
    return model.requires_grad_(False).eval()
