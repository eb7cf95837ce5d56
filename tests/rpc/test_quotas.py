"""Quotas over a real channel: refused before any work, with the time to wait; tokens charged by every service."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.rpc.generator_serving import generate_request, refusal, serve_generator
from tests.rpc.generator_serving import settings as generator_settings
from tests.rpc.serving import LOCAL, Served, run, serving
from tests.rpc.token_inputs import add_token, bearing
from tether.v1 import generator_pb2_grpc, reference_pb2, reference_pb2_grpc, reward_pb2, reward_pb2_grpc
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService
from tether_services.reward import scoring
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService


def score_request(num_items: int = 1) -> reward_pb2.ScoreRequest:
    items = [reward_pb2.ScoreItem(prompt="a prompt", response="a response")] * num_items
    return reward_pb2.ScoreRequest(items=items)


async def serve_reward(stack: AsyncExitStack, path: Path, **changes: Any) -> tuple[Served, Any]:
    """Serve rewards until the stack ends and return the service and a stub."""
    given = RewardSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", "tokens_file": str(path), **changes}
    )
    served = await stack.enter_async_context(serving(given, lambda registry: RewardService(given, registry)))
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(served.target))
    return served, reward_pb2_grpc.RewardServiceStub(channel)


def test_requests_beyond_the_quota_are_told_when_to_call_again(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path, requests_per_second=1.0)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            served, stub = await serve_reward(stack, path)
            options: dict[str, Any] = {"timeout": 5, "metadata": bearing(token)}
            async with asyncio.timeout(20):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while True:
                        await stub.Score(score_request(), **options)
            refused = await refusal(stub.Score(score_request(), **options))
            assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_REQUESTS")
            assert refused.retry_after_seconds is not None and 0 < refused.retry_after_seconds <= 1
            await asyncio.sleep(refused.retry_after_seconds)
            await stub.Score(score_request(), **options)
            labels = {"caller": "team-a", "reason": "QUOTA_REQUESTS"}
            assert served.value("tether_reward_refused_calls_total", **labels) == 2

    run(scenario())


def test_an_overdrawn_caller_is_refused_before_anything_is_read_or_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens.toml"
    token, other = add_token(path, tokens_per_second=50.0), add_token(path, name="team-b")
    prepared: list[int] = []
    read_and_prepare = scoring.read_and_prepare

    def counting(reader: Any, read: Any, identity: bytes) -> Any:
        inputs, items = read_and_prepare(reader, read, identity)
        prepared.append(len(items))
        return inputs, items

    monkeypatch.setattr(scoring, "read_and_prepare", counting)

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            served, stub = await serve_reward(stack, path)
            answer = await stub.Score(score_request(16), timeout=5, metadata=bearing(token))
            spent = sum(score.token_count for score in answer.scores)
            assert spent > 100 and served.value("tether_reward_caller_tokens_total", caller="team-a") == spent
            refused = await refusal(stub.Score(score_request(), timeout=5, metadata=bearing(token)))
            assert refused.reason == "QUOTA_TOKENS" and refused.retry_after_seconds is not None
            assert 0 < refused.retry_after_seconds <= (spent - 50) / 50
            assert prepared == [16]
            await stub.Score(score_request(), timeout=5, metadata=bearing(other))

    run(scenario())


def test_the_reference_service_and_the_generator_charge_what_they_compute(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path, scopes=["generate", "reference"])
    reference = ReferenceSettings.model_validate({**LOCAL, "engine": "fake", "tokens_file": str(path)})
    options: dict[str, Any] = {"timeout": 5, "metadata": bearing(token)}

    async def scenario() -> tuple[float, float]:
        async with (
            serving(reference, lambda registry: ReferenceService(reference, registry)) as served,
            grpc.aio.insecure_channel(served.target) as channel,
            serve_generator(generator_settings(tokens_file=str(path))) as generator,
        ):
            item = reference_pb2.LogprobItem(prompt_token_ids=[1, 2, 3], response_token_ids=[4, 5])
            request = reference_pb2.ComputeLogprobsRequest(items=[item] * 3)
            await reference_pb2_grpc.ReferenceServiceStub(channel).ComputeLogprobs(request, **options)
            asked = generate_request((1, 40, 50), n=2, max_tokens=8, ignore_eos=True)
            await generator.generator.Generate(asked, **options)
            return (
                served.value("tether_reference_caller_tokens_total", caller="team-a"),
                generator.served.value("tether_generator_caller_tokens_total", caller="team-a"),
            )

    assert run(scenario()) == (3 * 5, 3 + 2 * 8)


def test_calls_in_flight_are_bounded_for_a_caller_and_for_all_but_training_runs(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    names: dict[str, dict[str, Any]] = {"narrow": {"max_concurrency": 1}, "wide": {}, "run": {"lane": "training"}}
    tokens = {name: add_token(path, name=name, scopes=["generate"], **limits) for name, limits in names.items()}
    given = generator_settings(
        tokens_file=str(path), max_calls=3, reserved_calls=1, fake_token_seconds=10, drain_seconds=0
    )

    async def scenario() -> None:
        async with serve_generator(given) as generator, grpc.aio.insecure_channel(generator.served.target) as channel:
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)

            async def in_flight(count: int) -> None:
                while generator.served.value("tether_generator_completions_in_flight") != count:
                    await asyncio.sleep(0.005)

            def generate(name: str) -> Any:
                return stub.Generate(generate_request(), timeout=20, metadata=bearing(tokens[name]))

            held = [generate("narrow")]
            await in_flight(1)
            assert (await refusal(generate("narrow"))).reason == "QUOTA_CONCURRENCY"
            held.append(generate("wide"))
            await in_flight(2)
            refused = await refusal(generate("wide"))
            assert refused.reason == "TOO_MANY_CALLS" and refused.retry_after_seconds
            held.append(generate("run"))
            await in_flight(3)
            assert (await refusal(generate("run"))).reason == "TOO_MANY_CALLS"
            held[1].cancel()
            await in_flight(2)
            held.append(generate("wide"))
            assert (await refusal(generate("wide"))).reason == "TOO_MANY_CALLS"
            for call in held:
                call.cancel()
            await in_flight(0)

    run(scenario())
