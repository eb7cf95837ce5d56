"""The comments of the contract, out of a descriptor set that protoc has written with its source information."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet

_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS_OF_MESSAGE, _NESTED_OF_MESSAGE, _VALUES_OF_ENUM, _METHODS_OF_SERVICE = 2, 3, 2, 2
"""Field numbers of google/protobuf/descriptor.proto, of which the paths of comments are made."""

Path = tuple[int, ...]
Named = tuple[Path, str]


def read_comments(files: FileDescriptorSet) -> dict[str, str]:
    """Return the comments of all services, methods, messages, fields, enums and enum values by their full names."""
    comments: dict[str, str] = {}
    for file in files.file:
        texts = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for path, name in _named(file):
            if texts.get(path):
                comments[name] = tidy(texts[path])
    return comments


def tidy(comment: str) -> str:
    """Return a comment with each paragraph on one line."""
    paragraphs = "\n".join(line.strip() for line in comment.splitlines()).strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _named(file: FileDescriptorProto) -> Iterator[Named]:
    """Yield the path and the full name of everything in a file that can have a comment."""
    for index, message in enumerate(file.message_type):
        yield from _message((_MESSAGES, index), message, file.package)
    for index, enum in enumerate(file.enum_type):
        yield from _enum((_ENUMS, index), enum, file.package)
    for index, service in enumerate(file.service):
        path, name = (_SERVICES, index), f"{file.package}.{service.name}"
        yield path, name
        for place, method in enumerate(service.method):
            yield (*path, _METHODS_OF_SERVICE, place), f"{name}.{method.name}"


def _message(path: Path, message: DescriptorProto, outer: str) -> Iterator[Named]:
    name = f"{outer}.{message.name}"
    yield path, name
    for index, field in enumerate(message.field):
        yield (*path, _FIELDS_OF_MESSAGE, index), f"{name}.{field.name}"
    for index, nested in enumerate(message.nested_type):
        yield from _message((*path, _NESTED_OF_MESSAGE, index), nested, name)


def _enum(path: Path, enum: EnumDescriptorProto, outer: str) -> Iterator[Named]:
    yield path, f"{outer}.{enum.name}"
    for index, value in enumerate(enum.value):
        yield (*path, _VALUES_OF_ENUM, index), f"{outer}.{enum.name}.{value.name}"
