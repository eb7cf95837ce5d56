"""Forward passes over micro-batches: log-probabilities and values of response tokens, never a [B, T, V] tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tether_services.orchestrator.progress import note_work
from tether_services.orchestrator.trainer.batch import MicroBatch
from tether_services.orchestrator.trainer.model import SharedModel
from tether_services.ppo.logprobs import token_logprobs, token_logprobs_and_entropies

__all__ = ["gather_flat", "response_logprobs", "response_logprobs_and_entropies", "response_values"]


def _response_states(model: SharedModel, micro: MicroBatch) -> Tensor:
    """Return the [n, h] hidden states that emit the response tokens."""
    hidden = model.hidden_states(micro.token_ids.to(model.device))
    note_work()
    return hidden.flatten(0, 1)[micro.states.to(model.device)]


def response_logprobs(model: SharedModel, micro: MicroBatch, *, temperature: float) -> Tensor:
    """Return the [n] float32 log-probabilities of the response tokens under softmax(logits / temperature).

    Source: D1, D2.
    """
    return token_logprobs(
        _response_states(model, micro),
        micro.targets.to(model.device),
        head=model.logits,
        vocab_size=model.vocab_size,
        temperature=temperature,
    )


def response_logprobs_and_entropies(model: SharedModel, micro: MicroBatch, *, temperature: float) -> Tensor:
    """Return [2, n]: the same log-probabilities bit for bit, and the entropies in nats of the same distributions."""
    pair = token_logprobs_and_entropies(
        _response_states(model, micro),
        micro.targets.to(model.device),
        head=model.logits,
        vocab_size=model.vocab_size,
        temperature=temperature,
    )
    return torch.stack(pair)


def response_values(model: SharedModel, micro: MicroBatch) -> Tensor:
    """Return the [n] float32 values of the states before each response token is emitted.

    Source: D2.
    """
    return model.values(_response_states(model, micro))


def gather_flat(
    micro_batches: Sequence[MicroBatch], forward: Callable[[MicroBatch], Tensor], *, num_tokens: int
) -> Tensor:
    """Return the results of `forward` in rollout order, on the CPU and without gradient.

    Args:
        micro_batches: Together they hold every response token of the rollout once.
        forward: Gives a [..., n] tensor for a micro-batch of n response tokens.
        num_tokens: N of the rollout, the last dimension of the result.
    """
    with torch.no_grad():
        parts = [forward(micro).cpu() for micro in micro_batches]
    flat = parts[0].new_zeros(*parts[0].shape[:-1], num_tokens)
    for micro, part in zip(micro_batches, parts, strict=True):
        flat[..., micro.tokens] = part
    return flat
