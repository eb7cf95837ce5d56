"""Pretraining text of PPO-ptx: which sequences each step learns."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tether_services.orchestrator.prompts import derive_seed, step_prompts

__all__ = ["PretrainingText"]

_CHARACTERS_PER_TOKEN = 16
"""Far more than a tokenizer's average: a slice of a long document that is sure to fill a sequence."""


@dataclass(frozen=True, slots=True)
class PretrainingText:
    """Documents that are cut into sequences as they are needed, so that a large text costs nothing at the start."""

    documents: Sequence[str]
    """None empty."""
    encode: Callable[[str], Sequence[int]]
    """To token ids, with the tokens that begin and end a document."""
    length: int
    """Tokens of a sequence at most, 2 or more."""
    seed: int
    """Of the order of the documents and the places of the cuts."""

    def rows(self, *, step: int, count: int) -> list[list[int]]:
        """Return the sequences of 2 to `length` tokens of a step: one of each of `count` documents.

        Documents come in an endless sequence of shuffled passes. A document that is too long gives a sequence from a
        random place, one of a single token none. A pure function of its arguments: it draws from no other random
        stream, and a resumed run goes on where it stopped.

        Source: D29.
        """
        documents = step_prompts(self.documents, step=step, count=count, seed=self.seed, stream="pretraining")
        rows = [self._cut(text, derive_seed(self.seed, "cut", step, index)) for index, text in enumerate(documents)]
        return [row for row in rows if len(row) > 1]

    def _cut(self, text: str, seed: int) -> list[int]:
        rng, most = random.Random(seed), self.length * _CHARACTERS_PER_TOKEN
        start = rng.randrange(len(text) - most + 1) if len(text) > most else 0
        token_ids = list(self.encode(text[start : start + most]))
        if len(text) > most:
            token_ids.pop()  # the end token of a document that does not end here
        offset = rng.randrange(max(1, len(token_ids) - self.length + 1))
        return token_ids[offset : offset + self.length]
