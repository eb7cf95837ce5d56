"""What the reward service is sent and must refuse: a typed error naming the field, and it goes on serving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest

from tests.rpc.serving import LOCAL, failure, health, run, serving
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_text_score
from tether_services.reward.service import SERVICE_NAME, RewardService

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
SETTINGS = RewardSettings.model_validate(
    LOCAL
    | {
        "admin_address": "127.0.0.1:0",
        "max_items": 4,
        "max_text_chars": 3000,
        "models": [
            {"name": "fake", "version": "1", "components": [{"name": "f", "engine": "fake"}]},
            {
                "name": "rules",
                "components": [{"name": "r", "engine": "rules", "function": "tether_services.reward.rules:valid_json"}],
            },
        ],
    }
)
Stub: TypeAlias = "reward_pb2_grpc.RewardServiceAsyncStub"
GOOD = reward_pb2.ScoreItem(prompt="p", response="r")


def with_stub(scenario: Callable[[Stub], Awaitable[None]]) -> None:
    """Run the scenario, then prove that the service is healthy and answers a good call."""

    async def main() -> None:
        async with (
            serving(SETTINGS, lambda registry: RewardService(SETTINGS, registry)) as served,
            grpc.aio.insecure_channel(served.target) as channel,
        ):
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            await scenario(stub)
            assert await health(served.target, SERVICE_NAME) == 1
            response = await stub.Score(reward_pb2.ScoreRequest(items=[GOOD]), timeout=10)
            assert response.scores[0].score == fake_text_score("p", "r")

    run(main())


def message(role: str, content: str) -> reward_pb2.ScoreItem:
    return reward_pb2.ScoreItem(messages=[{"role": role, "content": content}])


def tokens(prompt: list[int], response: list[int]) -> reward_pb2.ScoreItem:
    return reward_pb2.ScoreItem(prompt_token_ids=prompt, response_token_ids=response)


BAD_ITEMS = [
    (reward_pb2.ScoreItem(), "response", "EMPTY"),
    (reward_pb2.ScoreItem(prompt="p"), "response", "EMPTY"),
    (tokens([1], []), "response_token_ids", "EMPTY"),
    (tokens([1], [259]), "response_token_ids[0]", "INVALID_FIELD"),
    (tokens([1], [5, -1]), "response_token_ids[1]", "INVALID_FIELD"),
    (tokens([1], [5, 2**31 - 1]), "response_token_ids[1]", "INVALID_FIELD"),
    (tokens([-(2**31)], [5]), "prompt_token_ids[0]", "INVALID_FIELD"),
    (tokens([], [5] * 2049), "response_token_ids", "TOO_LONG"),
    (reward_pb2.ScoreItem(response="x" * 2049), "response", "TOO_LONG"),
    (reward_pb2.ScoreItem(response="x" * 3001), "response", "INVALID_FIELD"),
    (reward_pb2.ScoreItem(prompt="x" * 3001, response="r"), "prompt", "INVALID_FIELD"),
    (message("user", "hello"), "messages[0].role", "INVALID_FIELD"),
    (message("robot", "hello"), "messages[0].role", "INVALID_FIELD"),
    (message("assistant", ""), "messages[0].content", "INVALID_FIELD"),
    (message("assistant", "x" * 3001), "messages", "INVALID_FIELD"),
    (reward_pb2.ScoreItem(messages=[{"role": "robot"}] * 1025), "messages", "INVALID_FIELD"),
    (reward_pb2.ScoreItem(response="r", response_token_ids=[5]), "", "SEVERAL_FORMS"),
    (reward_pb2.ScoreItem(response="r", messages=[{"role": "assistant", "content": "c"}]), "", "SEVERAL_FORMS"),
]


def test_every_bad_item_is_refused_alone_with_its_field() -> None:
    async def scenario(stub: Stub) -> None:
        for item, field, reason in BAD_ITEMS:
            response = await stub.Score(reward_pb2.ScoreRequest(items=[GOOD, item, GOOD]), timeout=10)
            first, bad, last = response.scores
            assert first.score == last.score == fake_text_score("p", "r")
            assert bad.HasField("error"), item
            expected = ".".join(part for part in ("items[1]", field) if part)
            assert (bad.error.code, bad.error.field, bad.error.reason) == (INVALID.value[0], expected, reason)
            assert bad.error.message
            assert (bad.score, bad.token_count, len(bad.components)) == (0.0, 0, 0)  # unset

    with_stub(scenario)


@pytest.mark.alone
def test_health_answers_while_a_huge_call_is_read() -> None:
    conversation = reward_pb2.ScoreItem(messages=[{}] * 60_000)
    huge = reward_pb2.ScoreRequest(items=[conversation] * 4)

    async def scenario(stub: Stub) -> None:
        longest = 0.0
        call = asyncio.ensure_future(stub.Score(huge, timeout=60))
        while not call.done():
            began = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - began)
        assert [score.error.field for score in (await call).scores] == [f"items[{i}].messages" for i in range(4)]
        assert longest < 0.5, longest

    with_stub(scenario)


def test_token_ids_for_rules_without_a_tokenizer_are_refused() -> None:
    async def scenario(stub: Stub) -> None:
        response = await stub.Score(reward_pb2.ScoreRequest(items=[tokens([], [5])], model="rules"), timeout=10)
        assert response.scores[0].error.reason == "NO_TOKENIZER"

    with_stub(scenario)


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (reward_pb2.ScoreRequest(), INVALID, "items"),
        (reward_pb2.ScoreRequest(items=[GOOD] * 5), INVALID, "items"),
        (reward_pb2.ScoreRequest(items=[GOOD], model="other"), NOT_FOUND, "model"),
        (reward_pb2.ScoreRequest(items=[GOOD], model="../../etc/passwd"), NOT_FOUND, "model"),
        (reward_pb2.ScoreRequest(items=[GOOD], model="x" * 10_000), NOT_FOUND, "model"),
        (reward_pb2.ScoreRequest(items=[GOOD], version="2"), NOT_FOUND, "version"),
        (reward_pb2.ScoreRequest(items=[GOOD], model="rules", version="1"), NOT_FOUND, "version"),
    ],
)
def test_a_bad_call_to_score_names_the_field(
    request_: reward_pb2.ScoreRequest, code: grpc.StatusCode, field: str
) -> None:
    async def scenario(stub: Stub) -> None:
        got, violations = await failure(stub.Score(request_, timeout=10))
        assert (got, [violation.field for violation in violations]) == (code, [field])
        assert len(violations[0].description) < 300

    with_stub(scenario)


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (reward_pb2.CompareRequest(prompt="p"), INVALID, "responses"),
        (reward_pb2.CompareRequest(prompt="p", responses=["one"]), INVALID, "responses"),
        (reward_pb2.CompareRequest(prompt="p", responses=["x"] * 17), INVALID, "responses"),
        (reward_pb2.CompareRequest(prompt="p", responses=["a", "", "b"]), INVALID, "responses[1]"),
        (reward_pb2.CompareRequest(prompt="p", responses=["a", "b", "x" * 2049]), INVALID, "responses[2]"),
        (reward_pb2.CompareRequest(prompt="x" * 3001, responses=["a", "b"]), INVALID, "prompt"),
        (reward_pb2.CompareRequest(prompt="p", responses=["a", "b"], model="other"), NOT_FOUND, "model"),
        (reward_pb2.CompareRequest(prompt="p", responses=["a", "b"], version="9"), NOT_FOUND, "version"),
    ],
)
def test_a_bad_comparison_fails_as_a_whole_and_names_the_field(
    request_: reward_pb2.CompareRequest, code: grpc.StatusCode, field: str
) -> None:
    async def scenario(stub: Stub) -> None:
        got, violations = await failure(stub.Compare(request_, timeout=10))
        assert (got, [violation.field for violation in violations]) == (code, [field])

    with_stub(scenario)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (reward_pb2.ListRewardModelsRequest(page_size=-1), "page_size"),
        (reward_pb2.ListRewardModelsRequest(page_size=201), "page_size"),
        (reward_pb2.ListRewardModelsRequest(page_token="abc"), "page_token"),
    ],
)
def test_a_bad_page_is_refused(request_: reward_pb2.ListRewardModelsRequest, field: str) -> None:
    async def scenario(stub: Stub) -> None:
        code, violations = await failure(stub.ListRewardModels(request_, timeout=10))
        assert (code, [violation.field for violation in violations]) == (INVALID, [field])

    with_stub(scenario)


def test_pages_follow_each_other_and_end() -> None:
    async def scenario(stub: Stub) -> None:
        first = await stub.ListRewardModels(reward_pb2.ListRewardModelsRequest(page_size=1), timeout=10)
        second = await stub.ListRewardModels(
            reward_pb2.ListRewardModelsRequest(page_size=1, page_token=first.next_page_token), timeout=10
        )
        assert [first.models[0].name, second.models[0].name] == ["fake", "rules"]
        assert first.next_page_token and not second.next_page_token
        beyond = await stub.ListRewardModels(reward_pb2.ListRewardModelsRequest(page_token="99"), timeout=10)
        assert not beyond.models and not beyond.next_page_token

    with_stub(scenario)


def test_bytes_that_are_no_message_and_messages_that_are_too_large_end_that_call_only() -> None:
    async def main() -> None:
        async with (
            serving(SETTINGS, lambda registry: RewardService(SETTINGS, registry)) as served,
            grpc.aio.insecure_channel(served.target) as channel,
        ):
            raw: Any = channel.unary_unary(f"/{SERVICE_NAME}/Score")
            for payload in (b"\xff" * 50, b"\x0a" + b"\x00" * (9 * 1024 * 1024)):
                with pytest.raises(grpc.aio.AioRpcError):
                    await raw(payload, timeout=10)
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            calls = [stub.Score(reward_pb2.ScoreRequest(items=[GOOD]), timeout=10) for _ in range(4)]
            for response in await asyncio.gather(*calls):
                assert response.scores[0].score == fake_text_score("p", "r")

    run(main())
