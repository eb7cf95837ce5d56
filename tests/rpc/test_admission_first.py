"""A call is admitted, or refused, before its request has arrived: nobody makes a service hold bytes of strangers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.rpc.generator_serving import refusal
from tests.rpc.serving import LOCAL, Served, run, serving
from tests.rpc.token_inputs import add_token, bearing
from tether.v1 import reward_pb2
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService

REQUEST = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(prompt="a prompt", response="a response")])


async def never_sent() -> AsyncIterator[bytes]:
    """Keep a call open without its request."""
    await asyncio.Event().wait()
    yield b""


async def call_score(stack: AsyncExitStack, **changes: Any) -> tuple[Served, Any]:
    """Serve rewards until the stack ends and return them and what begins calls of Score whose request comes later."""
    given = RewardSettings.model_validate({**LOCAL, "engine": "fake", **changes})
    served = await stack.enter_async_context(serving(given, lambda registry: RewardService(given, registry)))
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(served.target))
    return served, channel.stream_unary("/tether.v1.RewardService/Score")


@pytest.mark.parametrize(
    ("timeout", "has_token", "reason"), [(20.0, False, "TOKEN_MISSING"), (None, True, "DEADLINE_MISSING")]
)
def test_a_call_is_refused_before_its_request_arrives(
    timeout: float | None, has_token: bool, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.toml"
    metadata = bearing(add_token(path))

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            _, score = await call_score(stack, tokens_file=str(path))
            call = score(never_sent(), timeout=timeout, metadata=metadata if has_token else None)
            async with asyncio.timeout(10):
                assert (await refusal(call)).reason == reason

    run(scenario())


def test_a_call_whose_request_has_not_arrived_has_a_place_until_its_deadline() -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            served, score = await call_score(stack, max_calls=1, reserved_calls=0)
            waiting = score(never_sent(), timeout=2)
            async with asyncio.timeout(10):
                while served.registry.get_sample_value("tether_reward_calls_in_flight") != 1:
                    await asyncio.sleep(0.01)
                assert (await refusal(score(never_sent(), timeout=10))).reason == "TOO_MANY_CALLS"
                assert await waiting.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                while served.registry.get_sample_value("tether_reward_calls_in_flight") != 0:
                    await asyncio.sleep(0.01)
            answer = await score(iter([REQUEST.SerializeToString()]), timeout=10)
            assert len(reward_pb2.ScoreResponse.FromString(answer).scores) == 1

    run(scenario())


def test_a_call_that_ends_without_a_request_is_the_callers_mistake() -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            _, score = await call_score(stack)
            refused = await refusal(score(iter(()), timeout=10))
            assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")

    run(scenario())
