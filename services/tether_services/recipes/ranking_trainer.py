"""Training on K ranked answers as one batch element: K forward rows, all pairs of a prompt in its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_utils import EvalPrediction
from trl import RewardTrainer

from tether_services.ppo.losses import ranking_loss
from tether_services.recipes.ranking_metrics import Judged, pairs_of, win_share
from tether_services.recipes.scoring import pad_rows, raw_scores

__all__ = ["Objective", "RankingTrainer", "collate_rankings", "mean_figures"]

Objective = Literal["ranking", "regression"]


def collate_rankings(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return G rankings as one flat batch.

    Example: answers [[1, 5], [1]] with levels [1, 0] and [[1, 7, 8], [1, 9]] with levels [2, 0] become input_ids
    [4, 3], lengths [2, 1, 3, 2], levels [1, 0, 2, 0], sizes [2, 2] and margins [0, 0].

    Args:
        rows: `answer_ids` [K][T], `levels` [K] and `margin`, a number or None for 0, of each ranking; K may differ.
    """
    token_ids, lengths = pad_rows([ids for row in rows for ids in row["answer_ids"]])
    return {
        "input_ids": token_ids,
        "lengths": lengths,
        "levels": torch.tensor([level for row in rows for level in row["levels"]], dtype=torch.float32),
        "sizes": torch.tensor([len(row["levels"]) for row in rows]),
        "margins": torch.tensor([row.get("margin") or 0.0 for row in rows], dtype=torch.float32),
    }


def mean_figures(prediction: EvalPrediction) -> dict[str, float]:
    """Return loss and accuracy over all validation rankings; every ranking counts once.

    One with only ties, which a regression measures, has a loss and no accuracy: NaN.
    """
    losses, accuracies = np.asarray(prediction.predictions, dtype=np.float64).T
    return {"loss": float(losses.mean()), "accuracy": float(np.nanmean(accuracies))}


class RankingTrainer(RewardTrainer):  # type: ignore[misc]  # trl is untyped
    """The library's reward trainer with rankings of any K for pairs; a pair gives the library's own loss.

    The loss of a ranking is the mean over its pairs without a tie, that of a batch the mean over rankings (D33).
    """

    def __init__(self, *, objective: Objective, **arguments: Any) -> None:
        """Prepare.

        Args:
            objective: "ranking": Bradley-Terry; "regression": squared error of the scores against the levels.
            arguments: Of `RewardTrainer`; the data are rows for `collate_rankings`.
        """
        self._objective = objective
        super().__init__(data_collator=collate_rankings, compute_metrics=mean_figures, **arguments)

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """Return the rows as they are: they hold token ids."""
        return dataset

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss of a batch, with its figures where `return_outputs` asks for them."""
        losses, accuracies = self._judge(model, inputs)
        if self.model.training and not accuracies.isnan().all():
            self._metrics["train"]["accuracy"].append(float(accuracies.nanmean()))
        loss = losses.mean()
        return (loss, {"losses": losses, "accuracies": accuracies}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Return (no batch loss, [G, 2] loss and accuracy of each ranking, placeholders for labels).

        The library would weight the loss of a smaller last batch like the others.
        """
        with torch.no_grad():
            losses, accuracies = self._judge(model, self._prepare_inputs(inputs))
        figures = torch.stack([losses, accuracies.to(losses)], dim=1)
        return None, figures, figures[:, 0]

    def _judge(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the pair accuracy of each ranking, [G] each; NaN is the accuracy of only ties."""
        plain = self.accelerator.unwrap_model(model)
        scores = raw_scores(plain, inputs["input_ids"], inputs["lengths"], precision=self.accelerator.autocast())
        sizes = inputs["sizes"].tolist()
        groups = torch.split(scores, sizes), torch.split(inputs["levels"], sizes), inputs["margins"]
        parts = list(zip(*groups, strict=True))
        losses = torch.stack([self._loss(group, levels, margin) for group, levels, margin in parts])
        return losses, torch.tensor([_accuracy(group.detach(), levels) for group, levels, _ in parts])

    def _loss(self, scores: Tensor, levels: Tensor, margin: Tensor) -> Tensor:
        """Return the loss of one ranking."""
        if self._objective == "regression":
            return nn.functional.mse_loss(scores, levels.to(scores.dtype))
        return ranking_loss(scores, -levels, margin=margin)


def _accuracy(scores: Tensor, levels: Tensor) -> float:
    values = scores.double().cpu().numpy()
    leads = pairs_of([Judged(values, levels.double().cpu().numpy(), np.zeros(len(values)))]).leads
    return win_share(leads) if len(leads) else float("nan")
