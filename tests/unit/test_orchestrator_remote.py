"""Calls to services: bounded repeats, and errors that name the service and its address."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from tether.errors import (
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    TetherError,
    UnavailableError,
)
from tether.reward import RewardClient
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.remote import MAX_BACKOFF_SECONDS, Remote, RetryPolicy, open_services


def fails_then_answers(*errors: TetherError) -> tuple[Callable[[object], Awaitable[str]], list[float]]:
    """Return an operation that raises each error once and then answers, and the times at which it was made."""
    left, made = list(errors), []

    async def operation(client: object) -> str:
        made.append(time.monotonic())
        if left:
            raise left.pop(0)
        return "answer"

    return operation, made


def call(operation: Callable[[object], Awaitable[str]], *, retries: int = 3, backoff: float = 0.001) -> str:
    async def main() -> str:
        async with RewardClient("127.0.0.1:50052") as client:
            return await Remote("reward", client, RetryPolicy(retries, backoff)).call(operation)

    return asyncio.run(main())


@pytest.mark.parametrize("kind", [UnavailableError, ResourceExhaustedError])
def test_a_service_that_is_away_or_full_is_called_again(kind: type[TetherError]) -> None:
    operation, made = fails_then_answers(kind("x"), kind("y"))
    assert call(operation) == "answer"
    assert len(made) == 3


def test_a_service_that_ends_its_calls_when_it_stops_is_away_and_the_run_is_not_cancelled() -> None:
    operation, made = fails_then_answers(CancelledError("CANCELLED"))
    assert call(operation) == "answer"
    assert len(made) == 2
    operation, _ = fails_then_answers(*(CancelledError("CANCELLED") for _ in range(9)))
    with pytest.raises(UnavailableError, match="UNAVAILABLE after 4 attempts"):
        call(operation, retries=3)


def test_repeats_are_bounded_and_the_error_names_service_address_and_count() -> None:
    operation, made = fails_then_answers(*(UnavailableError("connection refused") for _ in range(9)))
    with pytest.raises(UnavailableError) as caught:
        call(operation, retries=3)
    assert len(made) == 4
    assert caught.value.message == "reward at 127.0.0.1:50052: UNAVAILABLE after 4 attempts: connection refused"


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("bad", field="items[2]"),
        DeadlineExceededError("late"),
        FailedPreconditionError("no", reason="VERSION_NOT_LOADED"),
    ],
)
def test_other_errors_are_not_repeated_and_keep_class_reason_and_fields(error: TetherError) -> None:
    operation, made = fails_then_answers(error)
    with pytest.raises(type(error)) as caught:
        call(operation)
    assert len(made) == 1
    assert caught.value.message.startswith(f"reward at 127.0.0.1:50052: {error.code.name}: ")
    assert (caught.value.reason, caught.value.violations) == (error.reason, error.violations)


def test_the_wait_that_a_service_asks_for_is_kept() -> None:
    operation, made = fails_then_answers(ResourceExhaustedError("full", retry_after_seconds=0.2))
    assert call(operation) == "answer"
    assert made[1] - made[0] >= 0.2


def test_the_backoff_doubles_up_to_its_bound_and_is_spread() -> None:
    policy = RetryPolicy(10, 0.5)
    for attempt in range(12):
        delays = {policy.delay(attempt, UnavailableError("x")) for _ in range(50)}
        full = min(0.5 * 2**attempt, MAX_BACKOFF_SECONDS)
        assert all(full / 2 <= delay <= full for delay in delays)
        assert len(delays) > 1
    assert policy.delay(0, UnavailableError("x", retry_after_seconds=1e6)) == MAX_BACKOFF_SECONDS


def test_the_default_retries_bridge_the_restart_of_a_service() -> None:
    settings = OrchestratorSettings()
    policy = RetryPolicy(settings.max_retries, settings.retry_backoff_seconds)
    least = sum(min(policy.backoff_seconds * 2**n, MAX_BACKOFF_SECONDS) / 2 for n in range(policy.max_retries))
    assert 25 <= least <= 60


def test_services_are_opened_at_the_configured_addresses_with_their_deadlines() -> None:
    settings = OrchestratorSettings(
        generator_address="127.0.0.1:1",
        adapter_address="127.0.0.1:2",
        reward_address="127.0.0.1:3",
        reference_address="127.0.0.1:4",
        generate_timeout_seconds=11,
        score_timeout_seconds=12,
        adapter_timeout_seconds=13,
    )

    async def main() -> list[tuple[str, str, float]]:
        async with open_services(settings) as services:
            remotes = (services.generator, services.adapter, services.reward, services.reference)
            return [(remote.name, remote.client.target, remote.client.timeout_seconds) for remote in remotes]

    assert asyncio.run(main()) == [
        ("generator", "127.0.0.1:1", 11),
        ("adapter", "127.0.0.1:2", 13),
        ("reward", "127.0.0.1:3", 12),
        ("reference", "127.0.0.1:4", 12),
    ]
