"""The ranking loss of a reward model: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ranked_group_loss(scores: Tensor, levels: Tensor) -> tuple[Tensor, int]:
    """Return the K-wise Bradley-Terry loss of ranked groups, and how many groups were counted.

    Of one group: the mean of -log sigmoid(s_i - s_j) over all pairs with level_i > level_j; then the mean over groups.
    Ties give no pair; a group of only ties is skipped. Computed in float32 at least. Scores (2, 1, 0) in ranked order
    give 0.2511505.

    Args:
        scores: [G, K] scores of K answers in each of G groups.
        levels: [G, K] preference levels, higher is better; equal levels are a tie.

    Returns:
        The loss, 0 with a gradient of 0 where no group has a pair, and the number of groups that have one.

    Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    preferred = levels.unsqueeze(2) > levels.unsqueeze(1)  # [G, K, K], true where row i is better than column j
    differences = scores.unsqueeze(2) - scores.unsqueeze(1)
    pair_losses = -functional.logsigmoid(differences) * preferred
    pair_counts = preferred.sum(dim=(1, 2))
    group_losses = pair_losses.sum(dim=(1, 2)) / pair_counts.clamp(min=1)
    counted = int((pair_counts > 0).sum())
    return group_losses.sum() / max(counted, 1), counted


def pair_accuracy(scores: Tensor, levels: Tensor) -> float:
    """Return the share of non-tied pairs whose better answer has the higher score; equal scores count half.

    Args:
        scores: [N] scores of one pool of answers.
        levels: [N] preference levels.

    Raises:
        ValueError: All levels are equal, so there is no pair.
    """
    preferred = levels.unsqueeze(1) > levels.unsqueeze(0)
    pair_count = int(preferred.sum())
    if pair_count == 0:
        raise ValueError("pair_accuracy needs two different levels")
    differences = scores.unsqueeze(1) - scores.unsqueeze(0)
    won = (differences > 0).double() + 0.5 * (differences == 0).double()
    return float((won * preferred).sum() / pair_count)
