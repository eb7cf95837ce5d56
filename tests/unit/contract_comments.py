"""The comments of the contract, read from the .proto files line by line: a second way, beside protoc's own."""

from __future__ import annotations

import re

from tests.unit.reason_scan import ROOT

_OPENS = re.compile(r"(service|message|enum|oneof) (\w+) \{")
_METHOD = re.compile(r"rpc (\w+)\(")
_FIELD = re.compile(r"(?:[\w.<>, ]+ )?(\w+) = \d+;")


def read_comments() -> dict[str, str]:
    """Return every comment by the full name of what it stands before, each paragraph on one line."""
    comments: dict[str, str] = {}
    for path in sorted((ROOT / "protos/tether/v1").glob("*.proto")):
        comments |= _of_file(path.read_text(encoding="utf-8"))
    return comments


def _of_file(text: str) -> dict[str, str]:
    comments: dict[str, str] = {}
    around: list[tuple[str, str]] = []
    pending: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("//"):
            pending.append(line.removeprefix("//").strip())
            continue
        opened, named = _OPENS.match(line), _METHOD.match(line) or _FIELD.match(line)
        found = opened.group(2) if opened else named.group(1) if named else ""
        if found and pending and not line.startswith("oneof"):
            names = (name for kind, name in around if kind != "oneof")
            comments[".".join(("tether.v1", *names, found))] = _join(pending)
        if opened and not line.endswith("}"):
            around.append((opened.group(1), opened.group(2)))
        elif line == "}":
            around.pop()
        pending = []
    return comments


def _join(lines: list[str]) -> str:
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in "\n".join(lines).split("\n\n"))
