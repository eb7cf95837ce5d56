"""The rows of `tether score FILE`: what may stand in the file, and what is written about each row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tether.errors import InvalidArgumentError
from tether.generator import Message
from tether.scores import ScoredItem, ScoreItem

__all__ = ["WRITTEN", "InputRow", "OutputRow", "read_output", "read_rows", "write_row"]

FORMS: Final = (("prompt", "response"), ("messages",), ("prompt_token_ids", "response_token_ids"))
"""Keys of a row, one form of an item each."""
WRITTEN: Final = ("index", "score", "raw_score", "error", "model", "version", "row_sha256")
"""Keys that are written about a row; what a row brings along under one of these names gets RENAMED in front."""
RENAMED: Final = "input_"
DIGEST_DIGITS: Final = 16
"""Leading digits of the row's SHA-256 that are written: enough that rows which differ are told apart."""


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row to score."""

    item: ScoreItem
    """What is scored."""
    carried: Mapping[str, Any]
    """Its other keys, as they are written."""
    sha256: str
    """Leading digits of the hash of its line."""


@dataclass(frozen=True, slots=True)
class OutputRow:
    """What an earlier attempt has written about a row."""

    sha256: str
    """Of the row's line."""
    model: str
    """Name of the model; empty if none has judged the row."""
    version: str
    """Its version."""
    failed: bool
    """Whether the row could not be scored."""


def read_rows(lines: Iterable[bytes], *, name: str) -> Iterator[InputRow]:
    """Yield the rows; blank lines are none.

    Args:
        lines: Of a JSONL file.
        name: Of the file, for errors.

    Raises:
        InvalidArgumentError: MALFORMED_ROW; names the line.
    """
    for number, line in enumerate(lines, start=1):
        if not line.isspace():
            try:
                yield _read_row(line)
            except ValueError as error:
                message = f"{name}, line {number}: {error}"
                raise InvalidArgumentError(message, field=f"line {number}", reason="MALFORMED_ROW") from None


def _read_row(line: bytes) -> InputRow:
    """Return a row. ValueError if it is none; the text does not show what stands there."""
    values = _parse(line)
    present = [form for form in FORMS if any(key in values for key in form)]
    if len(present) != 1:
        which = "several forms of an item" if present else "no form of an item"
        raise ValueError(f"{which}; a row has {' or '.join(' and '.join(form) for form in FORMS)}")
    (form,) = present
    missing = [key for key in form if key not in values]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    carried = {key: value for key, value in values.items() if key not in form}
    return InputRow(_item(form, values), _renamed(carried), _digest(line))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from None
    if not isinstance(values, dict):
        raise ValueError('not an object like {"prompt": ..., "response": ...}')
    return values


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    """Return a number, unless it would be carried over as Infinity, which is no JSON."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large; write it as a text")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object none of whose keys is there twice: readers differ in which one counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.40} is there twice")
    return values


def _item(form: tuple[str, ...], values: Mapping[str, Any]) -> ScoreItem:
    if form == FORMS[0]:
        return ScoreItem(_text(values["prompt"], "prompt"), _text(values["response"], "response"))
    if form == FORMS[1]:
        return ScoreItem(messages=_messages(values["messages"]))
    prompt, response = (_token_ids(values[key], key) for key in form)
    return ScoreItem(prompt_token_ids=prompt, response_token_ids=response)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is not a text")
    return value


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError('messages is not a list like [{"role": ..., "content": ...}]')
    keys = ("role", "content")
    return [Message(*(_text(m.get(key), f"messages[{n}].{key}") for key in keys)) for n, m in enumerate(value)]


def _token_ids(value: Any, key: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError(f"{key} is not a list of whole numbers")
    return value


def _renamed(carried: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that are carried over, under names that nothing else has."""
    names = {key: f"{RENAMED}{key}" if key in WRITTEN else key for key in carried}
    twice = [key for key, name in names.items() if name != key and name in carried]
    if twice:
        raise ValueError(f"{twice[0]} would be carried over as {names[twice[0]]}, which is there as well: rename one")
    return {names[key]: value for key, value in carried.items()}


def _digest(line: bytes) -> str:
    return hashlib.sha256(line.strip()).hexdigest()[:DIGEST_DIGITS]


def write_row(row: InputRow, scored: ScoredItem) -> bytes:
    """Return the line about a row; what is not a number is null."""
    error = scored.score.error
    written = {
        "index": scored.index,
        "score": _number(scored.score.score),
        "raw_score": _number(scored.score.raw_score),
        "error": None if error is None else {"reason": error.reason, "message": error.message},
        "model": scored.model,
        "version": scored.version,
        "row_sha256": row.sha256,
    }
    return json.dumps({**row.carried, **written}).encode() + b"\n"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read_output(lines: Iterable[bytes], *, name: str) -> Iterator[OutputRow]:
    """Yield the rows of an earlier attempt.

    Raises:
        InvalidArgumentError: OUTPUT_DIFFERS: a line is none that this command writes; names it.
    """
    for number, line in enumerate(lines, start=1):
        try:
            values = _parse(line)
            digest, model, version = (_text(values.get(key), key) for key in ("row_sha256", "model", "version"))
            if values.get("index") != number - 1:
                raise ValueError(f"index is not {number - 1}")
        except ValueError as error:
            message = f"{name}, line {number} was not written by this command: {error}. Name another file"
            raise InvalidArgumentError(message, field="output", reason="OUTPUT_DIFFERS") from None
        yield OutputRow(digest, model, version, values.get("error") is not None)
