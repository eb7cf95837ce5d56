"""A reward model on a causal base: building it, reading its scores, writing it as an adapter folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from tether.errors import InvalidArgumentError
from tether_services.recipes.config import LORA_TARGETS, RewardModelConfig

SCORE_BATCH = 16
"""Texts in one forward pass: few enough that sorting by length saves padding."""
REWARD_NAME = "tether_reward.json"


@dataclass(frozen=True, slots=True)
class Normalisation:
    """`tether_reward.json`: the base of a reward adapter and its scale, score = gain * (raw - bias)."""

    base: str
    """Folder of the base model, relative to the folder of this file."""
    gain: float
    """Factor, above 0."""
    bias: float
    """Mean raw score of the demonstrations."""
    max_length: int
    """Longest text in tokens."""

    def write(self, folder: Path) -> Path:
        """Write the file into a reward model folder and return its path."""
        path = folder / REWARD_NAME
        path.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path


def build_reward_model(config: RewardModelConfig, *, pad_token_id: int) -> Any:
    """Return the base with a fresh LoRA adapter and score head, both trainable, everything else frozen.

    The head starts with standard deviation 1 / sqrt(h + 1) and has no bias; the adapter starts as no change.

    Raises:
        InvalidArgumentError: No model in the folder.
    """
    try:
        base = AutoModelForSequenceClassification.from_pretrained(
            config.base, num_labels=1, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"no model in {config.base}: {error}", field="base") from error
    base.config.pad_token_id = pad_token_id
    nn.init.normal_(base.score.weight, std=1.0 / math.sqrt(base.config.hidden_size + 1))
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(LORA_TARGETS),
    )
    return get_peft_model(base, lora)  # this task type trains and saves the module `score` whole


def raw_scores(model: Any, rows: Sequence[Sequence[int]], *, pad_token_id: int) -> Tensor:
    """Return the head's value at the last token of each row, [N] float32.

    The index comes from the lengths of the rows, not from a search for padding, which is on the right.

    Args:
        model: What `build_reward_model` returned, or a loaded `PeftModel` of the same shape.
        rows: N sequences of token ids, none empty.
        pad_token_id: Fills the rows on the right; its value does not reach the scores.

    Raises:
        InvalidArgumentError: A row is empty.
    """
    lengths = torch.tensor([len(row) for row in rows])
    if not rows or int(lengths.min()) == 0:
        raise InvalidArgumentError("every text to score needs a token", field="token_ids")
    ids = torch.full((len(rows), int(lengths.max())), pad_token_id)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    classifier = model.get_base_model()
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    hidden = classifier.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(rows)), lengths - 1]
    values: Tensor = classifier.score(last)
    return values.squeeze(-1).float()


def scores_by_length(model: Any, rows: Sequence[Sequence[int]], *, pad_token_id: int) -> Tensor:
    """Return the raw scores of any number of rows, [N], in their order; rows of like length share a forward pass."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = [order[start : start + SCORE_BATCH] for start in range(0, len(order), SCORE_BATCH)]
    parts = [raw_scores(model, [rows[index] for index in batch], pad_token_id=pad_token_id) for batch in batches]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def score_all(model: Any, rows: Sequence[Sequence[int]], *, pad_token_id: int) -> Tensor:
    """Return the raw scores of any number of rows, [N], in their order, without gradients."""
    model.eval()
    with torch.inference_mode():
        scores = scores_by_length(model, rows, pad_token_id=pad_token_id)
    model.train()
    return scores


def write_reward_model(model: Any, config: RewardModelConfig, *, bias: float) -> Normalisation:
    """Write adapter, head and normalisation into the output folder and return the normalisation.

    The adapter names its base by a relative path: the two folders can be moved together.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    reference = config.base_reference or Path(os.path.relpath(config.base, config.output)).as_posix()
    _write_adapter(model, config.output, base=reference)
    normalisation = Normalisation(base=reference, gain=1.0, bias=round(bias, 6), max_length=config.max_length)
    normalisation.write(config.output)
    return normalisation


def _write_adapter(model: Any, folder: Path, *, base: str) -> None:
    """Write the adapter's two files, without the model card that the library would put over an existing one.

    Lists are sorted: the library keeps sets, whose order changes from run to run.
    """
    settings = model.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    for name in ("target_modules", "modules_to_save"):
        settings[name] = sorted(set(settings[name]))
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
