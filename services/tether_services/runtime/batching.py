"""A token-budget dynamic batcher: gathers items of many calls into batches for an engine.

A batch closes when it would exceed `max_items` or `max_tokens`, or when its first item has waited `max_delay_seconds`.
While the engine works, the queue fills, so batches grow under load and stay small without it. Items whose caller has
gone or whose deadline has passed are dropped before the engine sees them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pydantic import Field

from tether.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError
from tether_services.runtime.metrics import QueueMetrics
from tether_services.runtime.settings import Settings

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class BatchSettings(Settings):
    """How items are gathered into batches."""

    max_items: int = Field(default=64, ge=1, le=4096)
    """Items per executed batch at most."""
    max_tokens: int = Field(default=16384, ge=1)
    """Tokens per executed batch at most, padding not counted; a single larger item runs alone."""
    max_delay_seconds: float = Field(default=0.005, ge=0, le=10)
    """How long the first item of a batch waits for company."""
    queue_limit: int = Field(default=2048, ge=1)
    """Items that may wait; more are refused with RESOURCE_EXHAUSTED."""


@dataclass(slots=True)
class _Entry(Generic[ItemT, ResultT]):
    item: ItemT
    tokens: int
    key: Hashable
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
        self._queue: deque[_Entry[ItemT, ResultT]] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin executing batches on the running event loop."""
        self._task = asyncio.create_task(self._work(), name="batcher")

    async def close(self) -> None:
        """Stop; items that wait or are being executed fail with UNAVAILABLE."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        _fail_as_draining(self._queue)
        self._queue.clear()

    async def submit_all(
        self, items: Sequence[tuple[ItemT, int]], *, key: Hashable = None, timeout_seconds: float
    ) -> list[ResultT]:
        """Return the results of (item, tokens) pairs in order. All or none are queued.

        Raises:
            ResourceExhaustedError: The queue has no room for all of them.
            DeadlineExceededError: `timeout_seconds` passed before they were executed.
            Exception: Whatever `run` returned for an item.
        """
        if len(self._queue) + len(items) > self._settings.queue_limit:
            self._metrics.rejected.labels("queue_full").inc(len(items))
            raise ResourceExhaustedError(
                f"The queue holds {len(self._queue)} of {self._settings.queue_limit} items; {len(items)} do not fit.",
                retry_after_seconds=1.0,
            )
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout_seconds
        entries = [_Entry[ItemT, ResultT](item, tokens, key, deadline, loop.create_future()) for item, tokens in items]
        self._queue.extend(entries)
        self._metrics.depth.set(len(self._queue))
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(entry.future for entry in entries)))
        finally:
            for entry in entries:
                entry.future.cancel()

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            if batch:
                await self._execute(batch)

    async def _next_batch(self) -> list[_Entry[ItemT, ResultT]]:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        opened = time.monotonic()
        while not self._is_full():
            patience = opened + self._settings.max_delay_seconds - time.monotonic()
            if patience <= 0:
                break
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), patience)
            except TimeoutError:
                break
        return self._take()

    def _is_full(self) -> bool:
        tokens = sum(entry.tokens for entry in self._queue)
        return len(self._queue) >= self._settings.max_items or tokens >= self._settings.max_tokens

    def _take(self) -> list[_Entry[ItemT, ResultT]]:
        """Remove the next batch from the queue: the oldest live item and the following ones with its key that fit."""
        batch: list[_Entry[ItemT, ResultT]] = []
        passed_over: deque[_Entry[ItemT, ResultT]] = deque()
        tokens = 0
        now = time.monotonic()
        while self._queue and len(batch) < self._settings.max_items:
            entry = self._queue.popleft()
            if self._dropped(entry, now):
                continue
            if batch and (entry.key != batch[0].key or tokens + entry.tokens > self._settings.max_tokens):
                passed_over.append(entry)
                continue
            batch.append(entry)
            tokens += entry.tokens
            self._metrics.wait.observe(now - entry.enqueued)
        self._queue.extendleft(reversed(passed_over))
        self._metrics.depth.set(len(self._queue))
        if batch:
            self._metrics.batch_items.observe(len(batch))
            self._metrics.batch_tokens.observe(tokens)
        return batch

    def _dropped(self, entry: _Entry[ItemT, ResultT], now: float) -> bool:
        if entry.future.done():
            self._metrics.rejected.labels("cancelled").inc()
            return True
        if entry.deadline <= now:
            self._metrics.rejected.labels("deadline").inc()
            entry.future.set_exception(DeadlineExceededError("The deadline passed while the item waited in the queue."))
            return True
        return False

    async def _execute(self, batch: Sequence[_Entry[ItemT, ResultT]]) -> None:
        try:
            results = await self._run([entry.item for entry in batch])
        except asyncio.CancelledError:
            _fail_as_draining(batch)
            raise
        except Exception as error:  # one failed batch must not end the worker; its callers get the error
            results = [error] * len(batch)
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)


def _fail_as_draining(entries: Iterable[_Entry[ItemT, ResultT]]) -> None:
    for entry in entries:
        if not entry.future.done():
            entry.future.set_exception(UnavailableError("The service is stopping.", reason="DRAINING"))
