"""What a client raises, of which class and with which details, and what it refuses before anything is sent."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.rpc.scripted_reward import ITEM, ScriptedReward, answer, fail_first, with_reward
from tether import (
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    GeneratorClient,
    InternalError,
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
from tether.errors import BY_CODE
from tether.v1 import reward_pb2


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_the_class_that_was_raised(kind: type[TetherError]) -> None:
    raised = kind(
        "What happened; the way out.",
        reason="SOME_REASON",
        violations=(FieldViolation("items[0].response", "empty"), FieldViolation("model", "unknown")),
        retry_after_seconds=500.25,  # beyond the deadline, so that nobody waits for it
    )

    async def use(client: RewardClient) -> None:
        with pytest.raises(TetherError) as caught:
            await client.score([ITEM])
        assert type(caught.value) is kind
        assert caught.value.message == raised.message
        assert caught.value.reason == "SOME_REASON"
        assert caught.value.violations == raised.violations
        assert caught.value.retry_after_seconds == 500.25

    with_reward(ScriptedReward(fail_first(100, raised)), use)


def test_a_defect_of_the_service_is_an_internal_error_without_details() -> None:
    async def defect(call: int) -> None:
        raise ZeroDivisionError("secret detail")

    async def use(client: RewardClient) -> None:
        with pytest.raises(InternalError) as caught:
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


def test_a_request_above_the_limit_is_refused_before_it_leaves() -> None:
    servicer = ScriptedReward(answer)

    async def use(client: RewardClient) -> None:
        with pytest.raises(ResourceExhaustedError) as caught:
            await client.score([ScoreItem("", "x" * (9 * 1024 * 1024))])
        assert caught.value.reason == "RESOURCE_EXHAUSTED"  # not QUEUE_FULL: calling again cannot help
        assert caught.value.retry_after_seconds is None

    with_reward(servicer, use)
    assert servicer.calls == 0


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
