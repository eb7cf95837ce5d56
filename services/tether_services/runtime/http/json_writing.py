"""Writes a response message as JSON by protobuf's own mapping, with the field names of the protos.

Where the mapping leaves a choice: fields without presence are written even if they are zero, so that a score of 0 is
there to be seen; but a message with another one in its field `error` has that and no zeros beside it. A float is
written as the double of the same value, which is what gRPC clients in Python see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

LONG_TYPES: Final = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
"""Written as texts: JavaScript has no integers above 2^53."""
REAL_TYPES: Final = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
OWN_FORMS: Final = ("google.protobuf.Timestamp", "google.protobuf.Duration")
"""Messages that the mapping writes as a text."""
PIECE: Final = 4096
"""Values of a list that are written in one go, in which no other thread, such as the event loop's, can run."""


def write_message(message: Message) -> bytes:
    """Return the message as the bytes of a JSON object."""
    return _write(message).encode()


def write_json(value: Any) -> bytes:
    """Return a plain value as compact JSON in UTF-8."""
    return _write_plain(value).encode()


def _write_plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _write(message: Message) -> str:
    descriptor = message.DESCRIPTOR
    if descriptor.full_name in OWN_FORMS:
        return _write_plain(message.ToJsonString())  # type: ignore[attr-defined]
    fields: Iterable[Any] = descriptor.fields
    error = descriptor.fields_by_name.get("error")
    if error is not None and error.message_type is not None and message.HasField("error"):
        fields = [field for field, _value in message.ListFields()]
    parts = []
    for field in fields:
        if field.is_repeated:
            parts.append(f'"{field.name}":{_write_list(field, getattr(message, field.name))}')
        elif not field.has_presence or message.HasField(field.name):
            parts.append(f'"{field.name}":{_write_value(field, getattr(message, field.name))}')
    return "{" + ",".join(parts) + "}"


def _write_value(field: FieldDescriptor, value: Any) -> str:
    if field.message_type is not None:
        return _write(value)
    if field.cpp_type in LONG_TYPES:
        value = str(value)
    elif field.cpp_type in REAL_TYPES and not math.isfinite(value):
        value = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        kind: Any = field.enum_type
        known = kind.values_by_number.get(value)
        value = known.name if known is not None else value
    return _write_plain(value)


def _write_list(field: FieldDescriptor, values: Any) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = field.message_type.fields_by_name["value"]
        pairs = (f"{_write_plain(str(key))}:{_write_value(inner, values[key])}" for key in values)
        return "{" + ",".join(pairs) + "}"
    if _is_plain(field, values):
        pieces = (_write_plain(values[start : start + PIECE])[1:-1] for start in range(0, len(values), PIECE))
    else:
        pieces = (_write_value(field, value) for value in values)
    return "[" + ",".join(pieces) + "]"


def _is_plain(field: FieldDescriptor, values: Sequence[Any]) -> bool:
    """Return whether a list can be written as it is: log-probabilities come by the 100,000."""
    if field.cpp_type in REAL_TYPES:
        return all(map(math.isfinite, values))
    return field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_STRING)
