"""Items and scores between messages and plain values."""

from __future__ import annotations

from collections.abc import Sequence

from tether.errors import FieldViolation, TetherError
from tether.v1 import reward_pb2
from tether_services.reward.items import ScoreInput
from tether_services.reward.models import Judgement, Refusal
from tether_services.runtime.checks import check_page
from tether_services.runtime.text import Message, check_message_count

Outcome = Judgement | Refusal


def read_items(items: Sequence[reward_pb2.ScoreItem]) -> list[ScoreInput | Refusal]:
    """Return every item as plain values, or why it cannot be read."""
    return [_read_or_refuse(item) for item in items]


def count_ids(items: Sequence[reward_pb2.ScoreItem]) -> int | None:
    """Return the token ids of all items together, or None if one of them holds text."""
    if any(item.prompt or item.response or item.messages for item in items):
        return None
    return sum(len(item.prompt_token_ids) + len(item.response_token_ids) for item in items)


def _read_or_refuse(item: reward_pb2.ScoreItem) -> ScoreInput | Refusal:
    try:
        return read_item(item)
    except TetherError as error:
        return Refusal(error)


def read_item(item: reward_pb2.ScoreItem) -> ScoreInput:
    """Return the item as plain values, not checked.

    Raises:
        InvalidArgumentError: A conversation of too many turns.
    """
    check_message_count(len(item.messages), field="messages")
    return ScoreInput(
        prompt=item.prompt,
        response=item.response,
        messages=tuple(Message(message.role, message.content) for message in item.messages),
        prompt_token_ids=tuple(item.prompt_token_ids),
        response_token_ids=tuple(item.response_token_ids),
    )


def write_score(outcome: Outcome, *, field: str) -> reward_pb2.ItemScore:
    """Return the message for an outcome; `field` is the path of the item."""
    if isinstance(outcome, Refusal):
        error = relocate(outcome.error, field=field)
        number: int = error.code.value[0]
        place = error.violations[0].field
        return reward_pb2.ItemScore(
            error=reward_pb2.ItemError(code=number, reason=error.reason, message=error.message, field=place)
        )
    return reward_pb2.ItemScore(
        score=outcome.score,
        raw_score=outcome.raw_score,
        components=[
            reward_pb2.ScoreComponent(name=part.name, value=part.value, weight=part.weight)
            for part in outcome.components
        ],
        token_count=outcome.token_count,
        truncated=outcome.truncated,
    )


def relocate(error: TetherError, *, field: str) -> TetherError:
    """Return the same error with its field, which is relative to an item, under the path of the item."""
    inner = error.violations[0].field if error.violations else ""
    place = ".".join(part for part in (field, inner) if part)
    violations = (FieldViolation(place, error.message),) if place else ()
    return type(error)(error.message, reason=error.reason, violations=violations)


def cut_page(num_entries: int, *, page_size: int, page_token: str) -> tuple[slice, str]:
    """Return which entries of a list are on a page, and the token of the next one; empty on the last.

    Raises:
        InvalidArgumentError: Names the field.
    """
    size, start = check_page(page_size, page_token)
    return slice(start, start + size), str(start + size) if start + size < num_entries else ""
