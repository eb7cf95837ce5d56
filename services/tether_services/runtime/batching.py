"""A token-budget dynamic batcher: gathers items of many calls into batches for an engine.

A batch closes when it would exceed `max_items` or `max_tokens`, or when its first item has waited `max_delay_seconds`.
While the engine works, the queue fills, so batches grow under load and stay small without it. Items whose caller has
gone or whose deadline has passed are dropped before the engine sees them.

Whose items come next is decided by `fair_queue`, who may wait at all by `room`.

The floating-point results of a model depend on what shares its batch. With `mix_calls = false` a batch is made of the
items of one call alone, so that its results are the same whatever else is in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from pydantic import Field, model_validator

from tether.errors import DeadlineExceededError, InternalError, ResourceExhaustedError, UnavailableError
from tether_services.runtime.callers import Caller, current_caller
from tether_services.runtime.fair_queue import LANES, FairQueue, Ticket
from tether_services.runtime.gathering import gather_in_order
from tether_services.runtime.metrics import QueueMetrics
from tether_services.runtime.pass_tally import tallied_passes
from tether_services.runtime.room import DrainRate, Room, Shortage
from tether_services.runtime.settings import Settings

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class BatchSettings(Settings):
    """How items are gathered into batches."""

    max_items: int = Field(default=64, ge=1, le=4096)
    """Items per executed batch at most."""
    max_tokens: int = Field(default=16384, ge=1)
    """Tokens per executed batch at most, padding not counted; a single larger item runs alone."""
    max_delay_seconds: float = Field(default=0.0, ge=0, le=10)
    """How long the first item of a batch waits for company while the engine is idle; items that come while it works
    gather anyway."""
    queue_limit: int = Field(default=2048, ge=1)
    """Items that may wait in each of the two lanes, shared and training; more are refused with RESOURCE_EXHAUSTED."""
    caller_share: float = Field(default=0.5, gt=0, le=1)
    """Part of the places left by others that one named caller may hold, so that others always find some."""
    training_share: float = Field(default=0.5, ge=0.05, le=0.95)
    """Part of the executed tokens that callers of the training lane get while both lanes wait; what they do not use
    goes to the others."""
    credit_tokens: int = Field(default=4096, ge=0)
    """Tokens, times its weight, that are served ahead to a caller that has used less than its fair share lately."""
    mix_calls: bool = True
    """Whether items of several calls share a batch; false is slower, and bit-identical whatever else is in flight."""

    @model_validator(mode="after")
    def _check_choices(self) -> BatchSettings:
        """Refuse a setting that would be ignored."""
        if not self.mix_calls and "max_delay_seconds" in self.model_fields_set:
            raise ValueError("max_delay_seconds would be ignored with mix_calls = false: no batch waits for company")
        return self


@dataclass(slots=True, eq=False)
class Place:
    """Places in the queue that a caller holds for items that do not wait yet."""

    caller: Caller
    """Who holds them."""
    count: int
    """How many."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[ItemT, ResultT]):
    item: ItemT
    caller: Caller
    deadline: float
    future: asyncio.Future[ResultT]
    enqueued: float = field(default_factory=time.monotonic)


class Batcher(Generic[ItemT, ResultT]):
    """Runs items through `run` in batches. Items with different keys never share a batch."""

    def __init__(
        self,
        run: Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT | Exception]]],
        settings: BatchSettings,
        metrics: QueueMetrics,
    ) -> None:
        """Build a batcher; `start` begins the work.

        Args:
            run: Executes one batch and returns one result or exception per item, in order.
            settings: Limits.
            metrics: Where queue and batch sizes are reported.
        """
        self._run = run
        self._settings = settings
        self._metrics = metrics
        self._queue = FairQueue[_Entry[ItemT, ResultT]](
            training_share=settings.training_share, credit_tokens=settings.credit_tokens
        )
        metrics.show_depth({lane: partial(self._queue.lane_size, lane) for lane in LANES})
        self._room = Room(limit=settings.queue_limit, caller_share=settings.caller_share)
        self._drain = DrainRate()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._executing = False
        self._unanswered: set[asyncio.Future[ResultT]] = set()
        self._probes: list[asyncio.Future[None]] = []
        self._num_calls = 0
        self._refusal: tuple[str, str] | None = None
        """Message and reason for every call once nothing is executed any more."""
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Called at once if the worker ends by itself, which is a defect; nothing is executed any more."""

    @property
    def is_half_full(self) -> bool:
        """Return whether half of the places of a lane are held."""
        return 2 * max(map(self._room.held, LANES)) > self._settings.queue_limit

    def start(self) -> None:
        """Begin executing batches on the running event loop."""
        self._task = asyncio.create_task(self._work(), name="batcher")
        self._task.add_done_callback(self._bury)

    async def close(self) -> None:
        """Stop; items that wait or are being executed fail with UNAVAILABLE."""
        self._stop("The service is stopping.", "DRAINING")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def probe(self) -> None:
        """Return when the worker has taken its turn, before anything that waits; at once while it executes a batch.

        Raises:
            UnavailableError: There is no worker any more.
        """
        self._check_working()
        if self._executing:
            return
        turn = asyncio.get_running_loop().create_future()
        self._probes.append(turn)
        self._arrived.set()
        await turn

    @contextmanager
    def reserve(self, count: int) -> Iterator[Place]:
        """Hold places of the current caller while its items are still being read; the rest is given back at the end.

        So a call without room costs no reading, and what is being read is bounded too.

        Raises:
            ResourceExhaustedError: There is no room; with the time after which to call again.
            UnavailableError: The batcher has stopped.
        """
        self._check_working()
        caller = current_caller()
        shortage = self._room.shortage(caller, count)
        if shortage is not None:
            raise self._refuse(caller, count, shortage)
        self._room.take(caller, count)
        place = Place(caller, count)
        try:
            yield place
        finally:
            self._room.give_back(caller, place.count)

    async def submit_all(
        self,
        items: Sequence[tuple[ItemT, int]],
        *,
        key: Hashable = None,
        timeout_seconds: float,
        place: Place | None = None,
    ) -> list[ResultT]:
        """Return the results of (item, tokens) pairs in order. All or none are queued.

        Args:
            items: What to execute, and its cost.
            key: Items with different keys never share a batch.
            timeout_seconds: Items that wait longer are dropped.
            place: From `reserve`, for at least so many items; None takes places now.

        Raises:
            ResourceExhaustedError: The queue has no room for all of them.
            DeadlineExceededError: `timeout_seconds` passed before they were executed.
            UnavailableError: The batcher has stopped: it was closed, or its worker has died (ENGINE_FAILED).
            Exception: Whatever `run` returned for an item.
        """
        self._check_working()
        if not self._settings.mix_calls:
            self._num_calls += 1
            key = (key, self._num_calls)
        with self.reserve(len(items)) if place is None else nullcontext(place) as held:
            tickets = self._enqueue(items, key, held, deadline=time.monotonic() + timeout_seconds)
            try:
                return await gather_in_order([ticket.value.future for ticket in tickets])
            finally:
                self._forget(tickets)

    def _enqueue(
        self, items: Sequence[tuple[ItemT, int]], key: Hashable, place: Place, *, deadline: float
    ) -> list[Ticket[_Entry[ItemT, ResultT]]]:
        """Turn places into waiting items."""
        assert len(items) <= place.count, "more items than places"
        loop, caller = asyncio.get_running_loop(), place.caller
        tickets = [
            self._queue.push(
                _Entry[ItemT, ResultT](item, caller, deadline, loop.create_future()),
                caller=caller,
                tokens=tokens,
                key=key,
            )
            for item, tokens in items
        ]
        place.count -= len(tickets)
        self._unanswered.update(ticket.value.future for ticket in tickets)
        self._arrived.set()
        return tickets

    def _forget(self, tickets: Sequence[Ticket[_Entry[ItemT, ResultT]]]) -> None:
        """Take out what still waits of a call that has ended."""
        for ticket in tickets:
            ticket.value.future.cancel()
            if self._queue.discard(ticket):
                self._count_dropped(ticket, "cancelled")
        self._unanswered.difference_update(ticket.value.future for ticket in tickets)

    def _refuse(self, caller: Caller, count: int, shortage: Shortage) -> ResourceExhaustedError:
        """Return the error of items without room, counted."""
        self._metrics.rejected.labels(shortage.reason).inc(count)
        self._metrics.count_items(caller.name, "rejected", count)
        whose = "of this caller " if shortage.reason == "caller_full" else ""
        return ResourceExhaustedError(
            f"{shortage.held} items {whose}wait and {shortage.limit} may; {count} more do not fit. "
            "Call again after the time given.",
            retry_after_seconds=self._drain.seconds_until(shortage.excess, share=self._queue.share_of(caller)),
        )

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            if batch:
                await self._execute(batch)

    def _check_working(self) -> None:
        if self._refusal is not None:
            message, reason = self._refusal
            raise UnavailableError(message, reason=reason)

    def _bury(self, task: asyncio.Task[None]) -> None:
        """Fail everything that waits for a worker that has ended by itself, and tell."""
        if self._refusal is not None:
            return
        error = asyncio.CancelledError("the worker was cancelled") if task.cancelled() else task.exception()
        self._stop("The engine has failed; the service must be restarted.", "ENGINE_FAILED")
        self.on_death(error or RuntimeError("the worker has returned"))

    def _stop(self, message: str, reason: str) -> None:
        """Refuse everything from now on, and fail what has no answer yet."""
        self._refusal = (message, reason)
        futures: list[asyncio.Future[Any]] = [*self._unanswered, *self._probes]
        for future in futures:
            if not future.done():
                future.set_exception(UnavailableError(message, reason=reason))
        self._queue.clear()
        self._probes.clear()

    async def _next_batch(self) -> list[_Entry[ItemT, ResultT]]:
        while not self._queue:
            await self._wait()
        opened = time.monotonic()
        while self._settings.mix_calls and not self._is_full():
            patience = opened + self._settings.max_delay_seconds - time.monotonic()
            if patience <= 0:
                break
            try:
                await asyncio.wait_for(self._wait(), patience)
            except TimeoutError:
                break
        return self._take()

    async def _wait(self) -> None:
        """Wait for an item or a probe; a probe is answered here."""
        self._arrived.clear()
        self._answer_probes()
        await self._arrived.wait()
        self._answer_probes()

    def _answer_probes(self) -> None:
        while self._probes:
            turn = self._probes.pop()
            if not turn.done():
                turn.set_result(None)

    def _is_full(self) -> bool:
        return len(self._queue) >= self._settings.max_items or self._queue.tokens >= self._settings.max_tokens

    def _take(self) -> list[_Entry[ItemT, ResultT]]:
        """Remove the next batch from the queue: live items of one key that fit, in fair order."""
        now = time.monotonic()
        tickets = self._queue.take(
            max_items=self._settings.max_items,
            max_tokens=self._settings.max_tokens,
            drop=lambda ticket: self._dropped(ticket, now),
        )
        for ticket in tickets:
            caller = ticket.value.caller
            self._room.give_back(caller, 1)
            self._metrics.wait.observe(now - ticket.value.enqueued)
            self._metrics.count_items(caller.name, "executed")
        if tickets:
            self._metrics.batch_items.observe(len(tickets))
            self._metrics.batch_tokens.observe(sum(ticket.tokens for ticket in tickets))
        return [ticket.value for ticket in tickets]

    def _dropped(self, ticket: Ticket[_Entry[ItemT, ResultT]], now: float) -> bool:
        entry = ticket.value
        if entry.future.done():
            self._count_dropped(ticket, "cancelled")
            return True
        if entry.deadline <= now:
            self._count_dropped(ticket, "deadline")
            entry.future.set_exception(DeadlineExceededError("The deadline passed while the item waited in the queue."))
            return True
        return False

    def _count_dropped(self, ticket: Ticket[_Entry[ItemT, ResultT]], reason: str) -> None:
        """Count an item that leaves the queue unexecuted, and free its place."""
        caller = ticket.value.caller
        self._room.give_back(caller, 1)
        self._metrics.rejected.labels(reason).inc()
        self._metrics.count_items(caller.name, "dropped")

    async def _execute(self, batch: Sequence[_Entry[ItemT, ResultT]]) -> None:
        self._executing = True
        started = time.monotonic()
        try:
            with tallied_passes() as passes:
                results = await self._run([entry.item for entry in batch])
            self._metrics.count_passes(real=passes.real_tokens, padding=passes.padding_tokens)
            if len(results) != len(batch):
                raise InternalError(f"The engine gave {len(results)} results for {len(batch)} items.")
        except Exception as error:  # one failed batch must not end the worker; its callers get the error
            results = [error] * len(batch)
        self._drain.observe(num_items=len(batch), seconds=time.monotonic() - started)
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)
        self._executing = False
