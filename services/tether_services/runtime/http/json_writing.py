"""Writes a response message as JSON by protobuf's own mapping, with the field names of the protos.

Where the mapping leaves a choice: fields without presence are written even if they are zero, so that a score of 0 is
there to be seen; but a message with another one in its field `error` has that and no zeros beside it. A float is written
as the double of the same value, which is what gRPC clients in Python see.
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


def write_message(message: Message) -> bytes:
    """Return the message as the bytes of a JSON object."""
    return write_json(_plain(message))


def write_json(value: Any) -> bytes:
    """Return a plain value as compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _plain(message: Message) -> Any:
    descriptor = message.DESCRIPTOR
    if descriptor.full_name in OWN_FORMS:
        return message.ToJsonString()  # type: ignore[attr-defined]
    fields: Iterable[Any] = descriptor.fields
    error = descriptor.fields_by_name.get("error")
    if error is not None and error.message_type is not None and message.HasField("error"):
        fields = [field for field, _value in message.ListFields()]
    written = {}
    for field in fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            written[field.name] = _plain_list(field, value)
        elif not field.has_presence or message.HasField(field.name):
            written[field.name] = _plain_value(field, value)
    return written


def _plain_value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return _plain(value)
    if field.cpp_type in LONG_TYPES:
        return str(value)
    if field.cpp_type in REAL_TYPES:
        return value if math.isfinite(value) else _name_special(value)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        kind: Any = field.enum_type
        known = kind.values_by_number.get(value)
        return known.name if known is not None else value
    return value


def _plain_list(field: FieldDescriptor, values: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = field.message_type.fields_by_name["value"]
        return {str(key): _plain_value(inner, values[key]) for key in values}
    if _is_plain(field, values):
        return list(values)
    return [_plain_value(field, value) for value in values]


def _is_plain(field: FieldDescriptor, values: Sequence[Any]) -> bool:
    """Return whether a list can be written as it is: log-probabilities come by the 100,000."""
    if field.cpp_type in REAL_TYPES:
        return all(map(math.isfinite, values))
    return field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_STRING)


def _name_special(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
