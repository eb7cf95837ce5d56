"""The services a run calls: every call has a deadline, bounded repeats, and an error that names the service.

There is one retry loop per call, this one: the channels repeat nothing by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from tether.adapter import AdapterClient
from tether.breaker import BREAKER_OPEN
from tether.channel import ServiceClient
from tether.credentials import CredentialOptions, Credentials
from tether.errors import ResourceExhaustedError, TetherError
from tether.generator import GeneratorClient
from tether.reference import ReferenceClient
from tether.reward import RewardClient
from tether_services.orchestrator.config import FailureConfig, GeneratorAddress, OrchestratorSettings
from tether_services.orchestrator.progress import note_try, note_work
from tether_services.orchestrator.retrying import RetryBudget, RetryPolicy, as_unavailable, may_repeat
from tether_services.runtime.history import record

__all__ = [
    "BREAKERS_FILE",
    "LAGGING_FILE",
    "SERVICE_NAMES",
    "BreakerStates",
    "GeneratorPorts",
    "Remote",
    "Services",
    "check_credentials",
    "open_services",
]

SERVICE_NAMES = ("generator", "adapter", "reward", "reference")
"""What the services are called in errors and metrics; "adapter" is the generator's admin port."""
BREAKERS_FILE = "breakers.json"
"""Holds BreakerStates in the folder of a run: its worker writes them, the service exports them."""
LAGGING_FILE = "lagging.json"
"""Holds the addresses of lagging generators in the folder of a run: its worker writes it, the service exports them."""
BreakerStates = Mapping[str, bool]
"""Whether the breaker of each service is open; of several generators, of any."""
ONE_OF_SEVERAL_RETRIES = 1
"""Repeats of a call to one of several generators: then another one is asked, and this one is looked after."""

ClientT = TypeVar("ClientT", bound=ServiceClient)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Remote(Generic[ClientT]):
    """A service, what it is called in errors, and when it is called again."""

    name: str
    """One of SERVICE_NAMES."""
    client: ClientT
    retries: RetryPolicy
    budget: RetryBudget
    """Shared with the other services."""

    async def call(self, operation: Callable[[ClientT], Awaitable[T]]) -> T:
        """Return the result of a call, repeated while the service does not answer or is full.

        While the client's breaker is open, nothing is sent and nothing is taken from the budget; the next try follows
        as soon as it closes.

        Args:
            operation: Makes the call; may be made again, also after its effect, so it must carry the same request_id.

        Raises:
            ResourceExhaustedError: RETRY_BUDGET_SPENT; the cause is the error of the last try.
            TetherError: Of the class that the service raised; the message begins with the service's name and address.
        """
        attempt = 0
        while True:
            try:
                result = await operation(self.client)
            except TetherError as caught:
                error = as_unavailable(caught)
                note_try()
            else:
                note_work()
                return result
            if not may_repeat(error) or attempt == self.retries.max_retries:
                raise self.named(error, after=attempt + 1) from error
            await self._pause(attempt, error)
            attempt += 1

    async def _pause(self, attempt: int, error: TetherError) -> None:
        """Wait before a repeat, and take it from the budget if the failed try was sent."""
        delay = self.retries.delay(attempt, error)
        if error.reason == BREAKER_OPEN and self.client.breaker is not None:
            await self.client.breaker.wait_until_closed(delay)
            return
        try:
            self.budget.spend(self.name)
        except ResourceExhaustedError as spent:
            message = f"{spent.message}; its last error: {self.named(error, after=attempt + 1).message}"
            raise ResourceExhaustedError(message, reason=spent.reason) from error
        record("repeat", service=self.name, code=error.code.name)
        await asyncio.sleep(delay)

    def named(self, error: TetherError, *, after: int = 1) -> TetherError:
        """Return the same error with the service's name and address in front."""
        tries = f" after {after} attempts" if after > 1 else ""
        message = f"{self.name} at {self.client.target}: {error.code.name}{tries}: {error.message}"
        return type(error)(
            message,
            reason=error.reason,
            violations=error.violations,
            retry_after_seconds=error.retry_after_seconds,
        )


@dataclass(frozen=True, slots=True)
class GeneratorPorts:
    """Both ports of a generator."""

    generator: Remote[GeneratorClient]
    adapter: Remote[AdapterClient]


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a run calls."""

    generators: tuple[GeneratorPorts, ...]
    """At least one."""
    reward: Remote[RewardClient]
    reference: Remote[ReferenceClient]
    budget: RetryBudget
    """Repeats of a step; whoever begins a step refills it."""
    retries: RetryPolicy
    """Of each call, except of those to one of several generators, which has ONE_OF_SEVERAL_RETRIES."""
    concurrency: int
    """Prompts in flight at the same time."""


def check_credentials(settings: OrchestratorSettings) -> None:
    """Refuse credentials with which no run could call the services.

    Raises:
        InvalidArgumentError: A file is of no use, or PLAINTEXT_TOKEN: others could read the token on the way.
    """
    generators = [each for at in settings.generator_addresses for each in (at.address, at.adapter_address)]
    for target in (*generators, settings.reward_address, settings.reference_address):
        Credentials(target, **settings.credentials.options())


@asynccontextmanager
async def open_services(
    settings: OrchestratorSettings,
    *,
    retry_budget: int = FailureConfig().retry_budget,
    on_breaker: Callable[[BreakerStates], None] = lambda states: None,
) -> AsyncIterator[Services]:
    """Yield the services at the configured addresses; their channels close at the end.

    Args:
        settings: Addresses, deadlines, repeats of a call.
        retry_budget: Repeats of all calls of a step together.
        on_breaker: Called with all states, at first and each time that the breaker of a service opens or closes.
    """
    budget = RetryBudget(retry_budget)
    policy = RetryPolicy(settings.max_retries, settings.retry_backoff_seconds)
    opening = _Opening(policy, budget, on_breaker, settings.credentials.options())
    opening.show()
    async with AsyncExitStack() as stack:
        generators = [await _open_generator(opening, stack, settings, each) for each in settings.generator_addresses]
        score_seconds = settings.score_timeout_seconds
        yield Services(
            generators=tuple(generators),
            reward=await opening.open(stack, "reward", RewardClient, settings.reward_address, score_seconds),
            reference=await opening.open(
                stack, "reference", ReferenceClient, settings.reference_address, score_seconds
            ),
            budget=budget,
            retries=opening.retries,
            concurrency=settings.concurrency,
        )


async def _open_generator(
    opening: _Opening, stack: AsyncExitStack, settings: OrchestratorSettings, at: GeneratorAddress
) -> GeneratorPorts:
    if len(settings.generator_addresses) > 1:
        retries = min(ONE_OF_SEVERAL_RETRIES, settings.max_retries)
        opening = replace(opening, retries=RetryPolicy(retries, settings.retry_backoff_seconds))
    seconds, adapter_seconds = settings.generate_timeout_seconds, settings.adapter_timeout_seconds
    return GeneratorPorts(
        await opening.open(stack, "generator", GeneratorClient, at.address, seconds),
        await opening.open(stack, "adapter", AdapterClient, at.adapter_address, adapter_seconds),
    )


@dataclass(frozen=True, slots=True)
class _Opening:
    """How the services are opened."""

    retries: RetryPolicy
    budget: RetryBudget
    on_breaker: Callable[[BreakerStates], None]
    credentials: CredentialOptions
    is_open: dict[tuple[str, str], bool] = field(default_factory=dict)
    """Breakers by name and address."""

    async def open(
        self, stack: AsyncExitStack, name: str, kind: type[ClientT], address: str, timeout_seconds: float
    ) -> Remote[ClientT]:
        """Return a service whose channel closes with the stack."""
        client = kind(address, timeout_seconds=timeout_seconds, retries=False, breaker=True, **self.credentials)
        assert client.breaker is not None, "it was asked for"
        client.breaker.on_change = partial(self._note, (name, address))
        await stack.enter_async_context(client)
        return Remote(name, client, self.retries, self.budget)

    def _note(self, key: tuple[str, str], is_open: bool) -> None:
        self.is_open[key] = is_open
        self.show()

    def show(self) -> None:
        """Tell which breakers are open."""
        opened = {name for (name, _), is_open in self.is_open.items() if is_open}
        self.on_breaker({name: name in opened for name in SERVICE_NAMES})
