"""The reward functions for TRL, called as its trainers call them, on a real reward service."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rpc import reward_rules
from tests.rpc.reward_serving import reward_in_thread
from tests.rpc.serving import Served
from tether import Client, DeadlineExceededError, InvalidArgumentError, NotFoundError, ScoreItem
from tether.integrations.trl import AsyncRewardFunction, RewardFunction
from tether_services.reward.engines.fake import FAKE_MAX_MODEL_LEN, fake_score, fake_text_score
from tether_services.reward.items import encode_conversation
from tether_services.runtime.text import ByteCodec, Message

MAX_ITEMS = 4
PROMPTS = [f"Question {place}" for place in range(10)]
COMPLETIONS = [f" answer {place * place}" for place in range(10)]
EXPECTED = [fake_text_score(prompt, completion) for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
TRL_ADDS: dict[str, Any] = {"completion_ids": [[1]] * 10, "trainer_state": None, "log_extra": None, "split": ["a"] * 10}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with reward_in_thread(max_items=MAX_ITEMS) as served:
        yield served


@pytest.fixture(scope="module")
def gated() -> Iterator[Served]:
    """A service that answers once the gate is open."""
    part = {"name": "gate", "engine": "rules", "function": "tests.rpc.reward_rules:wait_for_gate"}
    with reward_in_thread(models=[{"name": "gate", "components": [part]}]) as served:
        yield served


@pytest.fixture
def reward(service: Served) -> Iterator[RewardFunction]:
    function = RewardFunction(service.target)
    yield function
    function.close()


def chat(prompt: str, completion: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]


def test_more_completions_than_a_call_takes_are_scored_in_order(service: Served, reward: RewardFunction) -> None:
    with Client(reward=service.target) as client, pytest.raises(InvalidArgumentError, match="items"):
        client.score_items([ScoreItem("", "x")] * (MAX_ITEMS + 1))
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, **TRL_ADDS) == EXPECTED
    assert reward(prompts=[], completions=[]) == []


def test_the_limit_of_a_call_is_asked_for_once_and_never_for_a_single_item(service: Served) -> None:
    def num_calls(method: str) -> float:
        return service.value("tether_reward_request_seconds_count", method=method)

    function = RewardFunction(service.target)
    listed, scored = num_calls("ListRewardModels"), num_calls("Score")
    function(prompts=PROMPTS[:1], completions=COMPLETIONS[:1])
    assert (num_calls("ListRewardModels"), num_calls("Score")) == (listed, scored + 1)
    for _ in range(2):
        function(prompts=PROMPTS, completions=COMPLETIONS)
    assert (num_calls("ListRewardModels"), num_calls("Score")) == (listed + 1, scored + 7)
    function.close()


def test_the_async_function_gives_the_same_rewards_on_every_loop(service: Served) -> None:
    function = AsyncRewardFunction(service.target)

    async def call() -> list[float | None]:
        rewards = await function(prompts=PROMPTS, completions=COMPLETIONS, **TRL_ADDS)
        await function.close()
        return rewards

    assert asyncio.run(call()) == asyncio.run(call()) == EXPECTED
    assert inspect.iscoroutinefunction(function.__call__)  # how TRL tells them apart
    assert not inspect.iscoroutinefunction(RewardFunction(service.target).__call__)


def test_conversations_are_scored_as_conversations(reward: RewardFunction) -> None:
    prompt, completion = chat("Why?", "Because.")
    said = [Message("user", "Why?"), Message("assistant", "Because.")]
    expected = fake_score(*encode_conversation(ByteCodec(), said))
    assert reward(prompts=[prompt], completions=[completion]) == [expected]


def test_a_name_is_what_trl_logs_and_copies_open_their_own_connection(service: Served) -> None:
    function = RewardFunction(service.target, name="helpfulness")
    assert function(prompts=["a"], completions=["b"]) == [fake_text_score("a", "b")]
    for copied in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        assert (copied.__name__, copied.options) == ("helpfulness", function.options)
        assert copied._scorer._client is None
        assert copied(prompts=["a"], completions=["b"]) == [fake_text_score("a", "b")]
        copied.close()
    function.close()
    assert function(prompts=["a"], completions=["b"]) == [fake_text_score("a", "b")]
    function.close()


def test_a_column_says_where_the_reward_applies(service: Served) -> None:
    function = RewardFunction(service.target, applies_column="is_chat")
    rewards = function(prompts=PROMPTS[:3], completions=COMPLETIONS[:3], is_chat=[True, False, True])
    assert rewards == [EXPECTED[0], None, EXPECTED[2]]
    with pytest.raises(InvalidArgumentError, match="no column 'is_chat'"):
        function(prompts=PROMPTS[:1], completions=COMPLETIONS[:1], split=["a"])
    with pytest.raises(InvalidArgumentError, match=r"completions\[2\]"):
        function(prompts=["a", "b", "c"], completions=["x", "", ""], is_chat=[True, False, True])
    function.close()


def test_an_empty_completion_raises_unless_it_is_given_a_worth(service: Served) -> None:
    metrics: list[tuple[str, float]] = []
    texts: dict[str, Any] = {"prompts": ["a", "b"], "completions": ["", "x"]}
    expected = fake_text_score("b", "x")
    for unscored in (None, -2.0):
        function = RewardFunction(service.target, unscored=unscored)
        assert function(**texts, log_metric=lambda name, value: metrics.append((name, value))) == [unscored, expected]
        function.close()
    assert metrics == 2 * [("tether/truncated", 0.0), ("tether/unscored", 0.5)]
    raising = RewardFunction(service.target)
    with pytest.raises(InvalidArgumentError, match="1 of 2 items have no score") as caught:
        raising(**texts)
    assert (caught.value.reason, caught.value.violations[0].field) == ("EMPTY", "completions[0]")
    raising.close()


def test_cut_prompts_are_counted(reward: RewardFunction) -> None:
    metrics: dict[str, float] = {}
    reward(prompts=["x" * FAKE_MAX_MODEL_LEN, "b"], completions=["y", "x"], log_metric=metrics.__setitem__)
    assert metrics["tether/truncated"] == 0.5


def test_a_call_that_fails_as_a_whole_raises_whatever_an_item_is_worth(service: Served) -> None:
    function = RewardFunction(service.target, model="no-such-model", unscored=0.0)
    with pytest.raises(NotFoundError):
        function(prompts=["a"], completions=["b"])
    function.close()


@pytest.mark.parametrize(
    ("prompts", "completions", "field"),
    [
        (["a"], ["b", "c"], "prompts"),
        (["a"], [chat("", "b")[1]], "completions[0]"),
        ([chat("a", "")[0]], [[{"role": "assistant", "content": [{"type": "image"}]}]], "completions[0][0].content"),
    ],
)
def test_texts_of_no_known_form_are_named(
    reward: RewardFunction, prompts: list[Any], completions: list[Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        reward(prompts=prompts, completions=completions)
    assert caught.value.violations[0].field == field


def test_client_options_reach_the_client_and_bad_ones_show_at_once(service: Served, gated: Served) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_seconds"):
        RewardFunction(service.target, timeout_seconds=-1.0)
    with pytest.raises(TypeError, match="no_such_option"):
        AsyncRewardFunction(service.target, no_such_option=1)
    hasty = RewardFunction(gated.target, timeout_seconds=0.2)
    reward_rules.GATE.clear()
    try:
        with pytest.raises(DeadlineExceededError):
            hasty(prompts=["a"], completions=["b"])
    finally:
        reward_rules.GATE.set()
    hasty.close()
