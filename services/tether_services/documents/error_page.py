"""The page of errors, docs/errors.md, from the error tree and the catalogue of reasons."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Final

import grpc

from tether.errors import BY_CODE, InvalidArgumentError, ResourceExhaustedError, TetherError
from tether.reasons import GROUPS, PLACES, REPEATS, Group, Reason
from tether_services.documents.connect import HTTP_STATUSES, connect_code, connect_error, http_status

_HEAD: Final = """\
<!-- Made from the code by scripts/generate_documents.sh; do not edit. -->
# Errors

Every failure of tether is one of the status codes below with a `reason`: a stable word to branch on. The `message` is
for people: it says what was wrong and the way out, and may change. `tether errors REASON` prints an entry of this page.
"""
_GRPC: Final = """\
## In gRPC

The call ends with the status code and a `google.rpc.Status` in the trailing metadata (`grpc-status-details-bin`):

| detail | where | holds |
|---|---|---|
| `google.rpc.ErrorInfo` | every error, once | `reason`; `domain` is `tether` |
| `google.rpc.BadRequest` | where fields are to blame | `field_violations`: paths such as `items[2].response`, and why |
| `google.rpc.RetryInfo` | where calling again can help | `retry_delay`: when to |

A call of `Score` succeeds when some of its items cannot be scored: these have an `error` of their own, with `code` (the
number), `reason`, `message` and `field`.
"""
_PYTHON: Final = """\
## In Python

Each code is a class of `tether.errors`, and all are `tether.TetherError`: `reason`, `message`, `violations` (each with
`field` and `description`) and `retry_after_seconds` (None where calling again does not help).

```python
import tether

try:
    result = client.score("prompt", "response")
except tether.ResourceExhaustedError as error:
    wait(error.retry_after_seconds)
except tether.InvalidArgumentError as error:
    fields = [violation.field for violation in error.violations]
```

The client repeats calls without an effect by itself while a service is away. `tether.reasons.find_reason(error.reason)`
is the entry of this page.
"""


def error_page() -> str:
    """Return the page in Markdown."""
    return "\n".join((_HEAD, _GRPC, _PYTHON, _http(), _codes(), _repeats(), *map(_group, GROUPS)))


def describe_reason(entry: Reason) -> str:
    """Return an entry as lines of text for a terminal."""
    code = entry.code
    lines = (
        f"{entry.name}  ({code.name}, HTTP {http_status(entry)}, {_class_name(code)})",
        entry.meaning,
        f"What to do: {entry.remedy}",
        f"Call again? {REPEATS[entry.repeat]}",
        f"From: {', '.join(PLACES.get(place, place) for place in entry.places)}",
    )
    return "\n".join(lines)


def _http() -> str:
    errors = (
        ResourceExhaustedError("The queue holds 2048 of 2048 items; 4 do not fit.", retry_after_seconds=1.0),
        InvalidArgumentError("0 is outside [1, 64].", field="n"),
    )
    examples = "\n\n".join(f"```\n{_response(error)}\n```" for error in errors)
    return f"""\
## As JSON over HTTP

The status of the response follows from the code (table below). The body is the error of the Connect protocol: `code`
and `message`, and in `details` the same messages as in gRPC: `value` is the encoded message in base64 without padding,
`debug` the same as JSON. Branch on `reason` of the detail whose type is `google.rpc.ErrorInfo`.

{examples}
"""


def _response(error: TetherError) -> str:
    body = json.dumps(connect_error(error), indent=2)
    return f"HTTP/1.1 {HTTP_STATUSES[error.code]}\nContent-Type: application/json\n\n{body}"


def _codes() -> str:
    rows = [
        (
            f"`{code.name}`",
            str(code.value[0]),
            f"`{_class_name(code)}`",
            f"`{connect_code(code)}`",
            str(status),
            _first_line(BY_CODE.get(code, TetherError)),
        )
        for code, status in sorted(HTTP_STATUSES.items(), key=lambda item: item[0].value[0])
        if code in BY_CODE
    ]
    table = _table(("code", "number", "class in Python", "code in JSON", "HTTP", "meaning"), rows)
    return (
        f"## Status codes\n\n{table}\nAny other code comes from a proxy or from gRPC itself and is a `TetherError`.\n"
    )


def _repeats() -> str:
    table = _table(("word", "the same call again?"), [(repeat, text) for repeat, text in REPEATS.items()])
    places = _table(("word", "who gives the reason"), [(place, text) for place, text in PLACES.items()])
    return f"## Words in the tables below\n\n{table}\n{places}"


def _group(group: Group) -> str:
    rows = [
        (
            f"`{entry.name}`<br>{entry.code.name}" + (f"<br>HTTP {entry.http_status}" if entry.http_status else ""),
            entry.meaning,
            entry.remedy,
            entry.repeat,
            ", ".join(entry.places),
        )
        for entry in group.reasons
    ]
    table = _table(("reason, code", "what it means", "what to do", "again?", "from"), rows)
    return f"## {group.title}\n\n{group.text}\n\n{table}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _class_name(code: grpc.StatusCode) -> str:
    return BY_CODE.get(code, TetherError).__name__


def _first_line(error: type[TetherError]) -> str:
    return (error.__doc__ or "").strip().splitlines()[0]
