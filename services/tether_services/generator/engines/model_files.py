"""What both real engines read from a base model's folder before they load it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tether.errors import InvalidArgumentError
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import EngineDescription
from tether_services.runtime.content_hash import hash_model_folder
from tether_services.runtime.model_folder import find_model_folder

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A base model on disk."""

    folder: Path
    """Where it is."""
    sha256: str
    """Its content hash."""
    config: Any
    """Its transformers configuration."""
    stop_token_ids: tuple[int, ...]
    """Ids that end a text, of its generation configuration."""
    max_model_len: int
    """Context in use."""
    dtype: str
    """Numeric type in use."""


def read_model_files(settings: GeneratorSettings, *, on_gpu: bool) -> ModelFiles:
    """Return what the settings name, downloading a hub model first.

    Raises:
        InvalidArgumentError: There is no such model, or its context is shorter than max_model_len.
    """
    from transformers import AutoConfig

    folder = find_model_folder(settings.model, field="model")
    sha256 = hash_model_folder(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgumentError(f"{folder} cannot be loaded: {error}", field="model") from error
    text_config = config.get_text_config()
    limit = int(getattr(text_config, "max_position_embeddings", 0) or 0)
    if settings.max_model_len and limit and settings.max_model_len > limit:
        raise InvalidArgumentError(
            f"{settings.max_model_len} is more than the model's context of {limit}.", field="max_model_len"
        )
    if not limit and not settings.max_model_len:
        raise InvalidArgumentError("The model names no context length; set one.", field="max_model_len")
    auto_dtype = "bfloat16" if on_gpu else "float32"
    return ModelFiles(
        folder=folder,
        sha256=sha256,
        config=config,
        stop_token_ids=read_stop_token_ids(folder, text_config.eos_token_id),
        max_model_len=settings.max_model_len or limit,
        dtype=auto_dtype if settings.dtype == "auto" else settings.dtype,
    )


def read_stop_token_ids(folder: Path, fallback: int | list[int] | None) -> tuple[int, ...]:
    """Return the ids that end a text: those of generation_config.json, else the fallback.

    A tokenizer's own eos_token is no guide: models exist that never emit it.

    Raises:
        InvalidArgumentError: The file is malformed.
    """
    path = folder / "generation_config.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise InvalidArgumentError(f"{path} is not a JSON object.", field="model") from error
    listed = fallback if listed is None else listed
    if listed is None:
        return ()
    return tuple(listed) if isinstance(listed, list) else (int(listed),)


def find_linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every linear layer but the output embedding, by module path."""
    from torch import nn

    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }


def read_linear_shapes(files: ModelFiles) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a model without loading its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return find_linear_shapes(AutoModelForCausalLM.from_config(files.config, trust_remote_code=False))


def describe_model(
    files: ModelFiles, settings: GeneratorSettings, linear_shapes: dict[str, tuple[int, int]]
) -> EngineDescription:
    """Return the description of an engine that serves these files."""
    return EngineDescription(
        engine=settings.engine,
        base_model=Path(settings.model).name if Path(settings.model).is_dir() else settings.model,
        base_model_sha256=files.sha256,
        vocab_size=int(files.config.get_text_config().vocab_size),
        max_model_len=files.max_model_len,
        max_lora_rank=settings.adapters.max_rank,
        stop_token_ids=files.stop_token_ids,
        dtype=files.dtype if settings.quantization == "none" else settings.quantization,
        linear_shapes=linear_shapes,
    )


def check_logprobs(logprobs: list[float]) -> list[float]:
    """Return log-probabilities after making sure that they are numbers.

    Raises:
        FloatingPointError: The model computed a NaN.
    """
    if any(math.isnan(value) for value in logprobs):
        raise FloatingPointError("the model computed NaN log-probabilities")
    return logprobs
