"""The generator's distribution against the trainer's: weights that correct for it and figures that watch it.

The generator drew the tokens from mu; the trainer, with other kernels or another precision, gives the same tokens the
log-probabilities old. delta = old - mu per response token.

Source: section 8 of the PPO reference.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tether_services.ppo.statistics import at_least_float32, check_same_shape, masked_mean

__all__ = ["WARNING_LIMITS", "SamplerCorrection", "mismatch_metrics", "sampler_weights"]

SamplerCorrection = Literal["none", "token_tis", "icepop", "token_mask", "sequence_mask_geometric"]
_MAX_LOG_RATIO = 20.0
"""Clamp before the exponential, which stays finite in float32."""
_OUTLIER_RATIOS = (1e-4, 100.0)
"""A response with a token outside is counted (novasky-ai/SkyRL drops it)."""
WARNING_LIMITS = {"mean_abs_dlogp": 0.02, "mult_prob_error": 1.02, "gen_kl": 5e-3}
"""Figures of `mismatch_metrics` above which generator and trainer are worth a look, chosen for equal precision."""


def _delta(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    check_same_shape(old_logprobs=old_logprobs, sampler_logprobs=sampler_logprobs, mask=mask)
    delta = at_least_float32(old_logprobs.detach()) - at_least_float32(sampler_logprobs.detach())
    return torch.where(mask.bool(), delta, 0.0)


def sampler_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    kind: SamplerCorrection,
    low: float | None,
    high: float | None,
) -> Tensor:
    """Return the weight of each token's policy loss, [B, T], 0 outside the mask and without gradient.

    With w = exp(old - mu): `none` is 1; `token_tis` is w truncated to [low, high]; `icepop` is w inside [low, high] and
    0 outside; `token_mask` is 1 inside and 0 outside; `sequence_mask_geometric` is 1 on all tokens of a response whose
    geometric mean of w is inside and 0 on those of the others. The weight is for the policy loss and nothing else.

    Args:
        old_logprobs: [B, T], recomputed by the trainer before the first update.
        sampler_logprobs: [B, T], mu, as the generator returned them.
        mask: [B, T], True on response tokens; any shape but for `sequence_mask_geometric`, whose rows are responses.
        kind: The correction.
        low: Smallest accepted ratio, 0 or more; None: 0.
        high: Largest accepted ratio, at least `low`; None: no bound.

    Raises:
        ValueError: `low` or `high` is outside its range, or `kind` is unknown.
    """
    low, high = 0.0 if low is None else low, math.inf if high is None else high
    if not 0.0 <= low <= high:
        raise ValueError(f"low and high must satisfy 0 <= low <= high, got {low} and {high}")
    kept, delta = mask.bool(), _delta(old_logprobs, sampler_logprobs, mask)
    ratio = delta.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    if kind == "none":
        weights = torch.ones_like(ratio)
    elif kind == "token_tis":
        weights = ratio.clamp(low, high)
    elif kind == "icepop":
        weights = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    elif kind == "token_mask":
        weights = ((ratio >= low) & (ratio <= high)).to(ratio.dtype)
    elif kind == "sequence_mask_geometric":
        mean = (delta.sum(dim=1) / kept.sum(dim=1).clamp(min=1)).exp()[:, None]
        weights = ((mean >= low) & (mean <= high)).to(ratio.dtype).expand_as(ratio)
    else:
        raise ValueError(f"unknown sampler correction {kind!r}")
    return torch.where(kept, weights, 0.0)


def mismatch_metrics(old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Return how far the generator's distribution is from the trainer's, over response tokens.

    `mean_abs_dlogp` is mean |delta|, `mult_prob_error` mean exp(|delta|), `gen_kl` the k3 estimate of
    KL(generator || trainer), mean(exp(delta) - 1 - delta), all but the second in nats; `outlier_ratio` is the share of
    responses with a token whose exp(delta) is below 1e-4 or above 100.

    Args:
        old_logprobs: [B, T], recomputed by the trainer before the first update.
        sampler_logprobs: [B, T], mu, as the generator returned them.
        mask: [B, T], True on response tokens.

    Source: NVIDIA-NeMo/RL for the second, novasky-ai/SkyRL for the bounds of the last.
    """
    delta = _delta(old_logprobs, sampler_logprobs, mask)
    low, high = _OUTLIER_RATIOS
    outlier = (delta.exp() < low) | (delta.exp() > high)
    return {
        "mean_abs_dlogp": float(masked_mean(delta.abs(), mask)),
        "mult_prob_error": float(masked_mean(delta.abs().exp(), mask)),
        "gen_kl": float(masked_mean(torch.expm1(delta) - delta, mask)),
        "outlier_ratio": float(outlier.any(dim=1).float().mean()),
    }
