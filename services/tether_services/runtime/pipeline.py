"""What every call runs through, whichever way it came in: identity, guards, the method, metrics, typed errors."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from tether.errors import CancelledError, TetherError
from tether_services.runtime.callers import ANONYMOUS, Caller, CurrentCall, enter_call
from tether_services.runtime.errors import as_tether_error
from tether_services.runtime.limits import CallInfo, Guard
from tether_services.runtime.metrics import RequestMetrics

ResultT = TypeVar("ResultT")

Identify = Callable[[CallInfo], Caller]
"""Returns who calls, or raises UnauthenticatedError or PermissionDeniedError."""
Hold = Callable[[CallInfo, Caller], AbstractContextManager[Callable[[int], None]]]
"""Holds a caller's place while its call is in flight and gives what charges tokens, or raises
ResourceExhaustedError."""


def admit_anyone(call: CallInfo) -> Caller:
    """Return ANONYMOUS: there is no authentication."""
    return ANONYMOUS


@contextmanager
def hold_nothing(call: CallInfo, caller: Caller) -> Iterator[Callable[[int], None]]:
    """Yield what charges nobody: there are no quotas."""
    yield lambda count: None


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Admits a call, runs it and counts it. Errors leave as a TetherError; cancellation passes through."""

    guards: Sequence[Guard]
    """Checks after the identity is known and its quota is held, in order."""
    metrics: RequestMetrics
    identify: Identify = admit_anyone
    hold: Hold = hold_nothing

    async def answer(self, call: CallInfo, behaviour: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Return what the method answers; `behaviour` is begun only if the call is admitted.

        Raises:
            TetherError: Also for an unforeseen error, whose details are in the log only.
        """
        with self._counted(call), self._admitted(call):
            return await behaviour()

    async def stream(self, call: CallInfo, behaviour: Callable[[], AsyncIterator[ResultT]]) -> AsyncIterator[ResultT]:
        """Yield what the method yields; else as `answer`."""
        with self._counted(call), self._admitted(call):
            async for response in behaviour():
                yield response

    def recognise(self, call: CallInfo) -> Caller:
        """Return who calls, or refuse now as `answer` would; for a port that must read before it can answer.

        Raises:
            TetherError: It is counted; the call must not be answered as well.
        """
        try:
            return self.identify(call)
        except TetherError:
            with self._counted(call):
                raise

    @contextmanager
    def _admitted(self, call: CallInfo) -> Iterator[None]:
        caller = self.identify(call)
        with self.hold(call, caller) as charge:
            for guard in self.guards:
                guard(call)
            enter_call(CurrentCall(caller, charge))
            yield

    @contextmanager
    def _counted(self, call: CallInfo) -> Iterator[None]:
        started = time.monotonic()
        failure: TetherError | None = None
        self.metrics.in_flight.inc()
        try:
            yield
        except GeneratorExit:
            failure = CancelledError("Whoever read the stream has left it.")
            raise
        except Exception as error:
            failure = as_tether_error(error)
            if failure is error:
                raise
            raise failure from error
        except BaseException as error:  # cancellation: counted, and passed on
            failure = as_tether_error(error)
            raise
        finally:
            self.metrics.in_flight.dec()
            self.metrics.observe(call.method.rsplit("/", 1)[-1], failure, time.monotonic() - started)
