"""Masks, masked moments and the monitoring figures of a PPO step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "entropy",
    "explained_variance",
    "masked_mean",
    "masked_var",
    "mismatch",
    "response_mask",
    "whiten",
]

_VARIANCE_FLOOR = 1e-8
"""Added to the variance before the square root, so that a constant input whitens to 0 and not to NaN."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged where it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def response_mask(lengths: Tensor, *, width: int) -> Tensor:
    """Return the [B, width] mask that is True on the first `lengths[i]` columns of row i.

    Args:
        lengths: [B] integers, number of response tokens of each row, 1 to `width`.
        width: Number of columns.

    Raises:
        ValueError: A length is below 1 or above `width`; an empty response has no token that could carry its score.
    """
    if bool((lengths < 1).any()) or bool((lengths > width).any()):
        raise ValueError(f"every length must be in [1, {width}], got {lengths.tolist()}")
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the entries under the mask as a flat tensor, at least float32."""
    kept = at_least_float32(x if mask is None else x[mask]).flatten()
    if kept.numel() == 0:
        raise ValueError("the mask keeps no entry; a mean over nothing is undefined")
    return kept


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the scalar mean of `x` over the mask.

    Raises:
        ValueError: The mask keeps nothing.
    """
    return _kept(x, mask).mean()


def masked_var(x: Tensor, mask: Tensor | None = None, *, unbiased: bool = False) -> Tensor:
    """Return the scalar variance of `x` over the mask, divided by n (or by n - 1 when `unbiased`).

    Raises:
        ValueError: The mask keeps nothing, or `unbiased` is asked of a single entry.
    """
    kept = _kept(x, mask)
    if unbiased and kept.numel() == 1:
        raise ValueError("the unbiased variance of one entry is undefined; use unbiased=False")
    return kept.var(unbiased=unbiased)


def whiten(x: Tensor, mask: Tensor | None = None, *, unbiased: bool = False) -> Tensor:
    """Return `x` shifted to mean 0 and scaled to variance 1 over the mask, and 0 outside it.

    (x - mean) * rsqrt(var + 1e-8). The statistics are those of all entries passed in: pass the whole rollout batch,
    never a micro-batch. Tether uses the biased variance; the unbiased one exists for comparison with other projects.

    Source: D19; openai/lm-human-preferences `whiten`.
    """
    values = at_least_float32(x)
    mean, var = masked_mean(values, mask), masked_var(values, mask, unbiased=unbiased)
    whitened = (values - mean) * torch.rsqrt(var + _VARIANCE_FLOOR)
    return whitened if mask is None else torch.where(mask, whitened, 0.0)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits) over the last dimension.

    Args:
        logits: [..., V], already divided by the temperature.
    """
    log_probabilities = torch.log_softmax(at_least_float32(logits), dim=-1)
    # xlogy-like guard: a probability of 0 contributes 0, although its logarithm is -inf.
    terms = torch.where(log_probabilities.isneginf(), 0.0, log_probabilities.exp() * log_probabilities)
    return -terms.sum(dim=-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over the mask.

    1 is a perfect critic, 0 one that always predicts the mean, below 0 a worse one.

    NaN where the returns are all equal, because then there is nothing to explain.
    """
    residual = masked_var(at_least_float32(returns) - at_least_float32(values), mask)
    total = masked_var(returns, mask)
    return float("nan") if float(total) == 0.0 else float(1.0 - residual / total)


def mismatch(old_logprobs: Tensor, logprobs: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """Return how far the generator's distribution is from the trainer's, over response tokens.

    With delta = old - mu: `mean_abs_dlogp` mean |delta|, `mult_prob_error` mean exp(|delta|), `gen_kl` the k3 estimate
    of KL(generator || trainer), mean(exp(delta) - 1 - delta), all but the second in nats.

    Args:
        old_logprobs: Recomputed by the trainer before the first update.
        logprobs: mu, as the generator returned them.
        mask: True on response tokens.

    Source: section 8 of the PPO reference; NVIDIA-NeMo/RL for the second.
    """
    delta = _kept(at_least_float32(old_logprobs) - at_least_float32(logprobs), mask)
    return {
        "mean_abs_dlogp": float(delta.abs().mean()),
        "mult_prob_error": float(delta.abs().exp().mean()),
        "gen_kl": float((delta.exp() - 1.0 - delta).mean()),
    }
