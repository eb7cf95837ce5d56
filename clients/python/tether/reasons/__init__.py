"""The catalogue of every reason that an error of tether can have: what it means, what to do, whether to call again.

    from tether.reasons import find_reason
    print(find_reason("VERSION_NOT_LOADED").remedy)

A test compares it with the source, so that no reason is given that is not here, and none is here that nobody gives.
"""

from __future__ import annotations

from typing import Final

from tether.reasons.adapters import ACTIVATION, VERIFICATION
from tether.reasons.calls import ANY_CALL, SERVING, TRANSPORT
from tether.reasons.entry import PLACES, REPEATS, Group, Reason, Repeat
from tether.reasons.http import HTTP_PORT
from tether.reasons.identity import IDENTITY
from tether.reasons.programs import PROGRAMS
from tether.reasons.reward_models import REWARD_MODELS
from tether.reasons.runs import LEDGER, TRAINING

__all__ = ["GROUPS", "PLACES", "REASONS", "REPEATS", "Group", "Reason", "Repeat", "find_reason"]

GROUPS: Final[tuple[Group, ...]] = (
    ANY_CALL,
    IDENTITY,
    SERVING,
    REWARD_MODELS,
    ACTIVATION,
    VERIFICATION,
    LEDGER,
    TRAINING,
    HTTP_PORT,
    PROGRAMS,
    TRANSPORT,
)
"""All of them, for people."""

REASONS: Final[dict[str, Reason]] = {reason.name: reason for group in GROUPS for reason in group.reasons}
"""All of them, by name."""


def find_reason(name: str) -> Reason | None:
    """Return the entry of a reason; None for one that no service of this version gives."""
    return REASONS.get(name)
