"""A reward model on a causal base: building it, reading its scores, writing its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from tether.errors import InvalidArgumentError
from tether_services.recipes.artifact import relative_base, write_adapter
from tether_services.recipes.base_model import load_base, with_adapter
from tether_services.recipes.config import RewardModelConfig
from tether_services.recipes.progress import tracked
from tether_services.runtime.durable import write_text

__all__ = [
    "Normalisation",
    "build_reward_model",
    "normalise",
    "pad_rows",
    "raw_scores",
    "score_all",
    "write_reward_model",
]

ROWS_PER_PASS = 16
"""Rows in one forward pass: few enough that sorting by length saves padding."""
REWARD_NAME = "tether_reward.json"
HEAD_WEIGHT = "score.weight"
MIN_DEVIATION = 1e-6
"""Spread of equal scores that the rounding of float32 alone makes, relative to the score or to 1."""
FILL_ID = 0
"""Any id of the vocabulary: it stands to the right of every real token, where causal attention never looks."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """score = gain * (raw - bias), so that the scores of the demonstrations have mean 0 and standard deviation 1."""

    gain: float
    """Factor, above 0."""
    bias: float
    """Mean raw score of the demonstrations."""
    num_demonstrations: int


def build_reward_model(config: RewardModelConfig, folder: Path, *, pad_token_id: int) -> Any:
    """Return the base with a score head in float32, and with a fresh adapter where one is trained.

    The head is fresh, with standard deviation 1 / sqrt(h + 1) and no bias (D32), unless the base is a reward model.

    Args:
        config: The stage.
        folder: Of the base.
        pad_token_id: Noted in the model's configuration for libraries that look for padding; this project does not.

    Raises:
        InvalidArgumentError: The folder does not hold a decoder, or the adapter does not fit.
    """
    options = {"num_labels": 1, "pad_token_id": pad_token_id, "may_lack": (HEAD_WEIGHT,)}
    model = load_base(AutoModelForSequenceClassification, config, folder, **options)
    if not hasattr(model, "score"):
        message = f"{type(model).__name__} has no `score` head; only decoder models can be scored at the last token"
        raise InvalidArgumentError(message, field="base")
    model.score.float()
    if not _has_trained_head(folder):
        nn.init.normal_(model.score.weight, std=1.0 / math.sqrt(model.score.in_features + 1))
    return with_adapter(model, config, task=TaskType.SEQ_CLS)


def _has_trained_head(folder: Path) -> bool:
    """Return whether the folder's own configuration names a model with a score head."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return any("ForSequenceClassification" in name for name in content.get("architectures") or ())


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of token ids with padding on the right, [R, T], and their lengths, [R].

    Raises:
        InvalidArgumentError: There is no row, or one is empty: it has no token to read a score at.
    """
    lengths = torch.tensor([len(row) for row in rows])
    if not len(rows) or int(lengths.min()) == 0:
        raise InvalidArgumentError("every text to score needs a token", field="token_ids")
    token_ids = torch.full((len(rows), int(lengths.max())), FILL_ID)
    for index, row in enumerate(rows):
        token_ids[index, : len(row)] = torch.as_tensor(row)
    return token_ids, lengths


def raw_scores(
    model: Any, token_ids: Tensor, lengths: Tensor, *, precision: AbstractContextManager[Any] | None = None
) -> Tensor:
    """Return the head's value at the last token of each row, [R], at least float32; rows of like length share a pass.

    The place comes from the lengths (D34). Padding is on the right, where causal attention never looks, so that no
    mask is needed and its value has no influence.

    Args:
        model: What `build_reward_model` returned, or any decoder with a `score` head of one output.
        token_ids: [R, T].
        lengths: [R], each at least 1.
        precision: Around the body of the model, for example autocast; the head computes in its own type.
    """
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    order = torch.argsort(lengths, stable=True)
    parts = []
    with precision or nullcontext():
        for chosen in torch.split(order, ROWS_PER_PASS):
            width = int(lengths[chosen].max())
            parts.append(_last_hidden(classifier, token_ids[chosen, :width], lengths[chosen]))
    hidden = torch.cat(parts)[torch.argsort(order)]
    values: Tensor = classifier.score(hidden.to(_head_dtype(classifier)))
    return values.squeeze(-1)


def _last_hidden(classifier: Any, token_ids: Tensor, lengths: Tensor) -> Tensor:
    body = getattr(classifier, classifier.base_model_prefix)
    hidden: Tensor = body(input_ids=token_ids, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]


def _head_dtype(classifier: Any) -> torch.dtype:
    """Return the type of the head that is in use: with an adapter, of its own copy."""
    dtype: torch.dtype = list(classifier.score.parameters())[-1].dtype
    return dtype


def score_all(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the raw scores of any number of rows, [N] on the CPU, in their order, without gradients or dropout.

    Args:
        model: See `raw_scores`.
        rows: N sequences of token ids, at least one, none empty.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    chunks = [order[start : start + ROWS_PER_PASS] for start in range(0, len(order), ROWS_PER_PASS)]
    parts = []
    with torch.inference_mode():
        for chunk in tracked(chunks, title="scores"):
            token_ids, lengths = (tensor.to(model.device) for tensor in pad_rows([rows[index] for index in chunk]))
            parts.append(raw_scores(model, token_ids, lengths).cpu())
    model.train(was_training)
    return torch.cat(parts)[torch.argsort(torch.tensor(order))]


def normalise(model: Any, demonstrations: Sequence[Sequence[int]]) -> Normalisation:
    """Return the constants that give the demonstrations' scores mean 0 and standard deviation 1 (D13).

    Args:
        model: See `raw_scores`.
        demonstrations: Token ids.

    Raises:
        InvalidArgumentError: All of them have the same score, so that no factor gives a deviation of 1.
    """
    scores = score_all(model, demonstrations).double()
    bias, deviation = float(scores.mean()), float(scores.std(correction=0))
    if not deviation > MIN_DEVIATION * max(1.0, abs(bias)):
        message = f"the scores of {len(demonstrations)} demonstrations are all {bias:g}; give more, and different, ones"
        raise InvalidArgumentError(message, field="demonstrations")
    return Normalisation(gain=1.0 / deviation, bias=bias, num_demonstrations=len(demonstrations))


def write_reward_model(
    model: Any, tokenizer: Any, config: RewardModelConfig, normalisation: Normalisation, *, ends_text: bool
) -> None:
    """Write the folder that the reward service and the critic load: an adapter with its head, or a whole model.

    An adapter names its base by a relative path: the two folders can be moved together.

    Args:
        model: As it was trained.
        tokenizer: Of the model.
        config: The stage.
        normalisation: Of the scores.
        ends_text: Whether the service puts the end token behind texts, as it was behind every text of the training.
    """
    base = ""
    if isinstance(model, PeftModel):
        base = config.base_reference or relative_base(config.base, config.output)
        write_adapter(model, config.output, base=base)
    else:
        model.save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)
    constants = {name: value for name, value in asdict(normalisation).items() if name in ("gain", "bias")}
    content = {"base": base, **constants, "max_length": config.max_tokens, "ends_text": ends_text}
    write_text(config.output / REWARD_NAME, json.dumps(content, indent=2, allow_nan=False) + "\n")
