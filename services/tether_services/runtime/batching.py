"""A token-budget dynamic batcher: gathers items of many calls into batches for an engine.

A batch closes when it would exceed `max_items` or `max_tokens`, or when its first item has waited `max_delay_seconds`.
While the engine works, the queue fills, so batches grow under load and stay small without it. Items whose caller has
gone or whose deadline has passed are dropped before the engine sees them.

The floating-point results of a model depend on what shares its batch. With `mix_calls = false` a batch is made of the
items of one call alone, so that its results are the same whatever else is in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import Field, model_validator

from tether.errors import DeadlineExceededError, InternalError, ResourceExhaustedError, UnavailableError
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
    mix_calls: bool = True
    """Whether items of several calls share a batch; false is slower, and bit-identical whatever else is in flight."""

    @model_validator(mode="after")
    def _check_choices(self) -> BatchSettings:
        """Refuse a setting that would be ignored."""
        if not self.mix_calls and "max_delay_seconds" in self.model_fields_set:
            raise ValueError("max_delay_seconds would be ignored with mix_calls = false: no batch waits for company")
        return self


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
        self._executing = False
        self._unanswered: set[asyncio.Future[ResultT]] = set()
        self._probes: list[asyncio.Future[None]] = []
        self._num_calls = 0
        self._refusal: tuple[str, str] | None = None
        """Message and reason for every call once nothing is executed any more."""
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Called at once if the worker ends by itself, which is a defect; nothing is executed any more."""

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

    async def submit_all(
        self, items: Sequence[tuple[ItemT, int]], *, key: Hashable = None, timeout_seconds: float
    ) -> list[ResultT]:
        """Return the results of (item, tokens) pairs in order. All or none are queued.

        Raises:
            ResourceExhaustedError: The queue has no room for all of them.
            DeadlineExceededError: `timeout_seconds` passed before they were executed.
            UnavailableError: The batcher has stopped: it was closed, or its worker has died (ENGINE_FAILED).
            Exception: Whatever `run` returned for an item.
        """
        self._check_working()
        if len(self._queue) + len(items) > self._settings.queue_limit:
            self._metrics.rejected.labels("queue_full").inc(len(items))
            raise ResourceExhaustedError(
                f"The queue holds {len(self._queue)} of {self._settings.queue_limit} items; {len(items)} do not fit.",
                retry_after_seconds=1.0,
            )
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout_seconds
        if not self._settings.mix_calls:
            self._num_calls += 1
            key = (key, self._num_calls)
        entries = [_Entry[ItemT, ResultT](item, tokens, key, deadline, loop.create_future()) for item, tokens in items]
        self._queue.extend(entries)
        self._unanswered.update(entry.future for entry in entries)
        self._metrics.depth.set(len(self._queue))
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(entry.future for entry in entries)))
        finally:
            for entry in entries:
                entry.future.cancel()
            self._unanswered.difference_update(entry.future for entry in entries)

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
        self._executing = True
        try:
            results = await self._run([entry.item for entry in batch])
            if len(results) != len(batch):
                raise InternalError(f"The engine gave {len(results)} results for {len(batch)} items.")
        except Exception as error:  # one failed batch must not end the worker; its callers get the error
            results = [error] * len(batch)
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)
        self._executing = False
