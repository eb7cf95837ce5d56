"""The circuit breaker: opens on silence, fails at once, probes the health and closes again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest

import tether.channel
from tests.rpc.scripted_reward import ITEM, ScriptedReward, answer, fail_first
from tests.rpc.scripted_server import serving
from tether import (
    AdapterClient,
    DeadlineExceededError,
    InvalidArgumentError,
    RewardClient,
    TetherError,
    UnavailableError,
)
from tether.breaker import BREAKER_OPEN, CircuitBreaker
from tether.channel_options import channel_options
from tether.v1 import adapter_pb2, adapter_pb2_grpc

LATE = DeadlineExceededError("late")
AWAY = UnavailableError("away")


def failing(error: TetherError) -> Callable[[], Awaitable[str]]:
    async def operation() -> str:
        raise error

    return operation


async def answering() -> str:
    return "answer"


async def fail(breaker: CircuitBreaker, *errors: TetherError) -> None:
    for error in errors:
        with pytest.raises(type(error)):
            await breaker.call(failing(error))


def use(scenario: Callable[[CircuitBreaker, list[bool]], Awaitable[None]], **options: float) -> list[bool]:
    """Run a scenario with a breaker whose probes answer what the scenario puts into the list; return its changes."""
    changes: list[bool] = []

    async def main() -> None:
        answers: list[bool] = []

        async def probe() -> bool:
            return answers.pop(0) if answers else False

        breaker = CircuitBreaker(probe, probe_seconds=0.02, **options)  # type: ignore[arg-type]
        breaker.on_change = changes.append
        await asyncio.wait_for(scenario(breaker, answers), 10)
        await breaker.close()

    asyncio.run(main())
    return changes


def test_three_silent_calls_in_a_row_open_it_and_a_healthy_probe_closes_it() -> None:
    async def scenario(breaker: CircuitBreaker, answers: list[bool]) -> None:
        await fail(breaker, LATE, AWAY)
        assert not breaker.is_open
        await fail(breaker, LATE)
        assert breaker.is_open
        with pytest.raises(UnavailableError) as caught:
            await breaker.call(answering)
        assert caught.value.reason == BREAKER_OPEN
        assert not await breaker.wait_until_closed(0.1), "its probes say that the service does not serve"
        answers += [False, True]
        assert await breaker.wait_until_closed(5)
        assert await breaker.call(answering) == "answer"

    assert use(scenario) == [True, False]


@pytest.mark.parametrize("between", [None, InvalidArgumentError("bad")])
def test_any_answer_in_between_starts_the_count_again(between: TetherError | None) -> None:
    async def scenario(breaker: CircuitBreaker, answers: list[bool]) -> None:
        for _ in range(3):
            await fail(breaker, LATE, AWAY)
            with suppress(InvalidArgumentError):
                await breaker.call(failing(between) if between else answering)
        assert not breaker.is_open

    assert use(scenario) == []


def test_calls_from_before_it_opened_do_not_open_it_again_when_they_end() -> None:
    async def scenario(breaker: CircuitBreaker, answers: list[bool]) -> None:
        ended = asyncio.Event()

        async def long_call() -> str:
            await ended.wait()
            raise LATE

        calls = [asyncio.create_task(breaker.call(long_call)) for _ in range(8)]
        await asyncio.sleep(0)
        await fail(breaker, AWAY, AWAY, AWAY)
        answers.append(True)
        assert await breaker.wait_until_closed(5)
        ended.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert not breaker.is_open

    assert use(scenario) == [True, False]


def test_a_stopped_service_opens_it_and_calls_then_fail_at_once() -> None:
    servicer = ScriptedReward(fail_first(3, AWAY))

    async def main() -> None:
        async with serving(servicer.add) as target, RewardClient(target, retries=False, breaker=True) as client:
            assert client.breaker is not None
            for _ in range(3):
                with pytest.raises(UnavailableError):
                    await client.score([ITEM])
            with pytest.raises(UnavailableError, match=target) as caught:
                await client.score([ITEM])
            assert caught.value.reason == BREAKER_OPEN
            assert servicer.calls == 3, "neither gRPC nor the breaker has called again"
            # The server has no health service, and says so: it answers.
            assert await client.breaker.wait_until_closed(5)
            assert (await client.score([ITEM])).scores[0].score == 14.0

    asyncio.run(main())


def test_a_client_that_asks_for_neither_still_has_the_repeats_of_grpc() -> None:
    servicer = ScriptedReward(fail_first(2, AWAY))

    async def main() -> None:
        async with serving(servicer.add) as target, RewardClient(target) as client:
            assert (await client.score([ITEM])).scores[0].score == 14.0

    asyncio.run(main())
    assert servicer.calls == 3


HEALTHY_SERVER = """
import asyncio
from tests.rpc.serving import LOCAL, serving
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
async def main():
    settings = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
        print(served.target, flush=True)
        await asyncio.sleep(120)
asyncio.run(main())
"""


@pytest.mark.parametrize("breaker", [True, False])
def test_r5_a_frozen_service_ends_every_call_in_time_and_is_called_again_soon_after_it_goes_on(breaker: bool) -> None:
    """The deadline of R5 is 5 s, the stop 30 s; here both are an eighth of it. The control has no breaker."""
    server = subprocess.Popen([sys.executable, "-c", HEALTHY_SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None

    async def use_it(target: str) -> None:
        async with RewardClient(target, timeout_seconds=0.6, retries=False, breaker=breaker) as client:
            await client.score([ITEM], timeout_seconds=20)
            os.kill(server.pid, signal.SIGSTOP)
            frozen = time.monotonic()
            outcomes = []
            while time.monotonic() - frozen < 4:
                began = time.monotonic()
                with pytest.raises((DeadlineExceededError, UnavailableError)) as caught:
                    await client.score([ITEM])
                outcomes.append((time.monotonic() - began, caught.value.reason, time.monotonic() - frozen))
                await asyncio.sleep(0.02)
            assert max(seconds for seconds, _, _ in outcomes) < 1.6, "deadline + 1 s"
            refused = [since for _, reason, since in outcomes if reason == BREAKER_OPEN]
            os.kill(server.pid, signal.SIGCONT)
            if client.breaker is None:
                assert len(outcomes) > 4 and not refused, "without a breaker every call waits for its deadline"
                return
            assert refused[0] < 3
            assert len(outcomes) - len(refused) == 3, "all others were refused without a call"
            assert await client.breaker.wait_until_closed(5)
            assert (await client.score([ITEM], timeout_seconds=20)).scores[0].error is None

    try:
        asyncio.run(use_it(server.stdout.readline().strip()))
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.kill()
        server.communicate()


def silent_listener() -> socket.socket:
    """Return a socket that the kernel accepts connections on and nobody reads from: a process that is stopped."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


@pytest.mark.parametrize("bounded", [True, False])
def test_a_peer_that_accepts_and_is_silent_does_not_hold_a_connection_attempt(
    bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(channel_options(retries=False))
    assert options["grpc.min_reconnect_backoff_ms"] == 5000
    options["grpc.min_reconnect_backoff_ms"] = 500
    if not bounded:  # the control: gRPC's own bound is 20 s
        del options["grpc.min_reconnect_backoff_ms"]
    monkeypatch.setattr(tether.channel, "channel_options", lambda retries, replicas: list(options.items()))

    async def main() -> type[TetherError]:
        with silent_listener() as listener:
            async with RewardClient(f"127.0.0.1:{listener.getsockname()[1]}", retries=False) as client:
                with pytest.raises(TetherError) as caught:
                    await client.score([ITEM], timeout_seconds=3)
                return type(caught.value)

    assert asyncio.run(main()) is (UnavailableError if bounded else DeadlineExceededError)


def test_a_breaker_ends_with_its_client() -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        async with RewardClient("127.0.0.1:1", retries=False, breaker=True) as client:
            for _ in range(3):
                with pytest.raises(UnavailableError):
                    await client.score([ITEM])
            assert asyncio.all_tasks() - before
        assert not {task for task in asyncio.all_tasks() - before if not task.done()}

    asyncio.run(main())


class DrainingAdapters(adapter_pb2_grpc.AdapterServiceServicer):
    """Refuses every activation."""

    calls = 0

    def add(self, server: grpc.aio.Server) -> None:
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, server)

    async def ActivateAdapter(self, request: Any, context: Any) -> adapter_pb2.ActivateAdapterResponse:
        self.calls += 1
        raise UnavailableError("draining", reason="DRAINING")


@pytest.mark.parametrize(("retries", "calls"), [(True, 5), (False, 1)])
def test_f2_who_repeats_calls_himself_gets_none_of_the_clients_repeats(retries: bool, calls: int) -> None:
    servicer = DrainingAdapters()  # type: ignore[abstract]

    async def main() -> None:
        async with serving(servicer.add) as target, AdapterClient(target, retries=retries) as client:
            with pytest.raises(UnavailableError):
                await client.activate("run", 1, expected_run_id="", expected_policy_version=0, epoch=1)

    asyncio.run(main())
    assert servicer.calls == calls


def test_a_call_that_is_answered_is_not_counted() -> None:
    async def main() -> None:
        async with serving(ScriptedReward(answer).add) as target, RewardClient(target, breaker=True) as client:
            for _ in range(5):
                await client.score([ITEM])
            assert client.breaker is not None and not client.breaker.is_open

    asyncio.run(main())
