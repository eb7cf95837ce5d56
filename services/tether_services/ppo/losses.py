"""The clipped losses of PPO per token, their reduction, and the figures that watch the update.

The losses are per token so that a caller can weight them and split a step into micro-batches; `token_mean` reduces
them:

    losses = clipped_policy_loss(new, old, advantages, clip_range=0.2) * tis_weights(old, mu, cap=2.0)
    token_mean(losses, mask, num_tokens=tokens_of_the_whole_optimiser_step).backward()
"""

from __future__ import annotations

import torch
from torch import Tensor

from tether_services.ppo.statistics import at_least_float32, masked_mean

__all__ = [
    "approx_kl",
    "clip_fraction",
    "clipped_policy_loss",
    "clipped_value_loss",
    "policy_ratio",
    "tis_weights",
    "token_mean",
]

_MAX_LOG_RATIO = 20.0
"""Clamp of new - old before the exponential: exp(20) is far outside any trust region and still finite in float32."""


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return exp(clamp(new - old, -20, 20)), element by element.

    Source: D21.
    """
    difference = at_least_float32(logprobs) - at_least_float32(old_logprobs.detach())
    return difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """Return the loss per token, to be minimised: max(-A * ratio, -A * clip(ratio, 1 - eps, 1 + eps)).

    Args:
        logprobs: Of the policy now; the gradient flows through these.
        old_logprobs: Of the policy that generated, recomputed by the trainer.
        advantages: Fixed for all epochs.
        clip_range: eps, in (0, 1).

    Source: D21; Schulman et al. 2017, arXiv:1707.06347, equation 7.
    """
    ratio = policy_ratio(logprobs, old_logprobs)
    weight = -at_least_float32(advantages.detach())
    return torch.maximum(weight * ratio, weight * ratio.clamp(1.0 - clip_range, 1.0 + clip_range))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip_range: float) -> Tensor:
    """Return the loss per token: max((V - R)^2, (V_clip - R)^2) / 2 with V_clip = clamp(V, V_old +- value_clip_range).

    Args:
        values: Of the critic now; the gradient flows through these.
        old_values: Of the critic at rollout time.
        returns: Targets, fixed for all epochs.
        value_clip_range: Above 0, in units of the return.

    Source: D23.
    """
    values, old_values = at_least_float32(values), at_least_float32(old_values.detach())
    targets = at_least_float32(returns.detach())
    clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    return 0.5 * torch.maximum((values - targets) ** 2, (clipped - targets) ** 2)


def tis_weights(old_logprobs: Tensor, logprobs: Tensor, *, cap: float) -> Tensor:
    """Return the truncated importance weights min(exp(old - mu), cap) per token, without gradient.

    They correct the policy loss, and nothing else, for tokens that were drawn from the generator's distribution (mu)
    and not exactly from the trainer's (old).

    Args:
        old_logprobs: Recomputed by the trainer before the first update.
        logprobs: mu, as the generator returned them.
        cap: Largest weight, at least 1.

    Source: section 8 of the PPO reference, token TIS.
    """
    return policy_ratio(old_logprobs.detach(), logprobs).clamp(max=cap)


def token_mean(losses: Tensor, mask: Tensor | None = None, *, num_tokens: int) -> Tensor:
    """Return the sum of `losses` over the mask divided by `num_tokens`.

    With `num_tokens` the response tokens of the whole optimiser step, over all its micro-batches, the gradients of the
    micro-batches add up to that of one large batch, and every token weighs the same however the rows were split.

    Raises:
        ValueError: `num_tokens` is below 1.

    Source: D21.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    losses = at_least_float32(losses)
    kept = losses if mask is None else torch.where(mask, losses, 0.0)
    return kept.sum() / num_tokens


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None = None) -> float:
    """Return mean((new - old)^2) / 2 over the mask, in nats: how far the update has moved the policy.

    Source: D25.
    """
    difference = at_least_float32(logprobs.detach()) - at_least_float32(old_logprobs.detach())
    return float(0.5 * masked_mean(difference**2, mask))


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None = None, *, clip_range: float) -> float:
    """Return the share of tokens whose ratio is outside [1 - clip_range, 1 + clip_range], 0 to 1."""
    outside = (policy_ratio(logprobs.detach(), old_logprobs) - 1.0).abs() > clip_range
    return float(masked_mean(outside.float(), mask))
