"""Rows of a pretraining: blocks of equal length, cut from all documents in a new order for every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tether.errors import InvalidArgumentError

__all__ = ["Blocks"]


class Blocks(Dataset[dict[str, Tensor]]):
    """The blocks of an epoch.

    Each epoch joins the documents in a new order, cuts them without gaps, and orders the blocks anew too: a book among
    stories would otherwise fill many steps in a row. Less than one block is left out at the end. An epoch depends on
    the seed and its number alone, so that a resumed run sees the rest of the same epoch: read the rows in order.
    """

    def __init__(self, encoded: Sequence[Sequence[int]], *, block_tokens: int, seed: int) -> None:
        """Take documents as token ids; the first epoch is cut.

        Raises:
            InvalidArgumentError: All documents together are shorter than a block.
        """
        self._documents = [torch.tensor(ids) for ids in encoded]
        self._block_tokens = block_tokens
        self._seed = seed
        if sum(map(len, self._documents)) <= block_tokens:
            raise InvalidArgumentError("the text is shorter than one block; give more text", field="block_tokens")
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Cut the blocks of an epoch, from 0; the training loop calls this."""
        digest = hashlib.sha256(f"{self._seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # the generator takes 32 bits
        order = torch.randperm(len(self._documents), generator=generator).tolist()
        self._joined = torch.cat([self._documents[index] for index in order])
        num_blocks = (len(self._joined) - 1) // self._block_tokens
        self._starts = (torch.randperm(num_blocks, generator=generator) * self._block_tokens).tolist()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row of `input_ids` and, as `labels`, the id that follows each of them, both [block_tokens].

        The trainer takes `labels` for unshifted ones when it counts the targets of a step, and `shift_labels` as it is.
        """
        start = self._starts[index]
        block = self._joined[start : start + self._block_tokens + 1]
        return {"input_ids": block[:-1], "labels": block[1:], "shift_labels": block[1:]}
