"""I6, the rules for calls: they end in time and in a documented way, and nobody is said to be well who answers none.

As checker.py, of which this is a part: standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

__all__ = ["find_bad_calls"]

Line = Mapping[str, Any]
Of = Callable[..., Sequence[Line]]
"""Returns the lines of some kinds in order."""

DOCUMENTED_CODES: Final = frozenset(
    {
        "OK",
        "INVALID_ARGUMENT",
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "NOT_FOUND",
        "FAILED_PRECONDITION",
        "ABORTED",
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "CANCELLED",
    }
)
"""INTERNAL and UNKNOWN stand for defects: no fault of a peer, a disk or a network excuses them."""
DEADLINE_SLACK_SECONDS: Final = 1.0


def find_bad_calls(of: Of) -> Iterator[str]:
    """I6: every call ends within its deadline and a second, with a documented code; health is true."""
    ended: dict[Any, Line] = {line["call"]: line for line in of("ended")}
    for line in of("sent"):
        call = f"{line['method']} ({line['call']})"
        end = ended.get(line["call"])
        if end is None:
            yield f"{call} never ended"
            continue
        seconds = end["t"] - line["t"]
        if seconds > line["deadline_seconds"] + DEADLINE_SLACK_SECONDS:
            yield f"{call} took {seconds:.2f} s, its deadline was {line['deadline_seconds']:g} s"
        if end["code"] not in DOCUMENTED_CODES:
            yield f"{call} ended with {end['code']}"
    yield from _find_false_health(of)


def _find_false_health(of: Of) -> Iterator[str]:
    """A service that answers no call may be said to be healthy for so long, and no longer."""
    mute: dict[str, Line] = {}
    for line in of("mute", "heard", "liveness"):
        service = line["service"]
        if line["kind"] == "mute":
            mute[service] = line
        elif line["kind"] == "heard":
            mute.pop(service, None)
        elif line["healthy"] and service in mute:
            seconds, bound = line["t"] - mute[service]["t"], mute[service]["bound_seconds"]
            if seconds > bound:
                yield f"{service} was said to be healthy for {seconds:.1f} s while it answered no call ({bound:g} s)"
                del mute[service]
