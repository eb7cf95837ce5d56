"""Ragged rows of token ids as right-padded tensors for a causal model. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether_services.runtime.pass_tally import count_pass

_FILL_ID = 0
"""Any id of the vocabulary: it stands to the right of every real token, where causal attention never looks."""

_SERVING_PADDING = {"cpu": 128, "cuda": 1024}
"""Padding per forward pass at most, by kind of device: about what one more pass costs in tokens. Measured on a CPU
with a model of 2 million parameters, where 32 to 128 are alike; for GPUs it is an estimate between a small model, whose
passes wait for their launches, and a large one, which reads its weights in the time of some hundred tokens."""


def serving_padding(device: str) -> int:
    """Return how much padding a forward pass of a service may have, in tokens."""
    return _SERVING_PADDING["cpu" if device == "cpu" else "cuda"]


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Some rows as a model reads them.

    Example: rows [5, 6, 7] and [8], the first and third of a call, become indices (2, 0),
    token_ids [[8, 0, 0], [5, 6, 7]], position_ids [[0, 1, 2]] and lengths [1, 3].
    """

    indices: tuple[int, ...]
    """Places of the rows in the sequence that was given."""
    token_ids: Tensor
    """[B, L] ids."""
    position_ids: Tensor
    """[1, L], 0 to L - 1: with padding on the right a token's position is its column."""
    lengths: Tensor
    """[B] real tokens of each row."""


def padded_batches(
    rows: Sequence[Sequence[int]], *, max_tokens: int, max_padding: int | None = None, device: str = "cpu"
) -> list[PaddedBatch]:
    """Return the rows in batches of similar lengths, each of at most `max_tokens` tokens with padding.

    A row that is longer than `max_tokens` goes alone.

    Args:
        rows: Token ids, none empty.
        max_tokens: Rows times longest row of a batch at most.
        max_padding: Padding tokens of a batch at most; None is no bound but `max_tokens`.
        device: Where the tensors go.

    Raises:
        ValueError: A row is empty; it has no token that could be read.
    """
    if not all(rows):
        raise ValueError("an empty row cannot be padded")
    groups = _group([len(row) for row in rows], max_tokens=max_tokens, max_padding=max_padding)
    return [_pad(rows, group, device) for group in groups]


def _group(lengths: Sequence[int], *, max_tokens: int, max_padding: int | None) -> list[list[int]]:
    """Return the places of the rows in groups, in ascending order of length."""
    groups: list[list[int]] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Ascending order: this row is the longest of its group so far, so it sets the padded width.
        width = lengths[index]
        held = len(groups[-1]) if groups else 0
        fits = held > 0 and width * (held + 1) <= max_tokens
        if fits and (max_padding is None or width * held - real <= max_padding):
            groups[-1].append(index)
            real += width
        else:
            groups.append([index])
            real = width
    return groups


def _pad(rows: Sequence[Sequence[int]], indices: Sequence[int], device: str) -> PaddedBatch:
    lengths = [len(rows[i]) for i in indices]
    width = max(lengths)
    count_pass(real_tokens=sum(lengths), padding_tokens=width * len(lengths) - sum(lengths))
    filled = [[*rows[i], *[_FILL_ID] * (width - len(rows[i]))] for i in indices]
    return PaddedBatch(
        indices=tuple(indices),
        token_ids=torch.tensor(filled, device=device),
        position_ids=torch.arange(width, device=device)[None, :],
        lengths=torch.tensor(lengths, device=device),
    )
