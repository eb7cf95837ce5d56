"""Log-probabilities of given tokens from hidden states, in chunks, so that a [B, T, V] tensor never exists."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tether_services.ppo.losses import entropy
from tether_services.ppo.statistics import at_least_float32

__all__ = ["token_logprobs", "token_logprobs_and_entropies"]

Head = Callable[[Tensor], Tensor]
"""The output layer: [n, h] hidden states to [n, V] logits."""

MAX_LOGITS = 2**22
"""Logits held at a time, 16 MiB in float32: enough to keep the matrix product busy, small enough to stay bounded."""


def token_logprobs(hidden: Tensor, token_ids: Tensor, *, head: Head, vocab_size: int, temperature: float) -> Tensor:
    """Return the [n] log-probabilities of `token_ids` under softmax(head(hidden) / temperature), in float32 or wider.

    Where gradients are needed the logits of a chunk are dropped after use and computed again in the backward pass, so
    memory stays bounded there too.

    Args:
        hidden: [n, h] states that emit the tokens: the state of the token before each.
        token_ids: [n] integers in [0, vocab_size).
        head: The output layer of the model.
        vocab_size: V, sets the rows per chunk.
        temperature: Divides the logits, above 0.

    Source: D1, D2.
    """
    chunks = _chunks(hidden, token_ids, vocab_size)
    return torch.cat([_run(_logprobs, head, states, targets, temperature) for states, targets in chunks])


def token_logprobs_and_entropies(
    hidden: Tensor, token_ids: Tensor, *, head: Head, vocab_size: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return [n] log-probabilities as `token_logprobs` and the [n] entropies in nats of the same distributions."""
    chunks = _chunks(hidden, token_ids, vocab_size)
    pairs = [_run(_logprobs_and_entropies, head, states, targets, temperature) for states, targets in chunks]
    logprobs, entropies = torch.cat(pairs, dim=1)
    return logprobs, entropies


def _run(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Return the result of a chunk; where gradients are needed, without keeping what was computed on the way."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def _chunks(hidden: Tensor, token_ids: Tensor, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    if len(hidden) != len(token_ids) or not len(token_ids):
        raise ValueError(f"hidden and token_ids must have the same length, at least 1: {len(hidden)}, {len(token_ids)}")
    rows = max(1, MAX_LOGITS // vocab_size)
    return list(zip(torch.split(hidden, rows), torch.split(token_ids, rows), strict=True))


def _scaled_logits(head: Head, states: Tensor, temperature: float) -> Tensor:
    return at_least_float32(head(states)) / temperature


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _logprobs(head: Head, states: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return _pick(_scaled_logits(head, states, temperature), targets)


def _logprobs_and_entropies(head: Head, states: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return [2, n]."""
    logits = _scaled_logits(head, states, temperature)
    return torch.stack((_pick(logits, targets), entropy(logits)))
