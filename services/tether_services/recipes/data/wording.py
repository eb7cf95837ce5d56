"""Sentences in several spellings: ordinary spacing, and what two spellings have in common."""

from __future__ import annotations

import re

__all__ = ["overlap_key", "tidy_spacing"]

NOT_A_WORD = re.compile(r"[\W_]+")
SPACE_BEFORE = re.compile(r"\s+([.,!?;:)\]%])")
SPACE_AFTER = re.compile(r"([(\[$])\s+")
QUOTED = re.compile(r'"\s+([^"]*?)\s+"')


def tidy_spacing(text: str) -> str:
    """Return text with the spaces around punctuation of an ordinary English sentence."""
    text = QUOTED.sub(r'"\1"', text.strip())
    return SPACE_AFTER.sub(r"\1", SPACE_BEFORE.sub(r"\1", text))


def overlap_key(text: str) -> str:
    """Return the letters and digits of a text in lower case: equal for one sentence in two spellings.

    A text without any is its own key.
    """
    return NOT_A_WORD.sub("", text.casefold()) or text
