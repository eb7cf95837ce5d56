"""Items to score and their judgements, and how the contract spells them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tether.errors import TetherError
from tether.generator import Message, chat_messages
from tether.status import from_code, request_field
from tether.v1 import reward_pb2

__all__ = [
    "ItemScore",
    "ScoreComponent",
    "ScoreItem",
    "ScoreResult",
    "ScoredItem",
    "failed_score",
    "item_message",
    "item_score",
]


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One response to judge, in exactly one form: text, a conversation, or token ids."""

    prompt: str = ""
    """Text form: the prompt."""
    response: str = ""
    """Text form: the response."""
    messages: Sequence[Message] = ()
    """Chat form: a conversation whose last message is the response."""
    prompt_token_ids: Sequence[int] = ()
    """Token form: the prompt."""
    response_token_ids: Sequence[int] = ()
    """Token form: the response, stop token included."""


@dataclass(frozen=True, slots=True)
class ScoreComponent:
    """One part of a score."""

    name: str
    """From the service's configuration."""
    value: float
    """Before weighting."""
    weight: float
    """In the sum."""


@dataclass(frozen=True, slots=True)
class ItemScore:
    """The judgement of one item, or why there is none."""

    score: float
    """What training uses; NaN if and only if `error` is set, so that it cannot pass for a judgement."""
    raw_score: float
    """Before the models' gain and bias; NaN like `score`."""
    components: tuple[ScoreComponent, ...]
    """The parts of the sum."""
    token_count: int
    """Tokens that the model read."""
    truncated: bool
    """True if prompt tokens were cut from the left."""
    error: TetherError | None = None
    """Why this item could not be scored."""


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Scores in the order of the items, and the model that gave them."""

    scores: tuple[ItemScore, ...]
    """One per item."""
    model: str
    """Name of the model."""
    version: str
    """Its version."""
    model_sha256: str
    """Its content hash."""


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """The judgement of one item among many, and the model that gave it."""

    index: int
    """Place of the item among all, from 0."""
    score: ItemScore
    """The judgement, or why there is none."""
    model: str
    """Name of the model; empty if none has judged the item, since it cannot be sent or a call failed for it."""
    version: str
    """Its version."""
    model_sha256: str
    """Its content hash."""


def item_message(item: ScoreItem, index: int) -> reward_pb2.ScoreItem:
    """Return an item as the contract spells it.

    Raises:
        InvalidArgumentError: A value does not fit its type; the field begins with items[index].
    """
    with request_field(f"items[{index}]"):
        return reward_pb2.ScoreItem(
            prompt=item.prompt,
            response=item.response,
            messages=chat_messages(item.messages, field=f"items[{index}].messages"),
            prompt_token_ids=item.prompt_token_ids,
            response_token_ids=item.response_token_ids,
        )


def item_score(score: reward_pb2.ItemScore) -> ItemScore:
    """Return what the contract says about an item."""
    if score.HasField("error"):
        failed = score.error
        return failed_score(from_code(failed.code, failed.message, reason=failed.reason, field=failed.field))
    return ItemScore(
        score=score.score,
        raw_score=score.raw_score,
        components=tuple(ScoreComponent(part.name, part.value, part.weight) for part in score.components),
        token_count=score.token_count,
        truncated=score.truncated,
    )


def failed_score(error: TetherError) -> ItemScore:
    """Return what stands in for the judgement of an item that could not be scored."""
    return ItemScore(math.nan, math.nan, (), 0, False, error)
