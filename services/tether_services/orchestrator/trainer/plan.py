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
    """Return one pass over the samples: one layout per minibatch, and never more of them than samples.

    Args:
        batch: The samples.
        order: [S] their random order, which is cut into minibatches.
        config: Says how many minibatches, and what a critic reads.
        max_tokens: Padded tokens of a micro-batch at most.
    """
    read_by_critic = value_samples(batch, config.score_placement)
    layouts = []
    for part in order.tensor_split(min(config.minibatches, len(order))):
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


def plan_pretraining(rows: Sequence[Sample], *, num_steps: int, max_tokens: int) -> list[Sequence[MicroBatch]]:
    """Return the pretraining text of each optimiser step, the rows spread evenly in their order.

    Args:
        rows: Their responses are learned, which is every token but the first of a text.
        num_steps: Optimiser steps of the update.
        max_tokens: Padded tokens of a micro-batch at most.

    Raises:
        InvalidArgumentError: There are fewer rows than steps.
    """
    if len(rows) < num_steps:
        message = f"{num_steps} optimiser steps need as many rows of pretraining text, there are {len(rows)}"
        raise InvalidArgumentError(message, field="pretraining")
    bounds = [len(rows) * k // num_steps for k in range(num_steps + 1)]
    return [
        build_micro_batches(rows[start:end], range(end - start), max_tokens=max_tokens)
        for start, end in pairwise(bounds)
    ]
