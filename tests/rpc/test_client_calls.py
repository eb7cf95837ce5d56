"""What every client does on every call: deadlines, retries, balancing, typed errors."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

import tether.channel
from tests.rpc.scripted_server import serving
from tether import (
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    GeneratorClient,
    InvalidArgumentError,
    LogprobItem,
    Message,
    OrchestratorClient,
    ReferenceClient,
    ResourceExhaustedError,
    RewardClient,
    SamplingParams,
    ScoreItem,
    TetherError,
    UnavailableError,
)
from tether.channel_options import channel_options
from tether.errors import BY_CODE
from tether.v1 import orchestrator_pb2, orchestrator_pb2_grpc, reward_pb2, reward_pb2_grpc


class ScriptedReward(reward_pb2_grpc.RewardServiceServicer):
    """Scores with the response's length after a scripted behaviour."""

    def __init__(self, behaviour: Callable[[int], Awaitable[None]]) -> None:
        self.behaviour = behaviour
        self.calls = 0
        self.remaining: list[float] = []

    def add(self, server: grpc.aio.Server) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server)

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        self.calls += 1
        self.remaining.append(context.time_remaining())
        await self.behaviour(self.calls)
        return reward_pb2.ScoreResponse(
            scores=[reward_pb2.ItemScore(score=len(item.response)) for item in request.items], model="length"
        )

    async def Compare(self, request: reward_pb2.CompareRequest, context: Any) -> reward_pb2.CompareResponse:
        raise InvalidArgumentError("Two responses are needed.", field="responses")

    async def ListRewardModels(
        self, request: reward_pb2.ListRewardModelsRequest, context: Any
    ) -> reward_pb2.ListRewardModelsResponse:
        """Two pages of one model each."""
        second = request.page_token == "2"
        return reward_pb2.ListRewardModelsResponse(
            models=[reward_pb2.RewardModel(name="second" if second else "first")],
            next_page_token="" if second else "2",
        )


async def answer(call: int) -> None:
    """Behave well."""


def fail_first(count: int, error: TetherError) -> Callable[[int], Awaitable[None]]:
    async def behaviour(call: int) -> None:
        if call <= count:
            raise error

    return behaviour


def with_reward(servicer: ScriptedReward, use: Callable[[RewardClient], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with serving(servicer.add) as target, RewardClient(target, **options) as client:
            await use(client)

    asyncio.run(run())


ITEM = ScoreItem("Once upon a time", " all was well.")


def test_scores_come_back_in_order_with_the_model() -> None:
    async def use(client: RewardClient) -> None:
        result = await client.score([ITEM, ScoreItem("a", "bb")])
        assert [score.score for score in result.scores] == [14.0, 2.0]
        assert all(score.error is None for score in result.scores)
        assert result.model == "length"

    with_reward(ScriptedReward(answer), use)


def test_lists_follow_their_pages_to_the_end() -> None:
    async def use(client: RewardClient) -> None:
        assert [model.name for model in await client.list_reward_models()] == ["first", "second"]

    with_reward(ScriptedReward(answer), use)


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_the_class_that_was_raised(
    kind: type[TetherError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tether.channel, "MAX_PUSHBACKS", 1)  # else it waits for a full service until the deadline
    raised = kind(
        "What happened; the way out.",
        reason="SOME_REASON",
        violations=(FieldViolation("items[0].response", "empty"), FieldViolation("model", "unknown")),
        retry_after_seconds=1.25,
    )

    async def use(client: RewardClient) -> None:
        with pytest.raises(TetherError) as caught:
            await client.score([ITEM])
        assert type(caught.value) is kind
        assert caught.value.message == raised.message
        assert caught.value.reason == "SOME_REASON"
        assert caught.value.violations == raised.violations
        assert caught.value.retry_after_seconds == 1.25

    with_reward(ScriptedReward(fail_first(100, raised)), use)


def test_a_defect_of_the_service_is_an_internal_error_without_details() -> None:
    async def defect(call: int) -> None:
        raise ZeroDivisionError("secret detail")

    async def use(client: RewardClient) -> None:
        with pytest.raises(tether.InternalError) as caught:
            await client.score([ITEM])
        assert "secret" not in str(caught.value)

    with_reward(ScriptedReward(defect), use)


def test_item_errors_are_typed_and_their_score_is_not_a_number() -> None:
    class OneBad(ScriptedReward):
        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
            failed = reward_pb2.ItemError(code=3, reason="EMPTY", message="Is empty.", field="items[1].response")
            scores = [reward_pb2.ItemScore(score=0.0), reward_pb2.ItemScore(error=failed)]
            return reward_pb2.ScoreResponse(scores=scores)

    async def use(client: RewardClient) -> None:
        good, bad = (await client.score([ITEM, ITEM])).scores
        assert good.error is None and good.score == 0.0
        assert isinstance(bad.error, InvalidArgumentError)
        assert bad.error.reason == "EMPTY"
        assert bad.error.violations[0].field == "items[1].response"
        assert math.isnan(bad.score) and math.isnan(bad.raw_score)

    with_reward(OneBad(answer), use)


def test_unavailable_is_retried_where_the_call_has_no_effect() -> None:
    servicer = ScriptedReward(fail_first(2, UnavailableError("starting")))

    async def use(client: RewardClient) -> None:
        assert (await client.score([ITEM])).scores[0].score == 14.0

    with_reward(servicer, use)
    assert servicer.calls == 3


def test_a_request_of_a_megabyte_is_retried_too() -> None:
    # gRPC's own retry buffer holds 256 KiB; above it a retry is silently off.
    servicer = ScriptedReward(fail_first(1, UnavailableError("starting")))

    async def use(client: RewardClient) -> None:
        assert (await client.score([ScoreItem("", "x" * 1_000_000)])).scores[0].score == 1_000_000

    with_reward(servicer, use)
    assert servicer.calls == 2


@pytest.mark.parametrize(
    "error", [ResourceExhaustedError("full"), FailedPreconditionError("no", retry_after_seconds=0.01)]
)
def test_no_other_code_is_retried(error: TetherError) -> None:
    servicer = ScriptedReward(fail_first(1, error))

    async def use(client: RewardClient) -> None:
        with pytest.raises(type(error)):
            await client.score([ITEM])

    with_reward(servicer, use)
    assert servicer.calls == 1


def test_every_call_carries_the_deadline_of_the_client_or_its_own() -> None:
    servicer = ScriptedReward(answer)

    async def use(client: RewardClient) -> None:
        await client.score([ITEM])
        await client.score([ITEM], timeout_seconds=7)

    with_reward(servicer, use, timeout_seconds=50)
    assert 45 < servicer.remaining[0] < 51  # gRPC rounds up
    assert 5 < servicer.remaining[1] < 8


def test_a_late_answer_is_a_deadline_error_that_names_the_target() -> None:
    async def sleep(call: int) -> None:
        await asyncio.sleep(30)

    async def use(client: RewardClient) -> None:
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=rf"{client.target}: no answer within 0.3 s"):
            await client.score([ITEM], timeout_seconds=0.3)
        assert time.monotonic() - started < 1.3

    with_reward(ScriptedReward(sleep), use)


def test_nobody_listening_is_unavailable_and_names_the_target() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{taken.getsockname()[1]}"

        async def run() -> None:
            async with RewardClient(target) as client:
                with pytest.raises(UnavailableError, match=target):
                    await client.score([ITEM])

        started = time.monotonic()
        asyncio.run(run())
        assert time.monotonic() - started < 15


def test_calls_are_spread_over_all_addresses_of_a_target() -> None:
    first, second = ScriptedReward(answer), ScriptedReward(answer)

    async def run() -> None:
        async with (
            serving(first.add) as one,
            serving(second.add) as two,
            RewardClient(f"ipv4:{one},{two}") as client,
        ):
            await client.score([ITEM])
            await asyncio.sleep(0.3)  # both connections are up
            first.calls = second.calls = 0
            for _ in range(20):
                await client.score([ITEM])

    asyncio.run(run())
    assert (first.calls, second.calls) == (10, 10)


def test_a_response_above_grpcs_own_four_mebibytes_is_accepted() -> None:
    class Large(ScriptedReward):
        async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
            return reward_pb2.ScoreResponse(model="x" * (6 * 1024 * 1024))

    async def use(client: RewardClient) -> None:
        assert len((await client.score([ITEM])).model) == 6 * 1024 * 1024

    with_reward(Large(answer), use)


def test_a_request_above_the_limit_is_refused_before_it_leaves() -> None:
    servicer = ScriptedReward(answer)

    async def use(client: RewardClient) -> None:
        with pytest.raises(ResourceExhaustedError) as caught:
            await client.score([ScoreItem("", "x" * (9 * 1024 * 1024))])
        assert caught.value.reason == "RESOURCE_EXHAUSTED"  # not QUEUE_FULL: calling again cannot help
        assert caught.value.retry_after_seconds is None

    with_reward(servicer, use)
    assert servicer.calls == 0


class Starting(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Starts runs after a scripted behaviour."""

    def __init__(self, behaviour: Callable[[int], Awaitable[None]]) -> None:
        self.behaviour = behaviour
        self.calls = 0

    def add(self, server: grpc.aio.Server) -> None:
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)

    async def StartRun(self, request: Any, context: Any) -> orchestrator_pb2.StartRunResponse:
        self.calls += 1
        await self.behaviour(self.calls)
        return orchestrator_pb2.StartRunResponse()


def test_a_call_with_an_effect_is_not_retried() -> None:
    servicer = Starting(fail_first(1, UnavailableError("draining", reason="DRAINING")))  # type: ignore[abstract]

    async def run() -> None:
        async with serving(servicer.add) as target, OrchestratorClient(target) as client:
            with pytest.raises(UnavailableError, match="draining"):
                await client.start_run("a", "")

    asyncio.run(run())
    assert servicer.calls == 1


FROZEN_SERVER = """
import asyncio
from tests.rpc.test_client_calls import Starting, serving
async def sleep(call): await asyncio.sleep(120)
async def main():
    async with serving(Starting(sleep).add) as target:
        print(target, flush=True)
        await asyncio.sleep(120)
asyncio.run(main())
"""


def test_a_frozen_peer_is_noticed_by_pings_long_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(channel_options())
    quick: dict[str, int | str] = {"grpc.keepalive_time_ms": 1000, "grpc.http2.ping_timeout_ms": 1000}
    assert quick.keys() <= options.keys()
    monkeypatch.setattr(tether.channel, "channel_options", lambda retries, replicas: list((options | quick).items()))
    server = subprocess.Popen([sys.executable, "-c", FROZEN_SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None

    async def run(target: str) -> float:
        async with OrchestratorClient(target) as client:
            starting = asyncio.create_task(client.start_run("a", "", timeout_seconds=60))
            await asyncio.sleep(1)
            os.kill(server.pid, signal.SIGSTOP)
            frozen = time.monotonic()
            with pytest.raises(UnavailableError):
                await starting
            return time.monotonic() - frozen

    try:
        assert asyncio.run(run(server.stdout.readline().strip())) < 15
    finally:
        server.kill()
        server.communicate()


def test_cancelling_the_task_cancels_the_call_on_the_server() -> None:
    cancelled = asyncio.Event()

    async def sleep(call: int) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def use(client: RewardClient) -> None:
        call = asyncio.create_task(client.score([ITEM]))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(cancelled.wait(), 5)

    with_reward(ScriptedReward(sleep), use)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_a_deadline_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_seconds"):
        RewardClient("127.0.0.1:1", timeout_seconds=seconds)

    async def use(client: RewardClient) -> None:
        with pytest.raises(InvalidArgumentError, match="timeout_seconds"):
            await client.score([ITEM], timeout_seconds=seconds)

    with_reward(ScriptedReward(answer), use)


def test_an_empty_target_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="target"):
        RewardClient("")


def test_a_closed_client_says_so() -> None:
    async def run() -> None:
        client = RewardClient("127.0.0.1:1")
        await client.close()
        await client.close()
        with pytest.raises(FailedPreconditionError, match="CLIENT_CLOSED"):
            await client.score([ITEM])

    asyncio.run(run())


WRONG_TYPES: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
    ("prompt_token_ids", lambda: GeneratorClient("127.0.0.1:1").generate([2**40])),
    ("prompt_token_ids", lambda: GeneratorClient("127.0.0.1:1").generate(["a"])),  # type: ignore[arg-type]
    ("n", lambda: GeneratorClient("127.0.0.1:1").generate("a", n="two")),  # type: ignore[arg-type]
    ("n", lambda: GeneratorClient("127.0.0.1:1").generate("a", n=2**40)),
    ("policy_version", lambda: GeneratorClient("127.0.0.1:1").generate("a", policy_version=2**70)),
    ("sampling", lambda: GeneratorClient("127.0.0.1:1").generate("a", sampling=SamplingParams(seed=2**70))),
    ("messages", lambda: GeneratorClient("127.0.0.1:1").generate([Message("user", "a"), 3])),  # type: ignore[arg-type]
    ("items[1]", lambda: RewardClient("127.0.0.1:1").score([ITEM, ScoreItem(response=7)])),  # type: ignore[arg-type]
    ("items[0]", lambda: RewardClient("127.0.0.1:1").score(["text"])),  # type: ignore[list-item]
    ("responses", lambda: RewardClient("127.0.0.1:1").compare("a", [1, 2])),  # type: ignore[list-item]
    ("items[0]", lambda: ReferenceClient("127.0.0.1:1").compute_logprobs([LogprobItem([1], [2**31])])),
    ("temperature", lambda: ReferenceClient("127.0.0.1:1").compute_logprobs([], temperature="hot")),  # type: ignore[arg-type]
    ("config_toml", lambda: OrchestratorClient("127.0.0.1:1").start_run("a", b"\xff")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("field", "call"), WRONG_TYPES, ids=[f"{i}-{field}" for i, (field, _) in enumerate(WRONG_TYPES)]
)
def test_a_value_of_the_wrong_type_names_the_field_before_anything_is_sent(
    field: str, call: Callable[[], Awaitable[Any]]
) -> None:
    async def run() -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await call()
        assert caught.value.violations[0].field == field

    asyncio.run(run())
