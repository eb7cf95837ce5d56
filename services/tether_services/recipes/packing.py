"""Several demonstrations in one sequence, each of which sees only itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import SFTTrainer
from trl.data_utils import pack_dataset

from tether.errors import InvalidArgumentError
from tether_services.recipes.weighted_loss import BatchFreeLoss

__all__ = ["AnswerTrainer", "PackedTrainer", "check_packing", "collate_packed", "pack", "unpacked"]

CHECKED_TOKENS = 32
"""Tokens of each of the two rows that show whether a model keeps packed rows apart."""
TOLERANCE = {True: 1e-3, False: 0.05}
"""Relative difference that packing may make, for a base in float32 and for one of lower precision."""
IGNORED = -100
"""Label of a position without a loss."""


def pack(rows: Sequence[Mapping[str, list[int]]], *, max_tokens: int) -> Dataset:
    """Return rows put together to sequences of at most `max_tokens` (best fit, decreasing), with their `seq_lengths`.

    No row is cut: none is longer than `max_tokens`.
    """
    return pack_dataset(Dataset.from_list(list(rows)), max_tokens, strategy="bfd")


def unpacked(rows: Sequence[Mapping[str, list[int]]]) -> Dataset:
    """Return one sequence for each row, so that a validation loss is the same with and without packing."""
    return Dataset.from_list([{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows])


def collate_packed(sequences: Sequence[Mapping[str, list[int]]], *, pad_token_id: int) -> dict[str, Tensor]:
    """Return a batch of packed sequences, [B, T], whose positions begin again with every row.

    Without an attention mask transformers reads from the positions which tokens belong together. TRL's own collator
    makes one sequence of the whole batch, whose attention without a variable-length kernel costs (B * T)^2 and not
    B * T^2.
    """
    ids = [torch.tensor(sequence["input_ids"]) for sequence in sequences]
    positions = [torch.cat([torch.arange(length) for length in sequence["seq_lengths"]]) for sequence in sequences]
    labels = [torch.tensor(sequence["labels"]) for sequence in sequences]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "position_ids": pad_sequence(positions, batch_first=True, padding_value=0),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    batch["labels"][batch["position_ids"] == 0] = IGNORED  # the first token of a row follows from nothing
    return batch


def check_packing(model: Any, rows: Sequence[Mapping[str, list[int]]], *, is_exact: bool) -> None:
    """Compare what a model says of two rows packed and apart.

    Args:
        model: On its device.
        rows: Training rows; the ends of the first and of the last are read.
        is_exact: Whether it computes in float32, not quantised.

    Raises:
        InvalidArgumentError: Packed rows see each other in this model, so that packing would change what is learned.
    """
    texts = [row["input_ids"][-CHECKED_TOKENS:] for row in (rows[0], rows[-1])]
    ids = [*texts[0], *texts[1]]
    packed = collate_packed([{"input_ids": ids, "labels": ids, "seq_lengths": list(map(len, texts))}], pad_token_id=0)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([texts[1]], device=model.device), use_cache=False).logits[0].float()
        inputs = {name: packed[name].to(model.device) for name in ("input_ids", "position_ids")}
        together = model(**inputs, use_cache=False).logits[0, len(texts[0]) :].float()
    model.train(was_training)
    if float((together - alone).norm() / alone.norm()) > TOLERANCE[is_exact]:
        raise InvalidArgumentError(
            "rows packed into one sequence see each other in this base; unset it", field="packing"
        )


class AnswerTrainer(BatchFreeLoss, SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's trainer with a validation loss that is the mean over all answer tokens."""

    def weight_of(self, inputs: dict[str, Tensor]) -> int:
        """Return the tokens that are predicted and have a loss; nothing predicts the first of a sequence."""
        return int((inputs["labels"][:, 1:] != IGNORED).sum())


class PackedTrainer(AnswerTrainer):
    """TRL's trainer, which would count the tokens of only one sequence of a batch."""

    _total_train_tokens: int

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """Return the loss of a batch and count its tokens, padding excluded; no row has fewer than two."""
        before: int = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *arguments, **options)
        if self.model.training:
            positions = inputs["position_ids"]
            self._total_train_tokens = before + int((positions > 0).sum() + (positions == 1).sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss
