"""Sampling from logits for rows that each have their own parameters, in whole-tensor operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether_services.generator.engine import Sampling


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The sampling parameters of B rows."""

    temperature: Tensor
    """[B] float32; 1 where greedy."""
    greedy: Tensor
    """[B] bool."""
    top_p: Tensor
    """[B] float32; 1 where off or greedy."""
    top_k: Tensor
    """[B] int64; vocab_size where off or greedy."""
    filtered: bool
    """Whether any row has top_p or top_k on."""

    def select(self, index: Tensor) -> SamplingRows:
        """Return the rows at [b] indices."""
        return SamplingRows(
            self.temperature[index], self.greedy[index], self.top_p[index], self.top_k[index], self.filtered
        )


def stack_sampling(samplings: Sequence[Sampling], *, vocab_size: int, device: torch.device) -> SamplingRows:
    """Return the parameters of many requests as tensors. Filters do nothing to greedy rows, so they are off there."""
    greedy = torch.tensor([s.temperature == 0 for s in samplings])
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float32).masked_fill(greedy, 1.0)
    top_k = torch.tensor([s.top_k or vocab_size for s in samplings]).masked_fill(greedy, vocab_size)
    temperature = torch.tensor([s.temperature or 1.0 for s in samplings], dtype=torch.float32)
    filtered = bool((top_p < 1).any() or (top_k < vocab_size).any())
    return SamplingRows(temperature.to(device), greedy.to(device), top_p.to(device), top_k.to(device), filtered)


def sample_tokens(logits: Tensor, rows: SamplingRows, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return one sampled token per row and its log-probability.

    A token is found by inverting the cumulative distribution at the row's uniform number, so a row's tokens depend on
    its own logits and numbers only, not on its neighbours.

    Args:
        logits: [B, V], any float type; computed on in float32.
        rows: The parameters.
        uniforms: [B] float64 in [0, 1).

    Returns:
        ([B] int64, [B] float32): the log-probabilities are those of the distribution sampled from: temperature and
        filters applied and renormalised; for greedy rows those of temperature 1.
    """
    scaled = logits.float() / rows.temperature[:, None]
    if rows.filtered:
        scaled = filter_logits(scaled, top_p=rows.top_p, top_k=rows.top_k)
    logprobs = torch.log_softmax(scaled, dim=-1)
    cumulative = logprobs.exp().double().cumsum(dim=-1)
    # Scaled by the total, which rounding leaves a little off 1: the draw must fall inside.
    target = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    tokens = torch.where(rows.greedy, scaled.argmax(dim=-1), drawn)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def filter_logits(logits: Tensor, *, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Return logits with everything outside top_k, then outside the nucleus of what is left, at minus infinity.

    Tokens as likely as the top_k-th all stay, as in vLLM. The nucleus is the smallest set of most likely tokens whose
    mass is at least top_p; it always has one token.

    Args:
        logits: [B, V] float32.
        top_p: [B] in (0, 1].
        top_k: [B] in [1, V].
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)[None, :]
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, top_k[:, None] - 1), -torch.inf)
    mass = torch.softmax(ordered.double(), dim=-1)
    mass_before = mass.cumsum(dim=-1) - mass
    outside = (mass_before >= top_p[:, None].double()) & (top_p < 1)[:, None]
    ordered = ordered.masked_fill(outside & (rank > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def draw_uniforms(seeds: Sequence[int], *, length: int) -> Tensor:
    """Return [B, length] float64 numbers in [0, 1), row i from its own generator seeded with seeds[i]."""
    drawn = torch.empty(len(seeds), length, dtype=torch.float64)
    for row, seed in enumerate(seeds):
        torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), out=drawn[row])
    return drawn
