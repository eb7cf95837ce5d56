"""OpenRLHF's queries, each a prompt and its response in one text, taken apart exactly."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import InvalidArgumentError
from tether.generator import Message
from tether.reward import ScoreItem

__all__ = ["QueryForm", "split_queries"]


@dataclass(frozen=True, slots=True)
class QueryForm:
    r"""What stands around the texts in OpenRLHF's prompts and queries.

    The reward scorer reads the marks of a chat template in plain text as words, never as special tokens. To score
    prompts that OpenRLHF rendered with a chat template as conversations, say what the template puts around the message:

        QueryForm("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", end_text="<|im_end|>")

    Raises:
        InvalidArgumentError: The template does not have {} exactly once.
    """

    prompt_template: str = ""
    """A prompt, with {} where the user's message stands; empty: prompts are plain text and scored as they are."""
    end_text: str = ""
    """Text of the end token, removed once from the end of a response that has it; empty: nothing is removed."""

    def __post_init__(self) -> None:
        if self.prompt_template and self.prompt_template.count("{}") != 1:
            raise InvalidArgumentError(
                "The template needs {} exactly once, where the user's message stands.", field="prompt_template"
            )

    def item(self, prompt: str, response: str) -> ScoreItem:
        """Return what is scored: text, or a conversation where there is a template.

        Raises:
            InvalidArgumentError: The prompt was not made with the template.
        """
        response = response.removesuffix(self.end_text)
        if not self.prompt_template:
            return ScoreItem(prompt=prompt, response=response)
        before, after = self.prompt_template.split("{}")
        is_made_so = prompt.startswith(before) and prompt.endswith(after)
        if not is_made_so or len(prompt) < len(before) + len(after):
            raise InvalidArgumentError(
                "The prompt does not begin and end as prompt_template does; give the template that OpenRLHF applied.",
                reason="PROMPT_MISMATCH",
            )
        message = prompt[len(before) : len(prompt) - len(after)]
        return ScoreItem(messages=(Message("user", message), Message("assistant", response)))


PLAIN = QueryForm()
"""Prompts and responses as they came."""


def split_queries(queries: Sequence[Any], prompts: Sequence[Any], *, form: QueryForm = PLAIN) -> list[ScoreItem]:
    """Return prompt and response of each query as an item to score.

    Args:
        queries: Texts, each a prompt with its response behind it.
        prompts: The prompts of these, in the same order.
        form: What stands around the texts.

    Raises:
        InvalidArgumentError: The lists differ in length, hold something else than texts, or PROMPT_MISMATCH: a query
            does not begin with its prompt, so that nobody can tell which part of it is the response.
    """
    if len(queries) != len(prompts):
        raise InvalidArgumentError(
            f"There are {len(prompts)} prompts for {len(queries)} queries; give one for each.", field="prompts"
        )
    pairs = zip(queries, prompts, strict=True)
    return [_split(query, prompt, index, form) for index, (query, prompt) in enumerate(pairs)]


def _split(query: Any, prompt: Any, index: int, form: QueryForm) -> ScoreItem:
    _check_text(query, f"query[{index}]")
    _check_text(prompt, f"prompts[{index}]")
    if not query.startswith(prompt):
        common = len(os.path.commonprefix((query, prompt)))
        raise InvalidArgumentError(
            f"The query does not begin with its prompt of {len(prompt)} characters: they part after {common}. "
            "OpenRLHF cuts prompts that are too long from the left: raise its length limit or drop them. "
            "Some tokenizers do not give a text back as it was; such prompts cannot be told from their responses.",
            field=f"query[{index}]",
            reason="PROMPT_MISMATCH",
        )
    try:
        return form.item(prompt, query[len(prompt) :])
    except InvalidArgumentError as error:
        raise InvalidArgumentError(error.message, field=f"prompts[{index}]", reason=error.reason) from None


def _check_text(text: Any, field: str) -> None:
    """Refuse what is not a text; what was parsed as JSON may also hold halves of characters.

    Raises:
        InvalidArgumentError: It is something else.
    """
    if not isinstance(text, str):
        raise InvalidArgumentError("It is not a text.", field=field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError("It holds half of a surrogate pair; send whole characters.", field=field) from None
