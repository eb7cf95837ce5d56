"""Dialogues written as one text, as in the HH data: a blank line and `Human:` or `Assistant:` before each turn."""

from __future__ import annotations

import re

from tether_services.recipes.data.records import Turn

__all__ = ["REPLY_MARK", "is_transcript", "read_transcript"]

REPLY_MARK = "\n\nAssistant:"
HUMAN_MARK = re.compile(r"(?:\A|\n\n)Human:")
TURN_MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Return whether a prompt is a dialogue: it begins with a human's mark, or has one and ends with a reply mark."""
    return text.startswith("\n\nHuman:") or bool(text.rstrip().endswith(REPLY_MARK) and HUMAN_MARK.search(text))


def read_transcript(text: str) -> tuple[Turn, ...]:
    """Return the turns, stripped: the space after a mark is layout. What stands before the first mark is the system."""
    before, *parts = TURN_MARK.split(text)
    turns = [Turn("system", before.strip())] if before.strip() else []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append(Turn("user" if speaker == "Human" else "assistant", content.strip()))
    return tuple(turns)
