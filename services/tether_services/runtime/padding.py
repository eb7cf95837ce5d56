"""Ragged rows of token ids as right-padded tensors for a causal model. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FILL_ID = 0
"""Any id of the vocabulary: it stands to the right of every real token, where causal attention never looks."""


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


def padded_batches(rows: Sequence[Sequence[int]], *, max_tokens: int, device: str = "cpu") -> list[PaddedBatch]:
    """Return the rows in batches of similar lengths, each of at most `max_tokens` tokens with padding.

    A row that is longer than `max_tokens` goes alone.

    Args:
        rows: Token ids, none empty.
        max_tokens: Rows times longest row of a batch at most.
        device: Where the tensors go.

    Raises:
        ValueError: A row is empty; it has no token that could be read.
    """
    if not all(rows):
        raise ValueError("an empty row cannot be padded")
    groups: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        # Ascending order: this row is the longest of its group so far, so it sets the padded width.
        if groups and len(rows[index]) * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_pad(rows, group, device) for group in groups]


def _pad(rows: Sequence[Sequence[int]], indices: Sequence[int], device: str) -> PaddedBatch:
    lengths = [len(rows[i]) for i in indices]
    width = max(lengths)
    filled = [[*rows[i], *[_FILL_ID] * (width - len(rows[i]))] for i in indices]
    return PaddedBatch(
        indices=tuple(indices),
        token_ids=torch.tensor(filled, device=device),
        position_ids=torch.arange(width, device=device)[None, :],
        lengths=torch.tensor(lengths, device=device),
    )
