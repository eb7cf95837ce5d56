"""Generalised advantage estimation and the returns the critic learns."""

from __future__ import annotations

import torch
from torch import Tensor

from tether_services.ppo.statistics import at_least_float32

__all__ = ["compute_returns", "estimate_advantages"]


def estimate_advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Return the [B, T] generalised advantage estimates, zero outside the mask and without gradient.

    A_t = delta_t + gamma * lam * A_(t+1) with delta_t = r_t + gamma * V_(t+1) - V_t; past the last response token
    V and A are 0, for a stop token and at the maximum length alike. Masked entries between response tokens are skipped:
    the next value and the running advantage are carried across them.

    Args:
        rewards: [B, T], token rewards.
        values: [B, T], V_t is the value of the state before token t is emitted.
        mask: [B, T] bool, True on response tokens.
        gamma: Discount, 0 to 1.
        lam: Decay of the estimator, 0 (one step) to 1 (Monte Carlo).

    Source: D16 to D18; Schulman et al. 2016, arXiv:1506.02438, equation 16.
    """
    rewards, values = at_least_float32(rewards.detach()), at_least_float32(values.detach())
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        keep = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(keep, delta + gamma * lam * running, running)
        next_value = torch.where(keep, values[:, t], next_value)
        advantages[:, t] = torch.where(keep, running, 0.0)
    return advantages


def compute_returns(advantages: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return advantages + values on the mask and 0 outside: the critic's targets. Pass the advantages before whitening.

    Source: D16.
    """
    return torch.where(mask, at_least_float32(advantages.detach()) + at_least_float32(values.detach()), 0.0)
