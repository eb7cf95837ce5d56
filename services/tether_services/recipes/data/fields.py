"""Typed access to the fields of a row; what is wrong becomes a `RowError` by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

from tether_services.recipes.data.problems import MalformedReason, RowError
from tether_services.recipes.data.records import Prompt, Role, Turn

__all__ = [
    "Fields",
    "check_prompt",
    "check_text",
    "list_of",
    "number_of",
    "object_of",
    "read_prompt",
    "read_turns",
    "text_of",
]

Fields = Mapping[str, object]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""What people call the three roles."""


def check_text(value: object, *, name: str, blank: MalformedReason | None) -> str:
    """Return the text.

    Args:
        value: Anything.
        name: What it is, for the message.
        blank: The reason if it is empty or only space; None where that is allowed.

    Raises:
        RowError: missing_field, wrong_type, nul_character, lone_surrogate, or `blank`.
    """
    if value is None:
        raise RowError("missing_field", name)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} is a {type(value).__name__}, not a text")
    if blank and not value.strip():
        raise RowError(blank, name)
    if "\0" in value:
        raise RowError("nul_character", name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a pair, which JSON can spell and no tokenizer takes
        raise RowError("lone_surrogate", name) from error
    return value


def text_of(row: Fields, name: str, *, blank: MalformedReason | None) -> str:
    """Return the text of a field; see `check_text`."""
    return check_text(row.get(name), name=name, blank=blank)


def list_of(row: Fields, name: str) -> Sequence[object]:
    """Return the list of a field.

    Raises:
        RowError: missing_field or wrong_type.
    """
    value = row.get(name)
    if value is None:
        raise RowError("missing_field", name)
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{name} is a {type(value).__name__}, not a list")
    return value


def object_of(value: object, *, name: str) -> Fields:
    """Return the object with its fields.

    Raises:
        RowError: missing_field or wrong_type.
    """
    if value is None:
        raise RowError("missing_field", name)
    if not isinstance(value, Mapping):
        raise RowError("wrong_type", f"{name} is a {type(value).__name__}, not an object")
    return cast(Fields, value)


def number_of(value: object, *, name: str, reason: MalformedReason) -> float:
    """Return a finite number; texts and truth values are none.

    Raises:
        RowError: missing_field or `reason`.
    """
    if value is None:
        raise RowError("missing_field", name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(reason, f"{name} is a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise RowError(reason, f"{name} is too large") from error
    if not math.isfinite(number):
        raise RowError(reason, f"{name} is not finite")
    return number


def read_turns(messages: Sequence[object], *, name: str) -> tuple[Turn, ...]:
    """Return the turns of a list of {role, content}, or of {from, value}.

    Raises:
        RowError: wrong_type, missing_field, bad_role, empty_turn, or as `check_text`.
    """
    return tuple(_read_turn(message, name=f"{name}[{index}]") for index, message in enumerate(messages))


def _read_turn(message: object, *, name: str) -> Turn:
    fields = object_of(message, name=name)
    role_name, content_name = ("from", "value") if "from" in fields else ("role", "content")
    role = ROLES.get(text_of(fields, role_name, blank=None))
    if role is None:
        raise RowError("bad_role", f"{name}.{role_name} must be one of {', '.join(ROLES)}")
    content = check_text(fields.get(content_name), name=f"{name}.{content_name}", blank="empty_turn")
    return Turn(role, content)


def read_prompt(value: object, *, name: str) -> Prompt:
    """Return a prompt from a text, or from a list of messages with a user's turn in it.

    Raises:
        RowError: empty_prompt, or as `read_turns`.
    """
    if not isinstance(value, list):
        return check_text(value, name=name, blank="empty_prompt")
    return check_prompt(read_turns(value, name=name), name=name)


def check_prompt(turns: tuple[Turn, ...], *, name: str) -> tuple[Turn, ...]:
    """Return the turns before an answer.

    Raises:
        RowError: empty_prompt: no turn of the user says anything.
    """
    if not any(turn.role == "user" and turn.content.strip() for turn in turns):
        raise RowError("empty_prompt", f"{name} has no turn of the user")
    return turns
