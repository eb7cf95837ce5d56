"""Loads transformers models for services that only read them. Needs transformers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from tether.errors import InvalidArgumentError
from tether_services.runtime.model_folder import Quantization

EMBEDDING_WARNINGS = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "Setting `save_embedding_layers` to `True`",
)
"""How PEFT begins its doubts about an adapter of the embeddings that the output layer does not have."""
KEPT_WHOLE = ("lm_head", "score")
"""Layers that stay as they are in a quantised model: those whose output is the result."""


def allow_adapters_of_embeddings() -> None:
    """Keep PEFT's doubts about them quiet in this process; what we read from them is a score or a value, no token."""
    for beginning in EMBEDDING_WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)


def load_pretrained(
    kind: Any,
    folder: Path,
    *,
    dtype: str,
    field: str,
    may_lack: Collection[str] = (),
    quantization: Quantization = "none",
    device: str = "cpu",
    **options: object,
) -> Any:
    """Return a frozen model in evaluation mode on its device; only safetensors are read, no code of the folder runs.

    Args:
        kind: The transformers class, for example AutoModelForCausalLM.
        folder: Holds config.json and weights.
        dtype: "float32" or "bfloat16".
        field: Name of the setting, for errors.
        may_lack: Names of weights that the folder need not have, because they come from elsewhere.
        quantization: How the linear layers are kept; output layer and score head stay as they are.
        device: Where to.
        options: More arguments of `from_pretrained`.

    Raises:
        InvalidArgumentError: The folder does not hold such a model or lacks some of its weights, or bitsandbytes is
            needed and not installed.
    """
    if quantization != "none":
        options |= {"quantization_config": _quantization_config(quantization, dtype), "device_map": {"": device}}
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
    model = model.to(device) if quantization == "none" else _with_one_arithmetic(model)
    return model.requires_grad_(False).eval()


def _with_one_arithmetic(model: Any) -> Any:
    """Return the quantised model with the same arithmetic in training and evaluation.

    On processors with bfloat16 instructions the library would repack 4-bit weights at the first evaluation, compute in
    bfloat16 from then on, and fail on layers whose inputs are not a multiple of 64. In 8 bits on a processor it would
    also round what it multiplies in evaluation, by columns of the whole batch: a row's result would then depend on the
    rows beside it. Its layers for training, which round the weights alone, are the faster ones there too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt" and module.weight.device.type == "cpu":
            module.train = MethodType(_stay_in_training, module)
    return model


def _stay_in_training(module: Any, mode: bool = True) -> Any:
    """Do what `nn.Module.train` does, but for the change of mode."""
    module.training = True
    return module


def _quantization_config(quantization: Quantization, dtype: str) -> BitsAndBytesConfig:
    """Return the library's form of the setting: int8 with outliers apart, or nf4 with quantised constants."""
    if find_spec("bitsandbytes") is None:
        message = f"{quantization} needs bitsandbytes: pip install 'tether[quant]'"
        raise InvalidArgumentError(message, field="quantization")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line for each product of float32 inputs
    return BitsAndBytesConfig(
        load_in_8bit=quantization == "int8",
        load_in_4bit=quantization == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=list(KEPT_WHOLE),
    )
