"""Reads a request message from JSON by protobuf's own mapping, strictly.

Protobuf's parser is not used for this: it quotes what the caller sent in its errors, it names fields in another way
than the services do, and it takes microseconds for every number. Tests compare the two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final, NoReturn

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tether.errors import InvalidArgumentError

MAX_STRUCTURE: Final = 1_000_000
"""Of these characters in one document: 64 items of 8192 token ids are half of it."""
STRUCTURE: Final = (b",", b":", b"[", b"{")
"""A document has no more values than it has of these, and each takes up to 70 bytes while it is read. Those in texts
are counted as well: to tell them apart costs a hostile document's size many times over."""
MAX_DEPTH: Final = 32
"""Objects and arrays within each other; messages have a handful."""
STRING_PATTERN: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")
NAME_PATTERN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
"""Only an unknown name that looks like a field is repeated in an error: any other may be a piece of somebody's text."""
LONG_INTEGER_PATTERN: Final = re.compile(rb"(?<![0-9])[0-9]{80}")
"""Longer than any number of a field. Python takes a time for them that grows with the square of their length."""
INTEGER_PATTERN: Final = re.compile(r"-?[0-9]{1,20}")
NUMBER_PATTERN: Final = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?")
SPECIAL_NUMBERS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How the mapping spells what JSON has no numbers for; the services decide whether a field may be one."""
MAX_DIGITS: Final = 40
MAX_FLOAT: Final = 3.4028234663852886e38

INTEGER_RANGES: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}

Read = Callable[[FieldDescriptor, Any, str], Any]


def read_message(raw: bytes, message: Message) -> None:
    """Fill an empty message from the bytes of a JSON object.

    Raises:
        InvalidArgumentError: They are not one, or not of this message; names the field as the services do, for example
            items[2].prompt_token_ids[0].
    """
    _fill(message, parse_json(raw), path="")


def parse_json(raw: bytes) -> Any:
    """Return the JSON value: valid UTF-8, no name twice in an object, no NaN, and bounded in number and depth.

    Raises:
        InvalidArgumentError: It is not JSON, or more than this reads.
    """
    if not raw:
        raise _malformed("The body is empty; send a JSON object, {} if there is nothing to say.")
    _check_size(raw)
    _check_depth(raw)
    parse_int = _read_digits if LONG_INTEGER_PATTERN.search(raw) else None  # they may be in a text
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=parse_int
        )
    except UnicodeDecodeError as error:
        raise _malformed(f"The body is not UTF-8 at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"The body is not JSON: {error.msg}, at line {error.lineno} column {error.colno}.") from None


def _check_size(raw: bytes) -> None:
    """Refuse a document that would take far more memory than its own size, before anything is built from it."""
    if sum(map(raw.count, STRUCTURE)) > MAX_STRUCTURE:
        message = f"The body has more than {MAX_STRUCTURE} of the characters , : [ and {{; send fewer items per call."
        raise InvalidArgumentError(message, reason="TOO_MANY_VALUES")


def _check_depth(raw: bytes) -> None:
    """Refuse a document that is nested more deeply than any message, before it is read.

    The parser would stop by itself at the limit of the interpreter. But whatever the garbage collector finds while it
    is that deep cannot be cleaned up either: finalizers of other calls fail there for want of a stack.
    """
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    brackets = STRING_PATTERN.sub(b"", raw).translate(None, NO_BRACKETS)
    for _ in range(MAX_DEPTH):  # each turn takes the innermost level away
        before = len(brackets)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(brackets) == before:
            break
    if b"[]" in brackets or b"{}" in brackets or len(brackets) > MAX_DEPTH:  # fewer do not match: the parser says where
        raise _malformed(f"The body is nested more than {MAX_DEPTH} deep, or its brackets do not match.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidArgumentError("An object in the body has the same name twice.", reason="DUPLICATE_FIELD")
    return found


def _read_digits(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _malformed("The body has a number of too many digits.")
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"{name} is not JSON; a field that may have that value takes it as the text {json.dumps(name)}.")


def _fill(message: Message, value: Any, *, path: str) -> None:
    if not isinstance(value, dict):
        _refuse_type("an object", path)
    fields = field_names(message.DESCRIPTOR)
    seen: set[str] = set()
    for name, inner in value.items():
        field = fields.get(name)
        if field is None:
            _refuse_unknown(name, path)
        place = f"{path}.{field.name}" if path else field.name
        if field.name in seen:
            raise InvalidArgumentError(
                f"{place} is there under both of its names.", field=place, reason="DUPLICATE_FIELD"
            )
        seen.add(field.name)
        if inner is not None:  # null is as good as absent
            _fill_field(message, field, inner, place)


def _fill_field(message: Message, field: FieldDescriptor, value: Any, path: str) -> None:
    if field.is_repeated:
        _fill_list(getattr(message, field.name), field, value, path)
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        _fill(inner, value, path=path)
    else:
        try:
            setattr(message, field.name, READERS[field.cpp_type](field, value, path))
        except UnicodeEncodeError:
            _refuse_surrogate(path)


def _fill_list(target: Any, field: FieldDescriptor, values: Any, path: str) -> None:
    if not isinstance(values, list):
        _refuse_type("a list", path)
    if field.message_type is not None:
        for index, value in enumerate(values):
            _fill(target.add(), value, path=f"{path}[{index}]")
        return
    if not _is_plain(field, values):
        values = _read_each(field, values, path)
    try:
        target.extend(values)
    except UnicodeEncodeError:
        _refuse_surrogate(path)


def _is_plain(field: FieldDescriptor, values: Sequence[Any]) -> bool:
    """Return whether a list needs no conversion, at a few nanoseconds a value: token ids are read by the 100,000."""
    kinds = set(map(type, values))
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return kinds <= {str}
    bounds = INTEGER_RANGES.get(field.cpp_type)
    if bounds is None or kinds != {int}:
        return False
    return bool(bounds[0] <= min(values) and max(values) <= bounds[1])


def _read_each(field: FieldDescriptor, values: Iterable[Any], path: str) -> list[Any]:
    read = READERS[field.cpp_type]
    return [read(field, value, f"{path}[{index}]") for index, value in enumerate(values)]


def _read_integer(field: FieldDescriptor, value: Any, path: str) -> int:
    text = isinstance(value, str) and INTEGER_PATTERN.fullmatch(value)
    if text or (isinstance(value, float) and value.is_integer()):  # 5.0 and 5e0 are integers to the mapping
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse_type("an integer", path)
    low, high = INTEGER_RANGES[field.cpp_type]
    if not low <= value <= high:
        raise InvalidArgumentError(f"{path} is outside [{low}, {high}].", field=path)
    return value


def _read_number(field: FieldDescriptor, value: Any, path: str) -> float:
    if isinstance(value, str):
        if value in SPECIAL_NUMBERS:
            return SPECIAL_NUMBERS[value]
        value = float(value) if NUMBER_PATTERN.fullmatch(value) else value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        _refuse_type("a number", path)
    limit = MAX_FLOAT if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT else 1.7976931348623157e308
    if not -limit <= value <= limit:  # also an exponent so large that it was read as infinity
        raise InvalidArgumentError(f"{path} is outside [-{limit:g}, {limit:g}].", field=path)
    return float(value)


def _read_bool(field: FieldDescriptor, value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        _refuse_type("true or false", path)
    return value


def _read_text(field: FieldDescriptor, value: Any, path: str) -> str:
    if not isinstance(value, str):
        _refuse_type("a text", path)
    return value


def _read_enum(field: FieldDescriptor, value: Any, path: str) -> int:
    """Return the number of a known value, given by name or number."""
    known: Any = field.enum_type
    if isinstance(value, str) and value in known.values_by_name:
        return int(known.values_by_name[value].number)
    if isinstance(value, int) and not isinstance(value, bool) and value in known.values_by_number:
        return value
    names = ", ".join(known.values_by_name)
    raise InvalidArgumentError(f"{path} must be one of {names}.", field=path, reason="UNKNOWN_ENUM_VALUE")


READERS: Final[Mapping[int, Read]] = {
    **dict.fromkeys(INTEGER_RANGES, _read_integer),
    FieldDescriptor.CPPTYPE_DOUBLE: _read_number,
    FieldDescriptor.CPPTYPE_FLOAT: _read_number,
    FieldDescriptor.CPPTYPE_BOOL: _read_bool,
    FieldDescriptor.CPPTYPE_STRING: _read_text,
    FieldDescriptor.CPPTYPE_ENUM: _read_enum,
}


@cache
def field_names(descriptor: Descriptor) -> Mapping[str, FieldDescriptor]:
    """Return the fields of a message under both names that the mapping accepts: token_ids and tokenIds."""
    return {name: field for field in descriptor.fields for name in (field.json_name, field.name)}


def check_readable(descriptor: Descriptor) -> None:
    """Refuse a kind of message that this reader has no rules for.

    Raises:
        NotImplementedError: It has bytes, a map, a oneof, or a message of protobuf's own.
    """
    for field in descriptor.fields:
        inner = field.message_type
        oneof = field.containing_oneof
        if (
            field.type in (FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_GROUP)
            or (oneof is not None and len(oneof.fields) > 1)
            or (inner is not None and (inner.GetOptions().map_entry or inner.full_name.startswith("google.")))
        ):
            raise NotImplementedError(f"{field.full_name} cannot be read from JSON")
        if inner is not None:
            check_readable(inner)


def _refuse_type(wanted: str, path: str) -> NoReturn:
    raise InvalidArgumentError(f"{path or 'The body'} must be {wanted}.", field=path or None, reason="WRONG_TYPE")


def _refuse_unknown(name: str, path: str) -> NoReturn:
    known = NAME_PATTERN.fullmatch(name) is not None
    place = ".".join(part for part in (path, name if known else "") if part)
    named = f'"{name}"' if known else "of such a name"
    where = f" in {path}" if path else ""
    message = f"There is no field {named}{where}; the protos and /openapi.json name those that there are."
    raise InvalidArgumentError(message, field=place or None, reason="UNKNOWN_FIELD")


def _refuse_surrogate(path: str) -> NoReturn:
    raise InvalidArgumentError(f"{path} has half a surrogate pair, which is no character.", field=path)


def _malformed(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="MALFORMED_JSON")
