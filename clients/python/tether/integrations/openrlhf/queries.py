"""OpenRLHF's queries, each a prompt and its response in one text, taken apart exactly."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any

from tether.errors import InvalidArgumentError
from tether.reward import ScoreItem

__all__ = ["split_queries"]


def split_queries(queries: Sequence[Any], prompts: Sequence[Any], *, end_text: str = "") -> list[ScoreItem]:
    """Return (prompt, response) of each query.

    Args:
        queries: Texts, each a prompt with its response behind it.
        prompts: The prompts of these, in the same order.
        end_text: Text of the end token, removed once from the end of a response that has it: OpenRLHF decodes
            responses with their special tokens. Empty: responses are scored as they came.

    Raises:
        InvalidArgumentError: The lists differ in length, hold something else than texts, or a query does not begin
            with its prompt, so that nobody can tell which part of it is the response.
    """
    if len(queries) != len(prompts):
        raise InvalidArgumentError(
            f"There are {len(prompts)} prompts for {len(queries)} queries; give one for each.", field="prompts"
        )
    pairs = zip(queries, prompts, strict=True)
    return [_split(query, prompt, index, end_text) for index, (query, prompt) in enumerate(pairs)]


def _split(query: Any, prompt: Any, index: int, end_text: str) -> ScoreItem:
    for name, text in (("query", query), ("prompts", prompt)):
        if not isinstance(text, str):
            raise InvalidArgumentError("It is not a text.", field=f"{name}[{index}]")
    if not query.startswith(prompt):
        common = len(os.path.commonprefix((query, prompt)))
        raise InvalidArgumentError(
            f"The query does not begin with its prompt of {len(prompt)} characters: they part after {common}. "
            "OpenRLHF cuts prompts that are too long from the left: raise its length limit or drop them. "
            "Some tokenizers do not give a text back as it was; such prompts cannot be told from their responses.",
            field=f"query[{index}]",
            reason="PROMPT_MISMATCH",
        )
    return ScoreItem(prompt=prompt, response=query[len(prompt) :].removesuffix(end_text))
