"""The services a run calls: every call has a deadline, bounded repeats, and an error that names the service."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from tether.adapter import AdapterClient
from tether.channel import ServiceClient
from tether.errors import CancelledError, ResourceExhaustedError, TetherError, UnavailableError
from tether.generator import GeneratorClient
from tether.reference import ReferenceClient
from tether.reward import RewardClient
from tether_services.orchestrator.config import OrchestratorSettings

__all__ = ["Remote", "RetryPolicy", "Services", "open_services"]

MAX_BACKOFF_SECONDS = 8.0

ClientT = TypeVar("ClientT", bound=ServiceClient)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to call a service again that is unavailable or full."""

    max_retries: int
    """Repeats after the first call."""
    backoff_seconds: float
    """Wait before the first repeat; doubles up to MAX_BACKOFF_SECONDS."""

    def delay(self, attempt: int, error: TetherError) -> float:
        """Return the seconds to wait after an attempt, counted from 0: what the service asked for, else the backoff."""
        if error.retry_after_seconds is not None:
            return min(error.retry_after_seconds, MAX_BACKOFF_SECONDS)
        # Spread over [0.5, 1]: many calls fail together and should not come back together.
        return float(min(self.backoff_seconds * 2**attempt, MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.0))


@dataclass(frozen=True, slots=True)
class Remote(Generic[ClientT]):
    """A service, what it is called in errors, and its retry policy."""

    name: str
    """"generator", "adapter", "reward" or "reference"."""
    client: ClientT
    retries: RetryPolicy

    async def call(self, operation: Callable[[ClientT], Awaitable[T]]) -> T:
        """Return the result of a call, repeated while the service is unavailable or full.

        Args:
            operation: Makes the call; may be made again, so its effects must be idempotent.

        Raises:
            TetherError: Of the class that the service raised; the message begins with the service's name and address.
        """
        attempt = 0
        while True:
            try:
                return await operation(self.client)
            except (UnavailableError, ResourceExhaustedError, CancelledError) as caught:
                error = as_unavailable(caught)
                if attempt == self.retries.max_retries:
                    raise self.named(error, after=attempt + 1) from error
                await asyncio.sleep(self.retries.delay(attempt, error))
                attempt += 1
            except TetherError as error:
                raise self.named(error) from error

    def named(self, error: TetherError, *, after: int = 1) -> TetherError:
        """Return the same error with the service's name and address in front."""
        tries = f" after {after} attempts" if after > 1 else ""
        message = f"{self.name} at {self.client.target}: {error.code.name}{tries}: {error.message}"
        return type(error)(message, reason=error.reason, violations=error.violations)


def as_unavailable(error: TetherError) -> TetherError:
    """Return the error; in place of CANCELLED, that the service is unavailable.

    Nobody here cancels a call and still waits for its answer: a service that stops ends its calls in this way. Left as
    it is, the run would seem to have been cancelled.
    """
    if not isinstance(error, CancelledError):
        return error
    return UnavailableError(f"the service ended the call: {error.message}")


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that a run calls."""

    generator: Remote[GeneratorClient]
    adapter: Remote[AdapterClient]
    reward: Remote[RewardClient]
    reference: Remote[ReferenceClient]
    concurrency: int
    """Prompts in flight at the same time."""


@asynccontextmanager
async def open_services(settings: OrchestratorSettings) -> AsyncIterator[Services]:
    """Yield the services at the configured addresses; their channels close at the end."""
    retries = RetryPolicy(settings.max_retries, settings.retry_backoff_seconds)
    async with AsyncExitStack() as stack:

        async def remote(name: str, client: ClientT) -> Remote[ClientT]:
            await stack.enter_async_context(client)
            return Remote(name, client, retries)

        score_seconds = settings.score_timeout_seconds
        yield Services(
            generator=await remote(
                "generator",
                GeneratorClient(settings.generator_address, timeout_seconds=settings.generate_timeout_seconds),
            ),
            adapter=await remote(
                "adapter", AdapterClient(settings.adapter_address, timeout_seconds=settings.adapter_timeout_seconds)
            ),
            reward=await remote("reward", RewardClient(settings.reward_address, timeout_seconds=score_seconds)),
            reference=await remote(
                "reference", ReferenceClient(settings.reference_address, timeout_seconds=score_seconds)
            ),
            concurrency=settings.concurrency,
        )
