"""Reproducible [B, T] inputs for the tests of the pure mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from tether_services.ppo.statistics import response_mask

LENGTHS = [8, 3, 1, 5, 8, 2]
WIDTH = 8
MASK = response_mask(torch.tensor(LENGTHS), width=WIDTH)
"""[6, 8]: full rows, a row of one token and rows between."""


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers, [6, 8] unless a shape is given; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or MASK.shape), generator=generator, dtype=torch.float64).to(dtype)


def logprob_rows(seed: int) -> Tensor:
    """Return [6, 8] float64 log-probabilities between -3 and 0."""
    return -3.0 * torch.rand(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(x: Tensor, mask: Tensor = MASK) -> list[float]:
    """Return the entries of `x` on the mask as numbers, row by row."""
    return [float(v) for v, keep in zip(x.flatten(), mask.flatten(), strict=True) if keep]
