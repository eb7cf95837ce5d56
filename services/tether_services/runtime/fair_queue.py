"""Who is served next: start-time fair queueing by tokens, between two lanes and between the callers of each.

Every caller has a tag, the tokens served to it so far divided by its weight, and the one with the smallest tag is next.
The largest tag that was ever next is the time of the lane. A caller that begins to wait takes at least that time less a
credit: being away earns no more than that, and a newcomer is next however much the others have queued. By the credit
a call of many items of somebody who uses less than a fair share is served at once and whole, and not item by item in
turn with those who flood the queue. The two lanes share in the same way, with the shares as weights; a lane is
preferred by the credit of its next caller, which over time only changes whose turn it is within the lane.
No clock and no input or output; all of it is O(log callers) per item.

Source: Goyal, Vin and Cheng 1996, "Start-time fair queueing", algorithm SFQ, used at both levels; the credit is ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final, Generic, TypeVar

from tether_services.runtime.callers import Caller

ValueT = TypeVar("ValueT")

LANES: Final = ("training", "shared")
_IDLE_FLOWS: Final = 64
"""Callers that wait for nothing and are remembered all the same, so that forgetting is not done at every arrival."""


@dataclass(slots=True, eq=False)
class Ticket(Generic[ValueT]):
    """One waiting item."""

    value: ValueT
    """What was pushed."""
    tokens: int
    """Its cost."""
    key: Hashable
    """Items with different keys are never taken together."""
    number: int
    """Of its arrival."""
    lane: _Lane[ValueT]
    """Where it waits."""
    flow: _Flow[ValueT]
    """Whose it is."""


@dataclass(slots=True, eq=False)
class _Flow(Generic[ValueT]):
    """The waiting items of one caller, oldest first."""

    weight: float
    tag: float
    waiting: OrderedDict[int, Ticket[ValueT]] = field(default_factory=OrderedDict)
    groups: dict[Hashable, OrderedDict[int, Ticket[ValueT]]] = field(default_factory=dict)
    """The same by key, because a caller may have as many keys as items."""
    in_heap: bool = False

    def add(self, ticket: Ticket[ValueT]) -> None:
        self.waiting[ticket.number] = ticket
        self.groups.setdefault(ticket.key, OrderedDict())[ticket.number] = ticket

    def discard(self, ticket: Ticket[ValueT]) -> bool:
        """Take the ticket out; False if it was not in."""
        if self.waiting.pop(ticket.number, None) is None:
            return False
        group = self.groups[ticket.key]
        del group[ticket.number]
        if not group:
            del self.groups[ticket.key]
        return True

    def oldest(self) -> Ticket[ValueT] | None:
        return next(iter(self.waiting.values()), None)

    def oldest_of(self, key: Hashable) -> Ticket[ValueT] | None:
        group = self.groups.get(key)
        return next(iter(group.values())) if group else None


@dataclass(slots=True, eq=False)
class _Lane(Generic[ValueT]):
    """The callers that share one reserved part of the service."""

    share: float
    credit_tokens: int
    tag: float = 0.0
    time: float = 0.0
    """Largest tag of a caller that was next in this busy period."""
    size: int = 0
    tokens: int = 0
    flows: dict[str, _Flow[ValueT]] = field(default_factory=dict)
    heap: list[tuple[float, int, _Flow[ValueT]]] = field(default_factory=list)
    """(tag, number, flow) of every caller with waiting items, and of some whose items were discarded since. Of equal
    tags the caller that has waited longest is first: the number is that of the item with which it began to wait."""

    def flow_of(self, caller: Caller, *, number: int) -> _Flow[ValueT]:
        """Return the flow of a caller that begins or goes on to wait."""
        if not self.heap:
            self.flows.clear()  # a new busy period: what was served before it no longer counts
            self.time = 0.0
        earliest = self.time - self.credit_tokens
        if len(self.flows) > 2 * len(self.heap) + _IDLE_FLOWS:
            self.flows = {name: flow for name, flow in self.flows.items() if flow.in_heap or flow.tag > earliest}
        flow = self.flows.setdefault(caller.name, _Flow(caller.weight, 0.0))
        flow.weight = caller.weight
        if not flow.in_heap:
            flow.tag = max(flow.tag, earliest)
            self.enter(flow, number=number)
        return flow

    def urgency(self) -> float:
        """Return what decides between lanes, smallest first: the tag, less what the next caller has to its credit."""
        flow = self.heap[0][2]
        return self.tag - (self.time - flow.tag) / self.share

    def enter(self, flow: _Flow[ValueT], *, number: int) -> None:
        flow.in_heap = True
        heappush(self.heap, (flow.tag, number, flow))


class FairQueue(Generic[ValueT]):
    """Items of many callers, taken in fair order."""

    def __init__(self, *, training_share: float, credit_tokens: int = 0) -> None:
        """Build an empty queue.

        Args:
            training_share: Part of the tokens that the training lane gets while both lanes wait, above 0 and below 1.
            credit_tokens: Tokens, per weight, that are served ahead to a caller that has used less than its share.
        """
        self._lanes: dict[str, _Lane[ValueT]] = {
            "training": _Lane(training_share, credit_tokens),
            "shared": _Lane(1.0 - training_share, credit_tokens),
        }
        self._number = 0

    def __len__(self) -> int:
        return self._lanes["training"].size + self._lanes["shared"].size

    @property
    def tokens(self) -> int:
        """Return the tokens of everything that waits."""
        return sum(lane.tokens for lane in self._lanes.values())

    def lane_size(self, lane: str) -> int:
        """Return how many items wait in a lane."""
        return self._lanes[lane].size

    def push(self, value: ValueT, *, caller: Caller, tokens: int, key: Hashable) -> Ticket[ValueT]:
        """Put an item behind those of its caller and return its ticket.

        Raises:
            ValueError: The weight of the caller or the number of tokens is not positive.
        """
        if not (caller.weight > 0 and tokens > 0):
            raise ValueError(f"weight {caller.weight} and tokens {tokens} must be positive")
        lane = self._lanes[caller.lane]
        if not lane.size:
            self._begin(lane)
        self._number += 1
        flow = lane.flow_of(caller, number=self._number)
        ticket = Ticket(value, tokens, key, self._number, lane, flow)
        flow.add(ticket)
        lane.size += 1
        lane.tokens += tokens
        return ticket

    def discard(self, ticket: Ticket[ValueT]) -> bool:
        """Take out an item that is no longer wanted, at no cost to its caller; False if it does not wait any more."""
        if not ticket.flow.discard(ticket):
            return False
        ticket.lane.size -= 1
        ticket.lane.tokens -= ticket.tokens
        return True

    def take(
        self, *, max_items: int, max_tokens: int, drop: Callable[[Ticket[ValueT]], bool] = lambda ticket: False
    ) -> list[Ticket[ValueT]]:
        """Return the next batch in fair order; its items have one key and are no longer in the queue.

        The first item is the oldest of the caller that is next, and is taken however large it is. Then each turn goes
        to the next caller whose oldest item of the same key fits; callers without one keep their turn for the next
        batch.

        Args:
            max_items: Items at most.
            max_tokens: Tokens at most, of more than one item.
            drop: Called once for each item whose turn has come; True takes it out at no cost.
        """
        batch: list[Ticket[ValueT]] = []
        passed_over: list[tuple[_Lane[ValueT], int, _Flow[ValueT]]] = []
        left = max_tokens
        while len(batch) < max_items and (left > 0 or not batch):
            lane = min((lane for lane in self._lanes.values() if lane.heap), key=_Lane.urgency, default=None)
            if lane is None:
                break
            _, number, flow = heappop(lane.heap)
            flow.in_heap = False
            ticket = self._head(flow, batch, drop)
            if ticket is None or (batch and ticket.tokens > left):
                passed_over.append((lane, number, flow))
                continue
            self.discard(ticket)
            lane.time = max(lane.time, flow.tag)
            flow.tag += ticket.tokens / flow.weight
            lane.tag += ticket.tokens / lane.share
            left -= ticket.tokens
            batch.append(ticket)
            if flow.waiting:
                lane.enter(flow, number=number)
        for lane, number, flow in passed_over:
            if flow.waiting:
                lane.enter(flow, number=number)
        return batch

    def share_of(self, caller: Caller) -> float:
        """Return the part of the service that a caller has, or would have, among those that wait now."""
        own = self._lanes[caller.lane]
        weights = sum(flow.weight for _, _, flow in own.heap if flow is not own.flows.get(caller.name))
        shares = sum(lane.share for lane in self._lanes.values() if lane is own or lane.size)
        return caller.weight / (caller.weight + weights) * own.share / shares

    def clear(self) -> None:
        """Take everything out."""
        for lane in self._lanes.values():
            lane.size = lane.tokens = 0
            lane.tag = lane.time = 0.0
            for flow in lane.flows.values():
                flow.waiting.clear()
                flow.groups.clear()
            lane.flows.clear()
            lane.heap.clear()

    def _begin(self, lane: _Lane[ValueT]) -> None:
        """Set the tag of a lane that begins to wait: never behind one that waits already."""
        waiting = [other.tag for other in self._lanes.values() if other.size]
        if waiting:
            lane.tag = max(lane.tag, min(waiting))
        else:
            for each in self._lanes.values():
                each.tag = 0.0

    def _head(
        self, flow: _Flow[ValueT], batch: list[Ticket[ValueT]], drop: Callable[[Ticket[ValueT]], bool]
    ) -> Ticket[ValueT] | None:
        """Return the caller's item that may come next into the batch; dropped ones before it are taken out."""
        while True:
            ticket = flow.oldest_of(batch[0].key) if batch else flow.oldest()
            if ticket is None or not drop(ticket):
                return ticket
            self.discard(ticket)
