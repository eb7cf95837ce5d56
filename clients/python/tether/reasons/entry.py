"""What is known of one reason of an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import grpc

__all__ = ["PLACES", "REPEATS", "Group", "Reason", "Repeat"]

Repeat = Literal["no", "told", "later", "repaired", "reread"]

REPEATS: Final[dict[Repeat, str]] = {
    "no": "No: the same call fails again.",
    "told": "After the time in RetryInfo (`retry_after_seconds`); without it, not before what is full has room again.",
    "later": (
        "After a pause, longer each time. A call with an effect only with the same `request_id`: the effect may have"
        " happened."
    ),
    "repaired": "Once what it names has been put right.",
    "reread": "Not as it is: read the state again, decide anew.",
}
"""Whether to make the same call again, for people."""

PLACES: Final = {
    "every service": "any method of any service",
    "RewardService.Score.items": "an item of `Score`, as its own error; the call succeeds",
    "http": "the HTTP port of any service",
    "client": "the Python client itself, without an answer of a service",
    "run": "the end of a training run, which GetRun and `tether run get` show",
    "start": "the start of a service, which it refuses or notes in its log",
    "command": "a `tether` command or offline stage itself; it shows those of the services too",
}
"""Where a reason can come from, besides a service (`RewardService`) and a method (`RewardService.Compare`)."""


@dataclass(frozen=True, slots=True)
class Reason:
    """A stable word to branch on, and what to do about it. Each has one status code."""

    name: str
    """UPPER_SNAKE, at most 63 characters; what `TetherError.reason` and `ErrorInfo.reason` hold."""
    code: grpc.StatusCode
    """Status code, which fixes the class of the error."""
    meaning: str
    """What has happened, as a sentence."""
    remedy: str
    """What to do about it, as a sentence."""
    repeat: Repeat
    """Whether to make the same call again."""
    places: tuple[str, ...]
    """Who gives it: a key of `PLACES`, a service or one of its methods."""
    http_status: int = 0
    """Status over HTTP where that has one for the case; 0: the status of the code."""


@dataclass(frozen=True, slots=True)
class Group:
    """Reasons that belong together."""

    title: str
    """Heading."""
    text: str
    """What they have in common."""
    reasons: tuple[Reason, ...]
    """In the order in which one meets them."""
