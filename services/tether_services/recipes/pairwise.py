"""The ranking loss of a reward model: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tether_services.ppo.losses import ranking_loss


def ranked_group_loss(scores: Tensor, levels: Tensor) -> tuple[Tensor, int]:
    """Return the K-wise Bradley-Terry loss of ranked groups, and how many groups were counted.

    The mean over groups of `tether_services.ppo.losses.ranking_loss`; a group of only ties is skipped.

    Args:
        scores: [G, K] scores of K answers in each of G groups.
        levels: [G, K] preference levels, higher is better; equal levels are a tie.

    Returns:
        The loss, 0 with a gradient of 0 where no group has a pair, and the number of groups that have one.

    Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1.
    """
    tied = (levels == levels[:, :1]).all(dim=1)
    losses = [ranking_loss(group, -ranks) for group, ranks in zip(scores[~tied], levels[~tied], strict=True)]
    return (torch.stack(losses).mean() if losses else scores.sum() * 0.0), len(losses)


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
