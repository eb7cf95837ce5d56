"""Which samples go into which optimiser step, and what their losses are divided by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from tether.errors import InvalidArgumentError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer.batch import (
    MicroBatch,
    RolloutBatch,
    Sample,
    build_micro_batches,
    value_samples,
)
from tether_services.orchestrator.trainer.experience import Layout

__all__ = ["loss_denominator", "plan_epoch", "plan_pretraining"]


def plan_epoch(batch: RolloutBatch, order: Tensor, config: PpoConfig, *, max_tokens: int) -> list[Layout]:
    """Return one pass over the samples: one layout per minibatch.

    Args:
        batch: The samples.
        order: [S] their random order, which is cut into minibatches.
        config: Says how many minibatches, and what a critic reads.
        max_tokens: Padded tokens of a micro-batch at most.

    Raises:
        InvalidArgumentError: There are fewer samples than minibatches.
    """
    if len(batch.samples) < config.minibatches:
        message = f"{len(batch.samples)} samples cannot make {config.minibatches} minibatches"
        raise InvalidArgumentError(message, field="ppo.minibatches")
    read_by_critic = value_samples(batch, config.score_placement)
    layouts = []
    for part in order.tensor_split(config.minibatches):
        rows = part.tolist()
        policy = build_micro_batches(batch.samples, rows, max_tokens=max_tokens)
        critic: Sequence[MicroBatch] = ()
        if config.has_critic:
            same = read_by_critic is batch.samples
            critic = policy if same else build_micro_batches(read_by_critic, rows, max_tokens=max_tokens)
        layouts.append(Layout(policy, critic))
    return layouts


def loss_denominator(layout: Layout, config: PpoConfig, *, response_limit: int) -> float:
    """Return what the losses of an optimiser step are divided by, over all its micro-batches.

    Its response tokens for `token_mean`, its responses for `sequence_mean`; for `token_sum` the tokens that its
    responses could have had, a constant that no response's length enters.

    Source: D21, D37.
    """
    num_rows = sum(len(micro.mask) for micro in layout.policy)
    if config.aggregation == "sequence_mean":
        return num_rows
    if config.aggregation == "token_sum":
        return num_rows * response_limit
    return sum(micro.tokens.numel() for micro in layout.policy)


def plan_pretraining(rows: Sequence[Sequence[int]], *, num_steps: int, max_tokens: int) -> list[Sequence[MicroBatch]]:
    """Return the pretraining text of each optimiser step, the rows spread evenly in their order.

    Args:
        rows: Token ids; every token but the first of a row is learned.
        num_steps: Optimiser steps of the update.
        max_tokens: Padded tokens of a micro-batch at most.

    Raises:
        InvalidArgumentError: There are fewer rows than steps, or a row has fewer than two tokens.
    """
    if len(rows) < num_steps or min(map(len, rows)) < 2:
        message = f"{num_steps} optimiser steps need as many rows of pretraining text, each of at least two tokens"
        raise InvalidArgumentError(message, field="pretraining")
    samples = [Sample(row[:1], row[1:]) for row in rows]
    bounds = [len(rows) * k // num_steps for k in range(num_steps + 1)]
    return [
        build_micro_batches(samples[start:end], range(end - start), max_tokens=max_tokens)
        for start, end in pairwise(bounds)
    ]
