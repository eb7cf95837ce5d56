"""The model that a stage starts from: whole or in 8 or 4 bits, with a fresh adapter where one is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoTokenizer, set_seed

from tether.errors import InvalidArgumentError
from tether_services.recipes.config import FineTuneConfig
from tether_services.runtime.model_folder import find_model_folder, pick_device
from tether_services.runtime.pretrained import allow_adapters_of_embeddings, load_pretrained

__all__ = ["base_folder", "load_base", "load_tokenizer", "with_adapter"]


def base_folder(config: FineTuneConfig) -> Path:
    """Return the local folder of the base.

    Raises:
        InvalidArgumentError: There is none of that name.
    """
    return find_model_folder(config.base, field="base")


def load_tokenizer(folder: Path, *, field: str = "base") -> Any:
    """Return the tokenizer of a folder; special strings in a text are read as ordinary text.

    Without a padding token the end token pads: lengths are explicit everywhere, so that none is taken for the other.

    Raises:
        InvalidArgumentError: There is no tokenizer, or it has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"no tokenizer in {folder}: {error}", field=field) from error
    if tokenizer.eos_token_id is None:
        raise InvalidArgumentError(f"the tokenizer in {folder} has no end token; answers could not end", field=field)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(kind: Any, config: FineTuneConfig, folder: Path, **options: Any) -> Any:
    """Return the base on its device: trainable in float32 without an adapter, else frozen in `dtype` or quantised.

    Args:
        kind: The transformers class, for example AutoModelForCausalLM.
        config: Precision, device and adapter.
        folder: See `base_folder`.
        options: More arguments of `load_pretrained`, for example `may_lack`.

    Raises:
        InvalidArgumentError: The folder does not hold such a model, or `max_tokens` is more than it accepts.
    """
    dtype = config.dtype if config.lora.rank else "float32"
    device = pick_device(config.device)
    model = load_pretrained(
        kind, folder, dtype=dtype, field="base", quantization=config.quantization, device=device, **options
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", config.max_tokens)
    if config.max_tokens > longest:
        message = f"max_tokens is {config.max_tokens}, and {folder.name} accepts {longest}; lower it"
        raise InvalidArgumentError(message, field="max_tokens")
    if not config.lora.rank:
        model.requires_grad_(True)
    return model.train()


def with_adapter(model: Any, config: FineTuneConfig, *, task: TaskType) -> Any:
    """Return the model with a fresh adapter in float32; with rank 0 the model itself.

    For sequence classification PEFT trains and saves the head `score` too.

    Raises:
        InvalidArgumentError: The base has none of the target modules, or a language model's embeddings are one.
    """
    if not config.lora.rank:
        return model
    if task is TaskType.CAUSAL_LM:
        _check_linear(model, config.lora.target_modules)
    lora = LoraConfig(
        task_type=task,
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        bias="none",
        target_modules=list(config.lora.target_modules),
    )
    set_seed(config.seed)  # the same start however the base was loaded, and TRL's
    try:
        allow_adapters_of_embeddings()
        adapted = get_peft_model(model, lora)
    except ValueError as error:  # PEFT's answer where no layer has one of the names
        raise InvalidArgumentError(f"no adapter fits this base: {error}", field="lora.target_modules") from error
    if config.training.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def _check_linear(model: Any, names: Sequence[str]) -> None:
    """Refuse an adapter of the embeddings: the output layer may share them, and engines do not serve it."""
    embeddings = {path.rpartition(".")[2] for path, part in model.named_modules() if isinstance(part, nn.Embedding)}
    refused = sorted(embeddings.intersection(names))
    if refused:
        message = f"an adapter of the embeddings ({refused[0]}) can only belong to a reward model"
        raise InvalidArgumentError(message, field="lora.target_modules")
