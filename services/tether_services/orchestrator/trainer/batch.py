"""What the trainer is given, and how it is laid out for a forward pass.

A rollout of S samples has N response tokens in all. Everything per token is kept in flat [N] tensors, sample after
sample, so that no arithmetic is spent on padding; only the model's input is padded, on the right, by explicit lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tether.errors import InvalidArgumentError
from tether_services.ppo.rewards import Placement
from tether_services.ppo.statistics import response_mask
from tether_services.runtime.padding import padded_batches

__all__ = [
    "MicroBatch",
    "RolloutBatch",
    "Sample",
    "build_micro_batches",
    "check_samples",
    "response_lengths",
    "value_samples",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion in token ids: `Sample(prompt_token_ids=[1, 5], response_token_ids=[7, 2])`."""

    prompt_token_ids: Sequence[int]
    """At least one id; the state that emits the first response token is the last prompt token."""
    response_token_ids: Sequence[int]
    """At least one id, the stop token included where there was one."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The scored samples of one step.

    Example: one sample of two response tokens is `RolloutBatch(samples=[Sample([1, 5], [7, 2])],
    logprobs=[[-0.1, -2.0]], ref_logprobs=[[-0.2, -1.9]], scores=[0.7])`.
    """

    samples: Sequence[Sample]
    """The completions, at least one."""
    logprobs: Sequence[Sequence[float]]
    """Per sample and response token, as the generator returned them (mu), natural log at the run's temperature."""
    ref_logprobs: Sequence[Sequence[float]]
    """The same of the reference."""
    scores: Sequence[float]
    """Per sample, from the reward service."""
    groups: Sequence[int] = ()
    """Per sample, equal for responses to the same prompt; empty: each sample is a group of its own."""
    stopped: Sequence[bool] = ()
    """Per sample, False where the response was cut at the limit; empty: none was."""
    max_response_tokens: int = 0
    """The limit; 0: the longest response."""

    def __post_init__(self) -> None:
        for name in ("logprobs", "ref_logprobs", "scores"):
            _check_count(f"batch.{name}", len(getattr(self, name)), len(self.samples))
        for name in ("groups", "stopped"):
            if getattr(self, name):
                _check_count(f"batch.{name}", len(getattr(self, name)), len(self.samples))
        for i, sample in enumerate(self.samples):
            for name in ("logprobs", "ref_logprobs"):
                row: Sequence[float] = getattr(self, name)[i]
                _check_count(f"batch.{name}[{i}]", len(row), len(sample.response_token_ids))
                _check_finite(f"batch.{name}[{i}]", row)
        _check_finite("batch.scores", self.scores)

    @property
    def response_limit(self) -> int:
        """Most tokens that a response of this batch could have had."""
        return max(self.max_response_tokens, *response_lengths(self.samples))

    def group_ids(self) -> list[int]:
        """Return the group of each sample."""
        return list(self.groups) or list(range(len(self.samples)))

    def has_eos(self) -> list[bool]:
        """Return per sample whether the response ended by itself."""
        return list(self.stopped) or [True] * len(self.samples)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some samples as the model reads them.

    Example: the first two samples of a rollout, ([1, 5], [7, 2]) and ([3], [9]), become token_ids
    [[3, 0, 0], [1, 5, 7]], states [0, 4, 5], targets [9, 7, 2], tokens [2, 0, 1] and mask [[1, 0], [1, 1]].
    """

    token_ids: Tensor
    """[B, L] ids, right-padded, without the last response token: no state after it is ever read."""
    states: Tensor
    """[n] positions in the flattened [B * L] of the states that emit the response tokens, row by row."""
    targets: Tensor
    """[n] the response tokens they emit."""
    tokens: Tensor
    """[n] positions of those tokens among the N of the rollout."""
    mask: Tensor
    """[b, t] True on response tokens, in response coordinates: row by row its n entries are those above."""

    def pad(self, flat: Tensor) -> Tensor:
        """Return [n] figures of the response tokens as [b, t], 0 outside the mask."""
        mask = self.mask.to(flat.device)
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def _check_count(field: str, got: int, expected: int) -> None:
    if got != expected:
        raise InvalidArgumentError(f"{field} has {got} entries, expected {expected}", field=field)


def _check_finite(field: str, values: Sequence[float]) -> None:
    for t, value in enumerate(values):
        if not math.isfinite(value):
            raise InvalidArgumentError(f"{field}[{t}] is {value}; only finite numbers can be trained on", field=field)


def check_samples(samples: Sequence[Sample], *, vocab_size: int, max_length: int, field: str = "samples") -> None:
    """Refuse samples that the model cannot read.

    Raises:
        InvalidArgumentError: No samples, an empty prompt or response, an id outside the vocabulary, or more than
            `max_length` tokens; the field names the sample.
    """
    if not samples:
        raise InvalidArgumentError("at least one sample is needed", field=field)
    for i, sample in enumerate(samples):
        for name in ("prompt_token_ids", "response_token_ids"):
            _check_token_ids(f"{field}[{i}].{name}", getattr(sample, name), vocab_size)
        length = len(sample.prompt_token_ids) + len(sample.response_token_ids)
        if length > max_length:
            message = f"{field}[{i}] has {length} tokens, more than the model's {max_length}; shorten it"
            raise InvalidArgumentError(message, field=f"{field}[{i}]")


def _check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids:
        raise InvalidArgumentError(f"{field} is empty; at least one token is needed", field=field)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise InvalidArgumentError(f"{field} has an id outside [0, {vocab_size})", field=field)


def response_lengths(samples: Sequence[Sample]) -> list[int]:
    """Return the number of response tokens of each sample."""
    return [len(sample.response_token_ids) for sample in samples]


def value_samples(batch: RolloutBatch, placement: Placement) -> Sequence[Sample]:
    """Return the samples as the critic reads them, one value for each of their response tokens.

    With `n_plus` a response below the limit has one more value, of the state after its last token. It is read as the
    state before one more token, whose id is never looked at.

    Source: D6, D9.
    """
    if placement == "last":
        return batch.samples
    limit = batch.response_limit
    return [
        s if len(s.response_token_ids) >= limit else Sample(s.prompt_token_ids, [*s.response_token_ids, 0])
        for s in batch.samples
    ]


def build_micro_batches(samples: Sequence[Sample], rows: Iterable[int], *, max_tokens: int) -> list[MicroBatch]:
    """Return the samples `rows` as micro-batches of similar lengths, each of at most `max_tokens` padded tokens.

    The result depends on the set of rows and not on their order. A sample that is longer than `max_tokens` goes alone.
    """
    ordered = sorted(rows)
    starts = [0, *accumulate(response_lengths(samples))]
    inputs = [[*samples[r].prompt_token_ids, *samples[r].response_token_ids][:-1] for r in ordered]
    micro_batches = []
    for padded in padded_batches(inputs, max_tokens=max_tokens):
        members = [ordered[i] for i in padded.indices]
        micro_batches.append(_locate(padded.token_ids, [samples[r] for r in members], [starts[r] for r in members]))
    return micro_batches


def _locate(token_ids: Tensor, samples: Sequence[Sample], starts: Sequence[int]) -> MicroBatch:
    """Return the micro-batch of padded ids [B, L], given its samples and where each one's response begins in the N."""
    states: list[int] = []
    tokens: list[int] = []
    for row, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        first = row * token_ids.shape[1] + len(sample.prompt_token_ids) - 1
        states += range(first, first + len(sample.response_token_ids))
        tokens += range(start, start + len(sample.response_token_ids))
    targets = [t for sample in samples for t in sample.response_token_ids]
    lengths = torch.tensor(response_lengths(samples))
    mask = response_mask(lengths, width=int(lengths.max()))
    return MicroBatch(token_ids, torch.tensor(states), torch.tensor(targets), torch.tensor(tokens), mask)
