"""Token rewards: the KL penalty on every response token and the score on the last one."""

from __future__ import annotations

import torch
from torch import Tensor

from tether_services.ppo.kl import k1
from tether_services.ppo.statistics import at_least_float32

__all__ = ["shape_rewards"]


def shape_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Return the [B, T] token rewards: -kl_coef * k1 on response tokens, plus the score on the last one, 0 elsewhere.

    No gradient flows through the result.

    Args:
        scores: [B], one score per response.
        logprobs: [B, T], the policy's, recomputed by the trainer (not the generator's).
        ref_logprobs: [B, T], the reference's for the same tokens at the same temperature.
        mask: [B, T] bool, True on response tokens.
        kl_coef: Weight of the KL, at least 0.

    Raises:
        ValueError: A row of the mask keeps nothing, so its score has no place.

    Source: D9 (score on the last response token) and D10 (k1, unclamped).
    """
    if not bool(mask.any(dim=1).all()):
        raise ValueError("every row needs at least one response token to carry its score")
    penalty = -kl_coef * k1(logprobs.detach(), ref_logprobs.detach())
    rewards = torch.where(mask, penalty, 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).max(dim=1).values
    rewards[torch.arange(mask.shape[0], device=mask.device), last] += at_least_float32(scores.detach())
    return rewards
