"""JSON Schemas of messages in the JSON mapping of proto3.

Names are those of the contract, 64-bit integers are texts (in requests numbers too), bytes are base64, enum values are
their names, and times are RFC 3339 texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from tether_services.documents.limits import LIMITS

Schema = dict[str, Any]
Comments = Mapping[str, str]
"""By full name."""

_INT32: Final[Schema] = {"type": "integer", "format": "int32", "minimum": -(2**31), "maximum": 2**31 - 1}
_INT64: Final[Schema] = {"type": "string", "format": "int64", "pattern": "^-?[0-9]{1,19}$"}
_SCALARS: Final[dict[int, Schema]] = {
    FieldDescriptor.TYPE_INT32: _INT32,
    FieldDescriptor.TYPE_SINT32: _INT32,
    FieldDescriptor.TYPE_SFIXED32: _INT32,
    FieldDescriptor.TYPE_FIXED32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    FieldDescriptor.TYPE_INT64: _INT64,
    FieldDescriptor.TYPE_SINT64: _INT64,
    FieldDescriptor.TYPE_SFIXED64: _INT64,
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
"""By protobuf type. Values that are not finite never occur: requests with them are refused, answers have none."""
_WELL_KNOWN: Final[dict[str, Schema]] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
}


def message_schemas(roots: Iterable[Descriptor], comments: Comments, *, is_request: bool) -> dict[str, Schema]:
    """Return the schemas of messages and of all that they hold, by name.

    Args:
        roots: Requests or responses.
        comments: Become descriptions.
        is_request: Whether limits hold and unknown fields are refused; in answers every field without presence is
            there, whatever its value.
    """
    schemas: dict[str, Schema] = {}
    waiting = [*roots]
    while waiting:
        message = waiting.pop()
        if message.name not in schemas and message.full_name not in _WELL_KNOWN:
            schemas[message.name] = _message(message, comments, is_request=is_request)
            schemas |= {enum.name: _enum(enum, comments) for enum in _enums(message)}
            waiting += _messages(message)
    return schemas


def _messages(message: Descriptor) -> Iterator[Descriptor]:
    """Yield the messages that the fields of a message hold."""
    for field in message.fields:
        held = _map_value(field) or field
        if held.message_type is not None:
            yield held.message_type


def _enums(message: Descriptor) -> Iterator[EnumDescriptor]:
    for field in message.fields:
        if field.enum_type is not None:
            yield field.enum_type


def _message(message: Descriptor, comments: Comments, *, is_request: bool) -> Schema:
    fields = {field.name: _field(field, comments, is_request=is_request) for field in message.fields}
    schema: Schema = {"type": "object", **_description(message.full_name, comments)}
    if not is_request:
        return schema | {"properties": fields, "required": always_there(message)}
    limits = LIMITS.get(message.name, {})
    for name in fields.keys() - set(limits.get("required", ())):
        fields[name] = or_null(fields[name])
    return schema | {"properties": fields, "additionalProperties": False} | limits


def or_null(schema: Schema) -> Schema:
    """Return a schema that null fits too, which the JSON form of protobuf takes for an absent field."""
    kinds = schema.get("type")
    if kinds is None:
        described = {key: value for key, value in schema.items() if key == "description"}
        return described | {"anyOf": [{"$ref": schema["$ref"]}, {"type": "null"}]}
    return schema | {"type": [*([kinds] if isinstance(kinds, str) else kinds), "null"]}


def always_there(message: Descriptor) -> list[str]:
    """Return the fields that an answer always has: none where an error may be there in their place."""
    error = message.fields_by_name.get("error")
    if error is not None and error.message_type is not None:
        return []
    return [field.name for field in message.fields if field.is_repeated or not field.has_presence]


def _field(field: FieldDescriptor, comments: Comments, *, is_request: bool) -> Schema:
    described = _description(field.full_name, comments)
    limits = LIMITS.get(field.full_name.removeprefix("tether.v1."), {}) if is_request else {}
    if is_request and field.cpp_type == FieldDescriptor.CPPTYPE_INT64:
        limits = {"type": ["integer", "string"], **limits}
    value = _map_value(field)
    if value is not None:
        return {"type": "object", **described, "additionalProperties": _value(value)}
    if not field.is_repeated:
        return _value(field) | described | limits
    items = _value(field) | limits.get("items", {})
    return {"type": "array", **described} | limits | {"items": items}


def _value(field: FieldDescriptor) -> Schema:
    """Return the schema of one value of a field."""
    if field.message_type is not None:
        known = _WELL_KNOWN.get(field.message_type.full_name)
        return dict(known) if known else reference(field.message_type.name)
    if field.enum_type is not None:
        return reference(field.enum_type.name)
    return dict(_SCALARS[field.type])


def _enum(enum: EnumDescriptor, comments: Comments) -> Schema:
    """Return the names of an enum; what each means is in the description."""
    lines = [comments.get(enum.full_name, ""), ""]
    for value in enum.values:
        text = comments.get(f"{enum.full_name}.{value.name}", "")
        lines.append(f"- `{value.name}`: {text}")
    return {"type": "string", "description": "\n".join(lines).strip(), "enum": [value.name for value in enum.values]}


def reference(name: str) -> Schema:
    """Return a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _description(name: str, comments: Comments) -> Schema:
    return {"description": comments[name]} if name in comments else {}


def _map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """Return the field that the values of a map are; None for what is no map."""
    entry = field.message_type
    return entry.fields_by_name["value"] if entry is not None and entry.GetOptions().map_entry else None
