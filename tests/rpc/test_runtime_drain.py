"""How long a service takes to stop: as long as its calls need, and no longer for anybody who only looks on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.rpc.serving import LOCAL, Served, run, serving
from tests.rpc.token_inputs import add_token
from tether.errors import InvalidArgumentError
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService

DRAIN_SECONDS = 30.0
SOON_SECONDS = 10.0
"""On a busy machine; far below DRAIN_SECONDS."""


def settings(**changes: Any) -> RewardSettings:
    given = {**LOCAL, "engine": "fake", "drain_seconds": DRAIN_SECONDS, **changes}
    return RewardSettings.model_validate(given)


async def stop_watched(served: Served, name: str) -> list[int]:
    """Watch a health name, stop the service meanwhile, and return the statuses that came."""
    async with grpc.aio.insecure_channel(served.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))  # type: ignore[attr-defined]
        seen = [int((await watch.read()).status)]
        started = time.monotonic()
        await served.runner.close()
        assert time.monotonic() - started < SOON_SECONDS
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while True:
                seen.append(int((await watch.read()).status))
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    return seen


def test_a_stream_of_health_does_not_keep_a_service_from_stopping() -> None:
    async def scenario() -> None:
        given = settings(drain_notice_seconds=0.2)
        async with serving(given, lambda registry: RewardService(given, registry)) as served:
            answer = health_pb2.HealthCheckResponse
            assert await stop_watched(served, "") == [answer.SERVING, answer.NOT_SERVING]

    run(scenario())


def test_a_stream_of_a_name_that_is_not_there_says_so_and_ends_too() -> None:
    async def scenario() -> None:
        given = settings()
        async with serving(given, lambda registry: RewardService(given, registry)) as served:
            seen = await stop_watched(served, "no.such.Service")
            assert seen == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]

    run(scenario())


def test_a_service_that_could_not_start_gives_no_notice(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path)
    path.write_text("broken", encoding="utf-8")

    async def scenario() -> None:
        given = settings(tokens_file=str(path), drain_notice_seconds=DRAIN_SECONDS)
        with pytest.raises(InvalidArgumentError):
            async with serving(given, lambda registry: RewardService(given, registry)):
                raise AssertionError("it has started")

    started = time.monotonic()
    run(scenario())
    assert time.monotonic() - started < SOON_SECONDS
