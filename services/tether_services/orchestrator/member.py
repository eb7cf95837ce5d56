"""One generator of a run: what it is asked for, and how it is noticed that it does not answer any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from tether.errors import UnavailableError
from tether.generator import Generation, GeneratorClient, GeneratorState
from tether_services.orchestrator.publishing import LocalAdapter, PolicyPublisher, PushFigures
from tether_services.orchestrator.records import Attempt
from tether_services.orchestrator.remote import GeneratorPorts, Remote

__all__ = ["CheckState", "Member", "Pulse"]

LOOK_SECONDS: Final = 1.0
"""Pause between two health checks of a generator that works on a call."""
SILENT_LOOKS: Final = 5
"""Checks in a row without an answer, of up to a second each, after which a generator is taken to hang."""

CheckState = Callable[[Remote[GeneratorClient], GeneratorState], None]
"""Raises a TetherError if a generator does not fit the run."""
T = TypeVar("T")


class Pulse:
    """Ends the calls of a server that hangs: it keeps its connections and answers nothing, not even health checks.

    The deadline of a call leaves time for the work; this tells a server that works from one that does not.
    """

    def __init__(self, answers: Callable[[], Awaitable[bool]], target: str) -> None:
        """Watch nothing yet.

        Args:
            answers: Tells within about a second whether the server answers, whatever it says: one that drains goes
                on with its calls. Raises nothing.
            target: Its address, for errors.
        """
        self._answers = answers
        self._target = target
        self._calls: set[asyncio.Task[Any]] = set()
        self._ended: set[asyncio.Task[Any]] = set()
        self._watch: asyncio.Task[None] | None = None

    async def guard(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of a call.

        Raises:
            UnavailableError: The server has stopped answering; the call was ended.
        """
        task = asyncio.create_task(call)
        self._calls.add(task)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._look())
        try:
            return await task
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if task not in self._ended or (this is not None and this.cancelling()):
                raise
            message = f"{self._target}: the call was ended, as {SILENT_LOOKS} health checks had no answer"
            raise UnavailableError(message) from None
        finally:
            self._calls.discard(task)
            self._ended.discard(task)

    async def close(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _look(self) -> None:
        """Check while there are calls; end them when the server is silent."""
        silent = 0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._calls:
                return
            silent = 0 if await self._answers() else silent + 1
            if silent == SILENT_LOOKS:
                self._ended |= self._calls
                for task in self._calls:
                    task.cancel()
                return


class Member:
    """A generator of a run that has several."""

    def __init__(self, ports: GeneratorPorts, attempt: Attempt, check: CheckState) -> None:
        self.publisher = PolicyPublisher(ports.adapter, attempt)
        self.figures = PushFigures(0.0)
        """Of its last push."""
        self._generator = ports.generator
        self._check = check
        self._pulse = Pulse(ports.generator.client.answers, ports.generator.client.target)
        self._is_ours = False

    @property
    def target(self) -> str:
        """The generator's address."""
        return self._generator.client.target

    async def ask(self) -> GeneratorState:
        """Return what the generator says of itself, unless it hangs."""
        return await self._pulse.guard(self.describe())

    async def describe(self) -> GeneratorState:
        """Return what the generator says of itself, once it is known to fit the run."""
        state = await self._generator.call(lambda client: client.get_generator())
        self._check(self._generator, state)
        return state

    async def is_serving(self) -> bool:
        """Return whether the generator says that it serves."""
        return await self._generator.client.is_serving()

    async def prepare(self, adapter: LocalAdapter) -> None:
        """Have the generator load and prove an adapter."""
        self.figures = await self._pulse.guard(self.publisher.prepare(adapter))

    async def activate(self, adapter: LocalAdapter) -> None:
        """Have the generator serve an adapter, pushed anew where it has lost it since `prepare`."""
        figures, prepared = await self._pulse.guard(self.publisher.publish(adapter)), self.figures
        self.figures = figures if figures.transfer_seconds is not None else prepared.then(figures)

    async def bring(self, adapter: LocalAdapter | None) -> None:
        """Have the generator serve a version whatever it is or was; the first time, take it over for this attempt."""
        await self._pulse.guard(self._bring(adapter))

    async def _bring(self, adapter: LocalAdapter | None) -> None:
        await self.describe()
        if self._is_ours:
            self.figures = await self.publisher.publish(adapter)
        else:
            await self.publisher.take_over(adapter)
            self._is_ours = True

    async def generate(self, operation: Callable[[GeneratorClient], Awaitable[Generation]]) -> Generation:
        """Return the answer to a Generate call."""
        return await self._pulse.guard(self._generator.call(operation))

    async def close(self) -> None:
        """Stop watching the generator."""
        await self._pulse.close()
