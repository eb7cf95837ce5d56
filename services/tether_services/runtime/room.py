"""Who may wait: places in a bounded queue, and when to come again. No clock and no input or output."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

from tether_services.runtime.callers import ANONYMOUS, Caller
from tether_services.runtime.fair_queue import LANES

MIN_RETRY_SECONDS: Final = 0.05
MAX_RETRY_SECONDS: Final = 5.0
UNMEASURED_RETRY_SECONDS: Final = 1.0
"""Before anything was executed nobody knows how fast the queue drains."""
_MEMORY: Final = 0.8
"""Weight of what was measured before, at each new measurement."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a call has no place."""

    reason: Literal["queue_full", "caller_full"]
    """Whether the lane is full or the caller holds its share already."""
    held: int
    """Places that are held: of the lane, or by the caller."""
    limit: int
    """How many that may be."""
    excess: int
    """Places that must become free first."""


class Room:
    """Places of a queue. Each lane has `limit` of its own, so that no other caller can take those of a training run.

    A caller that holds some may hold at most `caller_share` (s) of what the others of its lane leave. So those who hold
    little find places however much others want: the first N that take all they get leave (1 - s)^N of the lane, and a
    part of (1 - s) / (1 - s + s * N) once their first items are served. Who holds none may take any free places: a
    single call is bounded by the service. Where the service is open everybody is the same caller, and there is nobody
    to protect.
    """

    def __init__(self, *, limit: int, caller_share: float) -> None:
        """Build an empty room.

        Args:
            limit: Places of each lane.
            caller_share: Part of the places left by others that one caller may hold, above 0 and at most 1.
        """
        self._limit = limit
        self._caller_share = caller_share
        self._held: dict[str, Counter[str]] = {lane: Counter() for lane in LANES}
        self._totals = dict.fromkeys(LANES, 0)

    def shortage(self, caller: Caller, count: int) -> Shortage | None:
        """Return why `count` more places cannot be given to a caller, or None if they can."""
        total, own = self._totals[caller.lane], self._held[caller.lane][caller.name]
        if own and caller.name != ANONYMOUS.name:
            bound = int(self._caller_share * (self._limit - (total - own)))
            if own + count > bound:
                return Shortage("caller_full", own, bound, own + count - bound)
        if total + count > self._limit:
            return Shortage("queue_full", total, self._limit, total + count - self._limit)
        return None

    def held(self, lane: str) -> int:
        """Return how many places of a lane are held."""
        return self._totals[lane]

    def take(self, caller: Caller, count: int) -> None:
        """Give places to a caller; `shortage` says whether there are any."""
        self._held[caller.lane][caller.name] += count
        self._totals[caller.lane] += count

    def give_back(self, caller: Caller, count: int) -> None:
        """Have places of a caller back."""
        held = self._held[caller.lane]
        held[caller.name] -= count
        self._totals[caller.lane] -= count
        if not held[caller.name]:
            del held[caller.name]


class DrainRate:
    """How fast a queue drains, from what was executed lately."""

    def __init__(self) -> None:
        self._items = 0.0
        self._seconds = 0.0

    def observe(self, *, num_items: int, seconds: float) -> None:
        """Take in that so many items were executed in so much time."""
        self._items = _MEMORY * self._items + num_items
        self._seconds = _MEMORY * self._seconds + seconds

    def seconds_until(self, num_items: int, *, share: float) -> float:
        """Return when a part `share` of the service will have executed so many items, within bounds for a retry."""
        if not self._items:
            return UNMEASURED_RETRY_SECONDS
        seconds = num_items * self._seconds / (self._items * share)
        return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
