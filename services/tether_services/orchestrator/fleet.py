"""The generators of a run: all on one policy version before any of them gets a prompt of a step.

Of several, one that does not answer or has lost its version is lagging: it gets no prompt, and is brought to the run's
version as soon as it answers again. One generator alone is called, repeated and given up as any other service.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

from tether.errors import AbortedError, FailedPreconditionError, NotFoundError, ResourceExhaustedError, TetherError
from tether.generator import Generation, GeneratorClient, GeneratorState
from tether_services.orchestrator.member import CheckState, Member
from tether_services.orchestrator.progress import note_try, unnoticed
from tether_services.orchestrator.publishing import LocalAdapter, PolicyPublisher, PushFigures
from tether_services.orchestrator.records import Attempt
from tether_services.orchestrator.remote import Services
from tether_services.orchestrator.retrying import BUDGET_SPENT, MAX_BACKOFF_SECONDS, is_missing
from tether_services.runtime.history import record
from tether_services.runtime.logging import log_event

__all__ = ["GENERATOR_LOST", "Fleet", "gather_or_cancel"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Operation = Callable[[GeneratorClient], Awaitable[Generation]]
"""Makes a Generate call that pins run and version; may be made again, with another generator."""

GENERATOR_LOST: Final = frozenset({"RUN_NOT_ACTIVE", "VERSION_NOT_LOADED"})
"""Reasons of a generator that was restarted and does not have what the run needs."""
_RESTORES = 3
"""Times a prompt brings a restarted generator back to the current version before it gives up."""
_SIGN_SECONDS = 1.0
"""Between the signs of a step that waits for generators."""
_POLL_SECONDS = 0.5
"""Between health checks of a generator that is away."""
_GRACE_SECONDS = 10.0
"""At the start, how long a generator may be left out for the others' sake only after it had this long to answer."""


def _fits(*_: object) -> None:
    """Take every generator for one that fits the run."""


class Fleet:
    """The policy version that this run has its generators serve, and who of them makes which completions.

    An async context manager; at its end nobody is looked after any more.
    """

    def __init__(
        self,
        services: Services,
        attempt: Attempt,
        *,
        laggards: Literal["wait", "leave_out"] = "wait",
        laggard_seconds: float = 900.0,
        check: CheckState = _fits,
        on_lagging: Callable[[Sequence[str]], None] = _fits,
    ) -> None:
        """Know the generators; nothing is sent yet.

        Args:
            services: Holds them.
            attempt: Whose they are to be.
            laggards: Whether a step waits for generators that lag, or is made without them.
            laggard_seconds: Longest wait.
            check: Refuses a generator that does not fit the run.
            on_lagging: Called with the addresses of those that lag, at first and at each change.
        """
        self._members = tuple(Member(ports, attempt, check) for ports in services.generators)
        self._alone = services.generators[0].generator if len(self._members) == 1 else None
        self._retries = services.retries
        self._run_id = attempt.run_id
        self._waits_for_all = laggards == "wait"
        self._patience = laggard_seconds
        self._on_lagging = on_lagging
        self._current: LocalAdapter | None = None
        self._returning: dict[Member, asyncio.Task[None]] = {}
        """What brings each lagging member back; one that has ended with an error has ended the attempt."""
        self._errors: dict[Member, TetherError] = {}
        self._none_since = 0.0
        on_lagging([])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._returning.values():
            task.cancel()
        await asyncio.gather(*self._returning.values(), return_exceptions=True)
        for member in self._members:
            await member.close()

    @property
    def policy_version(self) -> int:
        """The version that the generators must serve now."""
        return self._current.push.policy_version if self._current else 0

    @property
    def adapter_sha256(self) -> str:
        """Hash of that version's weights; empty for version 0."""
        return self._current.sha256 if self._current else ""

    @property
    def publishers(self) -> tuple[PolicyPublisher, ...]:
        """What brings adapters to each of the generators."""
        return tuple(member.publisher for member in self._members)

    @property
    def lagging(self) -> tuple[str, ...]:
        """Addresses of the generators that get no prompt now."""
        return tuple(member.target for member in self._members if member in self._returning)

    async def describe(self) -> Mapping[str, GeneratorState]:
        """Return what the generators say of themselves, by address; with leave_out only of those that answer now.

        Raises:
            TetherError: One does not fit the run, or could not be reached; the message names it.
        """
        if self._alone is not None:
            return {member.target: await member.describe() for member in self._members}
        asked = {asyncio.create_task(self._until_done(member, member.ask)): member for member in self._members}
        try:
            enough = asyncio.FIRST_EXCEPTION if self._waits_for_all else asyncio.FIRST_COMPLETED
            done, waiting = await asyncio.wait(asked, timeout=self._patience, return_when=enough)
            if waiting and done and not self._waits_for_all:
                done |= (await asyncio.wait(waiting, timeout=_GRACE_SECONDS))[0]
            states = {member.target: task.result() for task, member in asked.items() if task in done}
            if not states or (waiting and self._waits_for_all):
                raise self._gone(asked[task] for task in waiting)
            return states
        finally:
            await _cancel(asked)

    async def take_over(self, committed: LocalAdapter | None) -> None:
        """Make the generators serve the committed version of this run, see `PolicyPublisher.take_over`.

        Raises:
            TetherError: A generator refused or could not be reached; the message names it.
        """
        self._current = committed
        if self._alone is not None:
            await self._members[0].publisher.take_over(committed)
            return
        await self._have_all(lambda member: member.bring(committed))
        await self._wait_for_laggards(time.monotonic())

    async def publish(self, adapter: LocalAdapter) -> PushFigures:
        """Push the next version to all, switch all of them to it once all have proven it, and return what that took.

        Raises:
            TetherError: A generator refused or could not be reached; the message names it.
        """
        self._current = adapter
        if self._alone is not None:
            return await self._members[0].publisher.publish(adapter)
        started = time.monotonic()
        await self._have_all(lambda member: member.prepare(adapter))
        await self._wait_for_laggards(started)
        await self._have_all(lambda member: member.activate(adapter))
        await self._wait_for_laggards(started)
        figures = [member.figures for member in self._ready()]
        worst = [each.probe_mean_abs_dlogp for each in figures if each.probe_mean_abs_dlogp is not None]
        slowest = max(figures, key=lambda each: each.seconds)
        return replace(slowest, probe_mean_abs_dlogp=max(worst, default=None))

    async def generate(self, number: int, operation: Operation) -> Generation:
        """Return the completions of a prompt.

        Args:
            number: Of the prompt in its rollout; says which generator is asked first.
            operation: Makes the call, with a seed, so that the answer does not depend on who gives it.

        Raises:
            TetherError: No generator could answer; the message names the last one.
        """
        if self._alone is not None:
            return await self._generate_alone(operation)
        last = max(self._retries.max_retries, len(self._members) - 1)
        for failures in range(last + 1):
            member = await self._choose(number + failures)
            try:
                return await member.generate(operation)
            except TetherError as error:
                if not (_may_pass(error) or error.reason in GENERATOR_LOST) or failures == last:
                    raise
                if isinstance(error, ResourceExhaustedError):  # full, not away
                    if error.retry_after_seconds is None:
                        raise
                    await asyncio.sleep(self._retries.delay(failures, error))
                else:
                    self._leave_out(member, error)
        raise AssertionError("the last try returns or raises")

    async def _generate_alone(self, operation: Operation) -> Generation:
        assert self._alone is not None
        for restores in range(_RESTORES + 1):
            try:
                return await self._alone.call(operation)
            except FailedPreconditionError as error:
                if error.reason not in GENERATOR_LOST or restores == _RESTORES:
                    raise
            await self._members[0].publisher.restore()
        raise AssertionError("the last try returns or raises")

    def _ready(self) -> list[Member]:
        """Return the generators that may get a prompt."""
        return [member for member in self._members if member not in self._returning]

    async def _choose(self, number: int) -> Member:
        """Return the generator of a prompt, as soon as there is one."""
        self._raise_refusal()
        while not (ready := self._ready()):
            await self._wait_for_change(self._none_since)
        return ready[number % len(ready)]

    async def _have_all(self, act: Callable[[Member], Awaitable[None]]) -> None:
        """Do something with all that are not lagging, at the same time; who does not answer lags from now on."""

        async def try_once(member: Member) -> None:
            try:
                await act(member)
            except TetherError as error:
                if not _may_pass(error):
                    raise
                self._leave_out(member, error)

        await gather_or_cancel(try_once(member) for member in self._ready())

    async def _wait_for_laggards(self, since: float) -> None:
        """Wait until the step can go on: none lags, or, where they are left out, at least one does not."""
        self._raise_refusal()
        while self._returning and (self._waits_for_all or not self._ready()):
            await self._wait_for_change(since)

    async def _wait_for_change(self, since: float) -> None:
        """Wait until a generator has returned, or for a moment: who waits gives a sign.

        Raises:
            FailedPreconditionError: GENERATORS_AWAY: that has taken too long, counted from `since`.
            TetherError: One that returned cannot go on.
        """
        note_try()
        left = since + self._patience - time.monotonic()
        done, waiting = await asyncio.wait(
            self._returning.values(),
            timeout=min(max(left, 0.0), _SIGN_SECONDS),
            return_when=asyncio.FIRST_COMPLETED,
        )
        self._raise_refusal()
        if not done and left <= _SIGN_SECONDS:
            raise self._gone(member for member, task in self._returning.items() if task in waiting)

    def _raise_refusal(self) -> None:
        """Raise the error that keeps a generator from coming back."""
        for task in self._returning.values():
            if task.done():
                task.result()

    def _gone(self, members: Iterable[Member]) -> TetherError:
        told = "; ".join(f"{member.target}: {self._errors.get(member, 'no answer yet')}" for member in members)
        message = f"generators were not there for {self._patience:g} s (laggard_seconds): {told}"
        return FailedPreconditionError(message, reason="GENERATORS_AWAY")

    def _leave_out(self, member: Member, error: TetherError) -> None:
        """Send a generator no prompt from now on, until it is back; nothing if that is so already."""
        self._errors[member] = error
        if member in self._returning:
            return
        with unnoticed():
            self._returning[member] = asyncio.create_task(self._bring_back(member))
        if not self._ready():
            self._none_since = time.monotonic()
        self._show(member, "lagging", level=logging.WARNING, error=error.message)

    async def _bring_back(self, member: Member) -> None:
        """Bring a generator to the run's version, whichever that is by then."""
        started = time.monotonic()

        async def bring() -> LocalAdapter | None:
            adapter = self._current
            await member.bring(adapter)
            return adapter

        while await self._until_done(member, bring) is not self._current:
            pass  # another version has been made meanwhile
        del self._returning[member]
        self._show(member, "back", level=logging.INFO, seconds=round(time.monotonic() - started, 1))

    async def _until_done(self, member: Member, act: Callable[[], Awaitable[T]]) -> T:
        """Return what doing something with a generator gives, tried again until it can be done."""
        failures = 0
        while True:
            try:
                return await act()
            except TetherError as error:
                if not _may_pass(error) and error.reason != BUDGET_SPENT:
                    raise
                self._errors[member] = error
            failures = await self._pause(member, failures)

    async def _pause(self, member: Member, failures: int) -> int:
        """Wait before a generator is tried again and return the failures in a row: 0 for one that was away."""
        note_try()
        if await member.is_serving():
            await asyncio.sleep(min(2.0 ** min(failures, 10), MAX_BACKOFF_SECONDS))
            return failures + 1
        while not await member.is_serving():
            note_try()
            await asyncio.sleep(_POLL_SECONDS)
        return 0

    def _show(self, member: Member, what: str, *, level: int, **fields: object) -> None:
        log_event(log, f"generator {what}", level=level, run_id=self._run_id, generator=member.target, **fields)
        record(what, run=self._run_id, generator=member.target)
        self._on_lagging(self.lagging)


def _may_pass(error: TetherError) -> bool:
    """Return whether a generator that failed in this way may do better later, or after its restart."""
    if error.reason in ("STALE_EPOCH", BUDGET_SPENT):
        return False
    return is_missing(error) or isinstance(error, (AbortedError, NotFoundError))


async def gather_or_cancel(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Return the results in order; the first failure ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Iterable[asyncio.Future[T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
