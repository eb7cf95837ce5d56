"""Training and validation parts that share no prompt, the same on every machine and in every order of the files."""

from __future__ import annotations

import hashlib
import json

from tether_services.recipes.data.records import Demonstration, LabelledText, Prompt, Ranking
from tether_services.recipes.data.shapes import Record
from tether_services.recipes.data.transcripts import is_transcript, read_transcript
from tether_services.recipes.data.wording import overlap_key

__all__ = ["canonical_prompt", "identity", "is_validation", "opening", "split_key"]

HASH_RANGE = 2**32
"""Records are divided by the first four bytes of a SHA-256."""


def opening(prompt: Prompt) -> str:
    """Return what a prompt begins with: the first turn of the user that says something, or the text itself.

    Dialogues that go on from the same opening, such as the groups of one message tree, share it, and so do transcripts
    that are one text.
    """
    if isinstance(prompt, str) and not is_transcript(prompt):
        return prompt
    turns = read_transcript(prompt) if isinstance(prompt, str) else prompt
    said = (turn.content for turn in turns if turn.role == "user" and turn.content.strip())
    return next(said, prompt if isinstance(prompt, str) else "")


def split_key(record: Record) -> str:
    """Return what must not be in both parts: the opening of a prompt, the words of a labelled text, or a document.

    Upper case, and where and how wide white space is, make no other prompt. A document is what it is, to the letter.
    """
    if isinstance(record, LabelledText):
        return overlap_key(record.text)
    if isinstance(record, Demonstration | Ranking):
        return " ".join(opening(record.prompt).split()).casefold()
    return record.text


def is_validation(key: str, *, fraction: float) -> bool:
    """Return whether what has this key is kept for validation: a share of `fraction` of all keys."""
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") < fraction * HASH_RANGE


def canonical_prompt(prompt: Prompt) -> str:
    """Return one spelling of a prompt in JSON: equal for equal prompts."""
    return _canonical(prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt])


def identity(record: Record) -> bytes:
    """Return a short hash of all that a record says, without its place; the order of ranked answers says nothing."""
    if isinstance(record, Ranking):
        order = sorted(set(record.levels))
        levels = record.levels if record.is_scored else [order.index(level) for level in record.levels]
        answers = sorted(zip(record.answers, levels, strict=True))
        content = [canonical_prompt(record.prompt), answers, record.margin]
    elif isinstance(record, Demonstration):
        content = [canonical_prompt(record.prompt), record.answer]
    else:
        content = [split_key(record) if isinstance(record, LabelledText) else record.text]
    return hashlib.sha256(_canonical(content).encode("utf-8")).digest()[:16]


def _canonical(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
