"""Checks of request fields that all services share. Each raises InvalidArgumentError naming the field."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tether.errors import InvalidArgumentError

NAME_PATTERN = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")
SHA256_PATTERN = re.compile(r"^[0-9a-f]{64}$")
PAGE_TOKEN_PATTERN = re.compile(r"[0-9]{1,18}")


def check_range(value: float, *, field: str, low: float, high: float) -> None:
    """Refuse a number outside [low, high], or one that is not a number."""
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidArgumentError(f"{value:g} is outside [{low:g}, {high:g}].", field=field)


def check_temperature(value: float, *, field: str, allow_greedy: bool) -> None:
    """Refuse a temperature outside [0.01, 2]; 0 (greedy) passes where it makes sense."""
    if allow_greedy and value == 0:
        return
    if not math.isfinite(value) or not 0.01 <= value <= 2:
        greedy = "0 (greedy) or " if allow_greedy else ""
        raise InvalidArgumentError(f"{value:g} is not {greedy}in [0.01, 2].", field=field)


def check_token_ids(token_ids: Sequence[int], *, field: str, vocab_size: int) -> None:
    """Refuse an empty sequence and ids outside [0, vocab_size)."""
    if not token_ids:
        raise InvalidArgumentError("At least one token id is needed.", field=field)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        index = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        raise InvalidArgumentError(
            f"Token id {token_ids[index]} is outside [0, {vocab_size}).", field=f"{field}[{index}]"
        )


def check_name(value: str, *, field: str) -> None:
    """Refuse an identifier that does not match NAME_PATTERN; paths and URLs never do."""
    if not NAME_PATTERN.fullmatch(value):
        raise InvalidArgumentError(f"{value[:80]!r} does not match {NAME_PATTERN.pattern}.", field=field)


def check_sha256(value: str, *, field: str) -> None:
    """Refuse anything but 64 lower-case hex digits."""
    if not SHA256_PATTERN.fullmatch(value):
        raise InvalidArgumentError("A SHA-256 is 64 lower-case hex digits.", field=field)


def check_text(value: str, *, field: str, max_chars: int) -> None:
    """Refuse text that is too long to be worth tokenising."""
    if len(value) > max_chars:
        raise InvalidArgumentError(f"{len(value)} characters; at most {max_chars} are accepted.", field=field)


def check_page(page_size: int, page_token: str) -> tuple[int, int]:
    """Return (size, start) of a page of a list."""
    if not 0 <= page_size <= 200:
        raise InvalidArgumentError(f"{page_size} is outside [0, 200].", field="page_size")
    if page_token and not PAGE_TOKEN_PATTERN.fullmatch(page_token):
        raise InvalidArgumentError("This token did not come from a next_page_token.", field="page_token")
    return page_size or 50, int(page_token or 0)
