"""Calls to services: bounded repeats from one budget, and errors that name the service and its address."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

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
from tether_services.orchestrator.remote import BREAKERS_FILE, SERVICE_NAMES, BreakerStates, Remote, open_services
from tether_services.orchestrator.retrying import MAX_BACKOFF_SECONDS, RetryBudget, RetryPolicy
from tether_services.orchestrator.run_files import RunFiles
from tether_services.orchestrator.session import show_breakers
from tether_services.orchestrator.worker_states import read_breakers


def fails_then_answers(*errors: TetherError) -> tuple[Callable[[object], Awaitable[str]], list[float]]:
    """Return an operation that raises each error once and then answers, and the times at which it was made."""
    left, made = list(errors), []

    async def operation(client: object) -> str:
        made.append(time.monotonic())
        if left:
            raise left.pop(0)
        return "answer"

    return operation, made


def call(
    operation: Callable[[object], Awaitable[str]], *, retries: int = 3, backoff: float = 0.001, budget: int = 100
) -> str:
    async def main() -> str:
        async with RewardClient("127.0.0.1:50052") as client:
            return await Remote("reward", client, RetryPolicy(retries, backoff), RetryBudget(budget)).call(operation)

    return asyncio.run(main())


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("away"),
        DeadlineExceededError("no answer, or the answer was lost"),
        ResourceExhaustedError("full", retry_after_seconds=0.001),
    ],
)
def test_a_service_that_is_away_silent_or_full_is_called_again(error: TetherError) -> None:
    operation, made = fails_then_answers(error, error)
    assert call(operation) == "answer"
    assert len(made) == 3


def test_the_repeats_of_all_calls_come_from_one_budget_and_the_error_names_who_wanted_the_next() -> None:
    budget = RetryBudget(3)

    async def main() -> None:
        async with RewardClient("127.0.0.1:50052") as client:
            policy = RetryPolicy(10, 0.001)
            for name, number in (("reward", 2), ("reference", 1)):
                operation, made = fails_then_answers(*(UnavailableError("away") for _ in range(number)))
                assert await Remote(name, client, policy, budget).call(operation) == "answer"
            operation, made = fails_then_answers(*(DeadlineExceededError("late") for _ in range(9)))
            with pytest.raises(ResourceExhaustedError, match=r"the 3 repeats .* spent.*generator.*late") as e:
                await Remote("generator", client, policy, budget).call(operation)
            assert e.value.reason == "RETRY_BUDGET_SPENT"
            assert len(made) == 1
            budget.refill()
            operation, _ = fails_then_answers(UnavailableError("away"))
            assert await Remote("reward", client, policy, budget).call(operation) == "answer"

    asyncio.run(main())


def test_while_the_breaker_is_open_nothing_is_sent_or_spent_and_the_next_try_follows_its_closing() -> None:
    async def main() -> None:
        budget = RetryBudget(3)
        async with RewardClient("127.0.0.1:1", retries=False, breaker=True) as client:
            assert client.breaker is not None
            serving = asyncio.Event()

            async def probe() -> bool:
                return serving.is_set()

            client.breaker._probe = probe  # the health of a service that the test is
            operation, made = fails_then_answers(*(UnavailableError("away") for _ in range(3)))

            async def guarded(client: RewardClient) -> str:
                assert client.breaker is not None
                return await client.breaker.call(lambda: operation(client))

            calling = asyncio.create_task(Remote("reward", client, RetryPolicy(6, 0.02), budget).call(guarded))
            while not client.breaker.is_open:
                await asyncio.sleep(0.005)
            sent = len(made)
            await asyncio.sleep(0.3)
            assert sent == len(made) == 3 and not calling.done()
            serving.set()
            assert await asyncio.wait_for(calling, 5) == "answer"
            with pytest.raises(ResourceExhaustedError):
                budget.spend("reward")

    asyncio.run(main())


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
        ResourceExhaustedError("a message of 9 MiB; calling again cannot help"),
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
            (ports,) = services.generators
            remotes = (ports.generator, ports.adapter, services.reward, services.reference)
            return [(remote.name, remote.client.target, remote.client.timeout_seconds) for remote in remotes]

    assert asyncio.run(main()) == [
        ("generator", "127.0.0.1:1", 11),
        ("adapter", "127.0.0.1:2", 13),
        ("reward", "127.0.0.1:3", 12),
        ("reference", "127.0.0.1:4", 12),
    ]


def test_a_service_that_goes_away_is_shown_as_an_open_breaker_and_its_calls_are_not_multiplied() -> None:
    settings = OrchestratorSettings(reward_address="127.0.0.1:1", max_retries=4, retry_backoff_seconds=0.01)
    seen: list[BreakerStates] = []

    async def main() -> None:
        async with open_services(settings, on_breaker=seen.append) as services:
            with pytest.raises(UnavailableError, match=r"reward at 127\.0\.0\.1:1: UNAVAILABLE after 5 attempts"):
                await services.reward.call(lambda client: client.list_reward_models())

    asyncio.run(main())
    closed = dict.fromkeys(SERVICE_NAMES, False)
    assert seen == [closed, {**closed, "reward": True}]


def test_what_a_worker_says_of_its_breakers_reaches_the_service_and_a_full_disk_stops_neither(tmp_path: Path) -> None:
    assert read_breakers(tmp_path) == {}, "an attempt that has not said anything yet"
    files = RunFiles(tmp_path)
    for states in ({"reward": True, "generator": False}, {"reward": False, "generator": False}):
        show_breakers(files, states)
        assert read_breakers(tmp_path) == states
    for damaged in ("", '{"rew', "[1]", "\x00"):
        (tmp_path / BREAKERS_FILE).write_text(damaged)
        assert read_breakers(tmp_path) == {}
    (tmp_path / "file").write_text("")
    files.directory = tmp_path / "file"  # nothing can be written below it
    show_breakers(files, {"reward": True})
