"""A validation loss that is the same however the validation rows are batched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import EvalPrediction

__all__ = ["BatchFreeLoss", "weighted_mean"]


def weighted_mean(prediction: EvalPrediction) -> dict[str, float]:
    """Return the loss over all batches: the sum of their losses, [N, 2] with the weights beside them, by the weights.

    Example: sums 6 and 1 with weights 3 and 1 give 7 / 4.
    """
    total, weight = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {"loss": float(total / weight)}


class BatchFreeLoss:
    """Goes before a trainer of TRL among the bases of a class; its validation loss weights batches by `weight_of`.

    The library takes the mean of the batches, where a small last batch counts like the others, and a batch of short
    answers like one of long ones: the size of the batches would decide which checkpoint is the best.
    """

    def __init__(self, **arguments: Any) -> None:
        """Build the trainer.

        Args:
            arguments: Of the library's trainer.
        """
        super().__init__(compute_metrics=weighted_mean, **arguments)  # type: ignore[call-arg]  # the trainer is next

    def weight_of(self, inputs: dict[str, Tensor]) -> int:
        """Return how many things the loss of a batch is the mean of."""
        raise NotImplementedError

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """Return (no batch loss, [1, 2] summed loss and weight, placeholder for labels)."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)  # type: ignore[misc]
        weight = self.weight_of(inputs)
        figures = torch.stack([loss.detach().float() * weight, torch.tensor(float(weight), device=loss.device)])[None]
        return None, figures, figures[:, 0]
