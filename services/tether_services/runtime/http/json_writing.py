"""Writes a response message as JSON by protobuf's own mapping, with the field names of the protos.

Where the mapping leaves a choice: fields without presence are written even if they are zero, so that a score of 0 is
there to be seen; but a message with another one in its field `error` has that and no zeros beside it. A float is
written as the double of the same value, which is what gRPC clients in Python see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

LONG_TYPES: Final = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
"""Written as texts: JavaScript has no integers above 2^53."""
REAL_TYPES: Final = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
PLAIN_TYPES: Final = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_STRING)
"""Lists of these can be written as they are."""
OWN_FORMS: Final = ("google.protobuf.Timestamp", "google.protobuf.Duration")
"""Messages that the mapping writes as a text."""
PIECE: Final = 4096
"""Values of a list that are written in one go, in which no other thread, such as the event loop's, can run."""

Write = Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Field:
    """How one field is written; found out once, because descriptors are slow to ask."""

    name: str
    """Of the attribute and in JSON."""
    has_presence: bool
    """Whether it can be absent."""
    write: Write
    """Writes a value, or a whole list."""


def write_message(message: Message) -> bytes:
    """Return the message as the bytes of a JSON object."""
    return _write(message).encode()


def write_json(value: Any) -> bytes:
    """Return a plain value as compact JSON in UTF-8."""
    return _write_plain(value).encode()


_write_plain: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _write(message: Any) -> str:
    fields, error = _plan(message.DESCRIPTOR)
    bare = error and message.HasField("error")
    parts = []
    for field in fields:
        value = getattr(message, field.name)
        if message.HasField(field.name) if field.has_presence else value or not bare:
            parts.append(f'"{field.name}":{field.write(value)}')
    return "{" + ",".join(parts) + "}"


@cache
def _plan(descriptor: Descriptor) -> tuple[tuple[Field, ...], bool]:
    """Return the fields of a message, and whether one of them is a message called `error`."""
    fields = tuple(
        Field(field.name, field.has_presence, _list_writer(field) if field.is_repeated else _writer(field))
        for field in descriptor.fields
    )
    return fields, any(field.name == "error" and field.has_presence for field in fields)


def _writer(field: Any) -> Write:
    if field.message_type is not None:
        own = field.message_type.full_name in OWN_FORMS
        return (lambda message: _write_plain(message.ToJsonString())) if own else _write
    if field.cpp_type in LONG_TYPES:
        return lambda value: f'"{value}"'
    if field.cpp_type in REAL_TYPES:
        return _write_real
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        kind: Any = field.enum_type
        return lambda value: _write_enum(kind, value)
    return _write_plain


def _write_real(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return '"NaN"' if math.isnan(value) else '"Infinity"' if value > 0 else '"-Infinity"'


def _write_enum(kind: EnumDescriptor, value: int) -> str:
    known = kind.values_by_number.get(value)
    return str(value) if known is None else f'"{known.name}"'


def _list_writer(field: Any) -> Write:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        write = _writer(field.message_type.fields_by_name["value"])
        return lambda pairs: "{" + ",".join(f"{_write_plain(str(key))}:{write(pairs[key])}" for key in pairs) + "}"
    write = _writer(field)

    def write_list(values: Sequence[Any]) -> str:
        plain = field.cpp_type in PLAIN_TYPES or (field.cpp_type in REAL_TYPES and all(map(math.isfinite, values)))
        if plain:
            pieces = [_write_plain(list(values[start : start + PIECE]))[1:-1] for start in range(0, len(values), PIECE)]
        else:
            pieces = [write(value) for value in values]
        return "[" + ",".join(pieces) + "]"

    return write_list
