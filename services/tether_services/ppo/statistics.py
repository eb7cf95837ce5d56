"""Masks and masked moments, and how well a critic explains its returns."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "check_same_shape",
    "explained_variance",
    "last_kept",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "response_mask",
]

_VARIANCE_FLOOR = 1e-8
"""Added to the variance before the square root, so that a constant input whitens to 0 and not to NaN."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged where it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes, which would be spread over each other silently.

    Raises:
        ValueError: Names the first that differs from the first of all.
    """
    names = list(tensors)
    expected = tensors[names[0]].shape
    for name in names[1:]:
        if tensors[name].shape != expected:
            shape = list(tensors[name].shape)
            raise ValueError(f"{name} has the shape {shape}, {names[0]} has {list(expected)}; they must be the same")


def response_mask(lengths: Tensor, *, width: int) -> Tensor:
    """Return the [B, width] mask that is True on the first `lengths[i]` columns of row i.

    Args:
        lengths: [B] integers, number of response tokens of each row, 1 to `width`.
        width: Number of columns.

    Raises:
        ValueError: A length is below 1 or above `width`; an empty response has no token that could carry its score.

    Source: D6.
    """
    if bool((lengths < 1).any()) or bool((lengths > width).any()):
        raise ValueError(f"every length must be in [1, {width}], got {lengths.tolist()}")
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def last_kept(mask: Tensor) -> Tensor:
    """Return the [B] column of the last kept entry of each row of a [B, T] mask.

    Raises:
        ValueError: A row keeps nothing.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), columns, -1).max(dim=1).values
    if bool((last < 0).any()):
        raise ValueError("every row needs at least one response token to carry its score")
    return last


def masked_mean(x: Tensor, mask: Tensor | None = None, *, dim: int | None = None) -> Tensor:
    """Return the mean of `x` over the mask: of all its entries, or along `dim`.

    Raises:
        ValueError: The mask keeps nothing, in all or in a row along `dim`.
    """
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool().expand_as(x)
    count = kept.sum() if dim is None else kept.sum(dim=dim)
    if bool((count == 0).any()):
        raise ValueError("the mask keeps no entry; a mean over nothing is undefined")
    masked = torch.where(kept, at_least_float32(x), 0.0)
    return (masked.sum() if dim is None else masked.sum(dim=dim)) / count


def _zero_outside(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return `x` with 0 outside the mask, so that nothing that stands there gets into a gradient."""
    return at_least_float32(x) if mask is None else torch.where(mask.bool(), at_least_float32(x), 0.0)


def masked_var(x: Tensor, mask: Tensor | None = None, *, unbiased: bool = False) -> Tensor:
    """Return the scalar variance of `x` over the mask, divided by n, or by n - 1 when `unbiased`.

    Raises:
        ValueError: The mask keeps nothing, or `unbiased` is asked of a single entry.
    """
    count = x.numel() if mask is None else int(mask.expand_as(x).sum())
    if unbiased and count == 1:
        raise ValueError("the unbiased variance of one entry is undefined; use unbiased=False")
    variance = masked_mean((_zero_outside(x, mask) - masked_mean(x, mask)) ** 2, mask)
    return variance * count / (count - 1) if unbiased else variance


def masked_whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """Return `x` scaled to variance 1 over the mask and shifted to mean 0, and 0 outside the mask.

    (x - mean) * rsqrt(var + 1e-8), plus the mean again where `shift_mean` is false. The statistics are those of all
    entries passed in: pass the whole rollout batch, never a micro-batch.

    Args:
        x: Any shape.
        mask: Same shape; None keeps every entry.
        shift_mean: False puts the mean back, as rewards are whitened (D15).
        unbiased: Divide the variance by n - 1. Tether does not (D19); some projects do.

    Source: D15, D19; openai/lm-human-preferences `whiten`.
    """
    values, mean = _zero_outside(x, mask), masked_mean(x, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(x, mask, unbiased=unbiased) + _VARIANCE_FLOOR)
    if not shift_mean:
        whitened = whitened + mean
    return whitened if mask is None else torch.where(mask.bool(), whitened, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over the mask.

    1 is a perfect critic, 0 one that always predicts the mean, below 0 a worse one.

    NaN where the returns are all equal, because then there is nothing to explain.
    """
    residual = masked_var(at_least_float32(returns) - at_least_float32(values), mask)
    total = masked_var(returns, mask)
    return float("nan") if float(total) == 0.0 else float(1.0 - residual / total)
