"""Calls with an effect, by request_id: a repeat gets the first answer and has no effect of its own."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from tether.errors import AbortedError, FailedPreconditionError, InvalidArgumentError, NotFoundError

__all__ = ["MAX_ANSWERS", "EffectRequest", "RequestLedger", "check_request_id"]

MAX_ANSWERS = 1024
"""Answers that are kept."""
FINAL_REFUSALS = (AbortedError, FailedPreconditionError, NotFoundError)
"""Refusals that are kept like answers. Others (no room, no engine) are not: the same call may pass later."""

ResponseT = TypeVar("ResponseT", bound=Message)


class EffectRequest(Protocol):
    """The request of a call with an effect."""

    @property
    def request_id(self) -> str:
        """Return the UUID that names the intent of the caller."""
        ...


class RequestLedger:
    """The last answers by request_id, refusals included, and the calls in progress. Lives as long as the process."""

    def __init__(self) -> None:
        self._calls: OrderedDict[str, tuple[EffectRequest, asyncio.Task[Any]]] = OrderedDict()

    async def answer(self, request: EffectRequest, act: Callable[[], Coroutine[Any, Any, ResponseT]]) -> ResponseT:
        """Return the first answer to this request; act if there is none. Goes on acting if the caller leaves.

        Raises:
            InvalidArgumentError: request_id is no UUID, or was used for something else.
            TetherError: What the first call raised.
        """
        key = f"{type(request).__name__}/{check_request_id(request.request_id)}"
        if key not in self._calls:
            task = asyncio.create_task(act())
            self._calls[key] = (request, task)
            task.add_done_callback(lambda done: self._keep(key, done))
        first, task = self._calls[key]
        if first != request:
            raise InvalidArgumentError("This request_id was used for another request.", field="request_id")
        result: ResponseT = await asyncio.shield(task)
        return result

    def _keep(self, key: str, task: asyncio.Task[Any]) -> None:
        """Keep a final answer in place of the oldest one; forget the call otherwise."""
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or (error is not None and not isinstance(error, FINAL_REFUSALS)):
            self._calls.pop(key, None)
        if len(self._calls) > MAX_ANSWERS:
            oldest = next((key for key, (_, task) in self._calls.items() if task.done()), None)
            if oldest is not None:
                del self._calls[oldest]


def check_request_id(value: str) -> str:
    """Return the UUID in its canonical form.

    Raises:
        InvalidArgumentError: It is none.
    """
    try:
        return str(uuid.UUID(value))
    except ValueError as error:
        raise InvalidArgumentError(f"{value[:80]!r} is not a UUID.", field="request_id") from error
