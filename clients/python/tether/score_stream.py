"""Scores any number of items with a bounded number of them in memory: whole calls in flight, answers in order."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from tether.errors import (
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    TetherError,
)
from tether.scores import ItemScore, ScoredItem, ScoreItem, failed_score, item_message
from tether.v1 import reward_pb2

if TYPE_CHECKING:
    from tether.reward import RewardClient

__all__ = ["CONCURRENCY", "OnScored", "ScoreStream", "StreamOptions", "each"]

CONCURRENCY: Final = 4
"""Calls in flight unless told otherwise: enough that the service always has the next batch."""
CALL_BYTES: Final = 512 * 1024
"""Bytes of one call at most, half of the smallest limit that a service has; a larger item goes alone."""
CALL_ITEMS: Final = 64
"""Items of one call where the service does not state its limit."""

TOO_LARGE: Final = "message larger than max"
"""What gRPC says of a message above a limit, its own or the service's; proxies use the same code for overload."""

OnScored = Callable[[int], None]
"""Called with the number of items that are done."""


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What is wanted of all calls."""

    model: str
    """Name of the model; empty: the default one."""
    version: str
    """Its version; empty: whichever is loaded."""
    one_version: bool
    """Whether all answers must come from one version."""
    concurrency: int
    """Calls in flight at most."""
    timeout_seconds: float | None
    """Deadline of each call; None: that of the client."""


@dataclass(frozen=True, slots=True)
class _Origin:
    """Who has judged."""

    model: str = ""
    version: str = ""
    model_sha256: str = ""


_Slot = reward_pb2.ScoreItem | ItemScore
"""What is sent, or the error of an item that does not fit the contract and never is."""
_Answer = tuple[ItemScore, _Origin | None]


class ScoreStream:
    """Items go in one by one, answers come out in calls: `add` while there are items, then `end`; `advance` while due.

    An async context manager. Only `add`, `end` and `is_due` may be used outside the event loop.
    """

    def __init__(self, client: RewardClient, options: StreamOptions) -> None:
        """Begin with nothing.

        Raises:
            InvalidArgumentError: `concurrency` is below 1.
        """
        if options.concurrency < 1:
            raise InvalidArgumentError(f"{options.concurrency} calls in flight; at least 1.", field="concurrency")
        self._client, self._options = client, options
        self._max_items = CALL_ITEMS
        self._gathered: list[_Slot] = []
        self._num_bytes = 0
        self._num_added = 0
        self._whole: deque[list[_Slot]] = deque()
        self._in_flight: deque[asyncio.Task[list[_Answer]]] = deque()
        self._has_ended = False
        self._num_delivered = 0
        self._origin: _Origin | None = None
        """Of the first answer."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Ask the service how many items a call may have."""
        wanted = self._options.model
        models = await self._client.list_reward_models(timeout_seconds=self._options.timeout_seconds)
        fitting = [model for model in models if (model.name == wanted if wanted else model.default_model)]
        limits = [model.max_items for model in fitting or models if model.max_items > 0]
        self._max_items = min(limits, default=CALL_ITEMS)

    def add(self, item: ScoreItem) -> None:
        """Take an item into the next call."""
        try:
            slot: _Slot = item_message(item, self._num_added)
        except InvalidArgumentError as error:
            slot = failed_score(error)
        size = 0 if isinstance(slot, ItemScore) else slot.ByteSize()
        if self._gathered and self._num_bytes + size > CALL_BYTES:
            self._close_call()
        self._gathered.append(slot)
        self._num_bytes += size
        self._num_added += 1
        if len(self._gathered) == self._max_items:
            self._close_call()

    def end(self) -> None:
        """Say that there are no further items."""
        self._has_ended = True
        if self._gathered:
            self._close_call()

    @property
    def is_due(self) -> bool:
        """Whether `advance` has something to do."""
        answered = bool(self._in_flight) and (self._has_ended or self._in_flight[0].done())
        return answered or bool(self._whole)

    async def advance(self, on_progress: OnScored | None = None) -> list[ScoredItem]:
        """Begin the calls that may begin, and return the answers of the oldest one if it is time for them.

        Raises:
            TetherError: The oldest call failed; the message ends with how many items were delivered before.
        """
        while self._whole and len(self._in_flight) < self._num_allowed:
            self._in_flight.append(asyncio.create_task(self._score(self._whole.popleft())))
        if not (self._whole or self._has_ended or self._in_flight[0].done()):
            return []
        scored = await self._take()
        if on_progress is not None:
            on_progress(self._num_delivered)
        return scored

    async def close(self) -> None:
        """Cancel the calls in flight."""
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    def _close_call(self) -> None:
        self._whole.append(self._gathered)
        self._gathered, self._num_bytes = [], 0

    @property
    def _num_allowed(self) -> int:
        """Calls that may be in flight: one until it is known which version answers, if all others must go there."""
        known = self._origin is not None or not self._options.one_version
        return self._options.concurrency if known else 1

    async def _take(self) -> list[ScoredItem]:
        try:
            answers = await self._in_flight.popleft()
            for _, origin in answers:
                self._check(origin)
        except TetherError as error:
            raise self._explain(error) from error
        return [self._place(*answer) for answer in answers]

    def _check(self, origin: _Origin | None) -> None:
        """Remember who answers first, and refuse answers of anybody else if they must be of one version."""
        self._origin = self._origin or origin
        if self._options.one_version and origin not in (None, self._origin):
            raise _changed(self._origin, f"an answer came from {_named(origin)}")

    def _place(self, score: ItemScore, origin: _Origin | None) -> ScoredItem:
        """Return an answer with its place among all."""
        index = self._num_delivered
        self._num_delivered += 1
        if score.error is not None:
            score = replace(score, error=_at(score.error, index))
        by = origin or _Origin()  # what no model has judged does not depend on who answered others before
        return ScoredItem(index, score, by.model, by.version, by.model_sha256)

    async def _score(self, slots: Sequence[_Slot]) -> list[_Answer]:
        """Return an answer for each item of a call."""
        messages = [slot for slot in slots if not isinstance(slot, ItemScore)]
        answers = iter(await self._ask(messages) if messages else ())
        return [(slot, None) if isinstance(slot, ItemScore) else next(answers) for slot in slots]

    async def _ask(self, messages: Sequence[reward_pb2.ScoreItem]) -> list[_Answer]:
        """Return an answer for each message; a call that some of them spoil is divided until it is known which."""
        pin = (self._origin if self._options.one_version else None) or _Origin(
            self._options.model, self._options.version
        )
        request = reward_pb2.ScoreRequest(items=messages, model=pin.model, version=pin.version)
        try:
            result = await self._client._score_request(request, self._options.timeout_seconds)
        except TetherError as error:
            if not _blames_items(error):
                raise
            if len(messages) == 1:
                return [(failed_score(error), None)]
            half = len(messages) // 2
            return [*await self._ask(messages[:half]), *await self._ask(messages[half:])]
        if len(result.scores) != len(messages):
            raise InternalError(f"The service answered {len(messages)} items with {len(result.scores)} scores.")
        origin = _Origin(result.model, result.version, result.model_sha256)
        return [(score, origin) for score in result.scores]

    def _explain(self, error: TetherError) -> TetherError:
        """Return the error of a call with what the caller has already got."""
        if isinstance(error, NotFoundError) and self._origin is not None and self._options.one_version:
            error = _changed(self._origin, error.message)
        message = f"{error.message} ({self._num_delivered} items were scored and delivered before)"
        return type(error)(
            message,
            reason=error.reason,
            violations=error.violations,
            retry_after_seconds=error.retry_after_seconds,
        )


def _blames_items(error: TetherError) -> bool:
    """Return whether a call failed for what is in it, so that a smaller one may do better."""
    if isinstance(error, InvalidArgumentError):
        return bool(error.violations) and all(v.field.startswith("items") for v in error.violations)
    return isinstance(error, ResourceExhaustedError) and TOO_LARGE in error.message


def _changed(origin: _Origin | None, why: str) -> FailedPreconditionError:
    begun = _named(origin)
    message = (
        f"The scores so far are those of {begun}, which is not served any more: {why.rstrip('.')}. Score the rest on"
        " its own"
    )
    return FailedPreconditionError(message, reason="MODEL_CHANGED")


def _named(origin: _Origin | None) -> str:
    return "no model" if origin is None else f"model {origin.model} version {origin.version}"


def _at(error: TetherError, index: int) -> TetherError:
    """Return the error of an item, with the item's place among all in the names of its fields."""
    fields = [re.sub(r"^items(\[\d+\])?", f"items[{index}]", violation.field) for violation in error.violations]
    violations = tuple(FieldViolation(f, v.description) for f, v in zip(fields, error.violations, strict=True))
    return type(error)(error.message, reason=error.reason, violations=violations)


async def each(items: Iterable[ScoreItem] | AsyncIterable[ScoreItem]) -> AsyncIterator[ScoreItem]:
    """Yield the items of either kind of source."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
