"""Advantages: generalised advantage estimation with a critic, and group baselines without one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tether_services.ppo.statistics import at_least_float32, check_same_shape

__all__ = ["GroupKind", "compute_returns", "estimate_advantages", "group_advantages"]

GroupKind = Literal["grpo", "dr_grpo", "rloo", "reinforce_baseline"]
_STD_FLOOR = 1e-6
"""Added to the standard deviation of a group (D37)."""


def estimate_advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Return the [B, T] generalised advantage estimates, zero outside the mask and without gradient.

    A_t = delta_t + gamma * lam * A_(t+1) with delta_t = r_t + gamma * V_(t+1) - V_t; past the last response token
    V and A are 0, for a stop token and at the maximum length alike. Masked entries between response tokens are skipped:
    the next value and the running advantage are carried across them.

    Args:
        rewards: [B, T], token rewards.
        values: [B, T], V_t is the value of the state before token t is emitted.
        mask: [B, T], True on response tokens.
        gamma: Discount, 0 to 1.
        lam: Decay of the estimator, 0 (one step) to 1 (Monte Carlo).

    Source: D16 to D18, D20; Schulman et al. 2016, arXiv:1506.02438, equation 16.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    rewards, values, kept = at_least_float32(rewards.detach()), at_least_float32(values.detach()), mask.bool()
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        keep = kept[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(keep, delta + gamma * lam * running, running)
        next_value = torch.where(keep, values[:, t], next_value)
        advantages[:, t] = torch.where(keep, running, 0.0)
    return advantages


def compute_returns(advantages: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return advantages + values on the mask and 0 outside: the critic's targets. Pass the advantages before whitening.

    Source: D16.
    """
    check_same_shape(advantages=advantages, values=values, mask=mask)
    returns = at_least_float32(advantages.detach()) + at_least_float32(values.detach())
    return torch.where(mask.bool(), returns, 0.0)


def group_advantages(scores: Tensor, group_ids: Tensor, *, kind: GroupKind, mask: Tensor | None = None) -> Tensor:
    """Return the [B] advantage of each response over the others to the same prompt, without gradient.

    `grpo`: (r - mean) / (std + 1e-6), unbiased std over the group. `dr_grpo` and `reinforce_baseline`: r - mean; they
    differ in what follows (a constant denominator of the loss; whitening over the whole batch). `rloo`: r minus the
    mean of the others.

    Args:
        scores: [B], or rewards with the KL in them.
        group_ids: [B] integers, equal for responses to the same prompt, in any order.
        kind: Which baseline.
        mask: [B], False leaves a response out of every sum and count; its advantage is 0.

    Raises:
        ValueError: `rloo` has a group of one, which has no others (with the other kinds its advantage is 0), there are
            no scores or not as many group ids, or `kind` is unknown.

    Source: D37 (arXiv:2402.03300, 2503.20783), D38 (arXiv:2402.14740); arXiv:2501.03262 for `reinforce_baseline`.
    """
    if not scores.numel() or scores.shape != group_ids.shape:
        raise ValueError(f"scores and group_ids must have the same length, at least 1: {len(scores)}, {len(group_ids)}")
    rewards = at_least_float32(scores.detach())
    kept = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    groups = torch.unique(group_ids, return_inverse=True)[1]
    count = _group_sums(kept.to(rewards.dtype), groups)
    # Measured from the best of the group first: equal rewards must give exactly 0, which the 1e-6 below would magnify.
    rewards = torch.where(kept, rewards - _group_max(torch.where(kept, rewards, -torch.inf), groups), 0.0)
    centred = torch.where(kept, rewards - _group_sums(rewards, groups) / count.clamp(min=1), 0.0)
    if kind in ("dr_grpo", "reinforce_baseline"):
        return centred
    if kind == "grpo":
        variance = _group_sums(centred**2, groups) / (count - 1).clamp(min=1)
        return centred / (variance.sqrt() + _STD_FLOOR)
    if kind == "rloo":
        if bool((count[kept] < 2).any()):
            raise ValueError("rloo needs at least two responses per prompt: one has no others to be compared with")
        return centred * count / (count - 1).clamp(min=1)
    raise ValueError(f"kind must be grpo, dr_grpo, rloo or reinforce_baseline, got {kind!r}")


def _group_sums(x: Tensor, groups: Tensor) -> Tensor:
    """Return for each entry the sum of `x` over its group, [B]."""
    return x.new_zeros(int(groups.max()) + 1).index_add(0, groups, x)[groups]


def _group_max(x: Tensor, groups: Tensor) -> Tensor:
    """Return for each entry the largest `x` of its group, [B]."""
    return torch.full_like(x, -torch.inf).scatter_reduce(0, groups, x, "amax")[groups]
