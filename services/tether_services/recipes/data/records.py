"""What a row of training data means, whatever shape it came in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

__all__ = ["Demonstration", "Document", "LabelledText", "Place", "Prompt", "Ranking", "Role", "Turn", "ordered_pairs"]

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


Prompt = str | tuple[Turn, ...]
"""Text to be continued, or a conversation that ends before the assistant's turn."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record comes from; for messages to people."""

    source: str
    """File name or name of a data set."""
    row: int
    """Line of a text file, or row of a data set, from 1."""

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text."""

    text: str
    """Not empty."""
    place: Place = field(compare=False)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the answer to learn."""

    prompt: Prompt
    answer: str
    """Not empty."""
    place: Place = field(compare=False)


@dataclass(frozen=True, slots=True)
class Ranking:
    """K answers to one prompt in the order that people gave them; a pair is K = 2."""

    prompt: Prompt
    answers: tuple[str, ...]
    """[K], at least two, none empty."""
    levels: tuple[float, ...]
    """[K], higher is better; equal levels are a tie; at least two differ, unless they are scores."""
    place: Place = field(compare=False)
    margin: float | None = None
    """By how much the score of a better answer should lead, 0 or more; None: unknown."""
    is_scored: bool = False
    """Whether the levels are scores on a scale that all prompts share, and not ranks within this one."""


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and what people said about it."""

    text: str
    """Not empty."""
    label: int
    """1 positive, 0 negative."""
    place: Place = field(compare=False)


def ordered_pairs(levels: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Yield (better, worse) places for every two answers on different levels."""
    for first, second in combinations(range(len(levels)), 2):
        if levels[first] != levels[second]:
            yield (first, second) if levels[first] > levels[second] else (second, first)
