"""The reward functions for verl, called as its reward managers call them, on a real reward service."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from tests.rpc.reward_serving import reward_in_thread
from tests.rpc.serving import Served
from tether import InvalidArgumentError, NotFoundError, TetherError
from tether.integrations import verl
from tether.integrations.verl import compute_score, compute_score_async, compute_score_batch
from tether_services.reward.engines.fake import fake_score, fake_text_score
from tether_services.reward.items import encode_conversation
from tether_services.runtime.text import ByteCodec, Message


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with reward_in_thread() as served:
        yield served
        for scoring in verl._open.values():
            scoring.scorer.close()
        verl._open.clear()


def arguments(response: str, **extra_info: Any) -> dict[str, Any]:
    """Return what verl's reward loop passes for one response."""
    extra = extra_info | {"num_turns": None, "rollout_reward_scores": {}}
    return {"data_source": "demo", "solution_str": response, "ground_truth": "", "extra_info": extra}


def test_a_response_is_scored_with_the_prompt_of_its_extra_info(service: Served) -> None:
    asked = arguments(" 4.", question="2 + 2 =")
    assert compute_score(**asked, target=service.target, prompt_key="question") == fake_text_score("2 + 2 =", " 4.")


@pytest.mark.parametrize("as_array", [False, True])
def test_messages_are_scored_as_a_conversation_also_as_parquet_gives_them(service: Served, as_array: bool) -> None:
    said: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="}]
    whole = [*(Message(m["role"], m["content"]) for m in said), Message("assistant", "4")]
    prompt = numpy.array(said, dtype=object) if as_array else said
    score = compute_score(**arguments("4", prompt=prompt), target=service.target)
    assert score == fake_score(*encode_conversation(ByteCodec(), whole))


def test_hundreds_of_async_calls_share_one_connection(service: Served) -> None:
    options: dict[str, Any] = {"target": service.target}
    call = functools.partial(compute_score_async, **options)
    assert inspect.iscoroutinefunction(call)  # how verl tells them apart

    async def score_all() -> list[float]:
        scores = await asyncio.gather(*(call(**arguments(f"{place}", prompt="p")) for place in range(200)))
        scorer = verl._scoring(options).async_scorer
        assert len(scorer._clients) == 1
        await scorer.close()
        return scores

    assert asyncio.run(score_all()) == [fake_text_score("p", f"{place}") for place in range(200)]


def test_a_batch_is_scored_in_order(service: Served) -> None:
    count = 70
    scores = compute_score_batch(
        data_sources=["demo"] * count,
        solution_strs=[f"{place}" for place in range(count)],
        ground_truths=[None] * count,
        extra_infos=[{"prompt": "p", "rollout_reward_scores": {}}] * count,
        target=service.target,
    )
    assert scores == [fake_text_score("p", f"{place}") for place in range(count)]


def test_the_functions_take_the_arguments_that_verl_names() -> None:
    one = ["data_source", "solution_str", "ground_truth", "extra_info", "reward_kwargs"]
    assert list(inspect.signature(compute_score).parameters) == one
    assert list(inspect.signature(compute_score_async).parameters) == one
    many = ["data_sources", "solution_strs", "ground_truths", "extra_infos", "reward_kwargs"]
    assert list(inspect.signature(compute_score_batch).parameters) == many


def test_what_verl_adds_for_its_own_reward_models_is_ignored_and_other_options_are_not(service: Served) -> None:
    asked = arguments("r", prompt="p") | {"target": service.target}
    added: dict[str, Any] = {"reward_router_address": "127.0.0.1:1", "reward_model_tokenizer": object()}
    assert compute_score(**asked, **added) == fake_text_score("p", "r")
    with pytest.raises(TypeError, match="no_such_option"):
        compute_score(**asked, no_such_option=1)


def test_a_missing_prompt_names_the_keys_that_there_are(service: Served) -> None:
    with pytest.raises(InvalidArgumentError, match=r"'prompt'; there are \['index'") as caught:
        compute_score(**arguments("r", index=3), target=service.target)
    assert (caught.value.reason, caught.value.violations[0].field) == ("NO_PROMPT", "extra_info.prompt")
    with pytest.raises(InvalidArgumentError, match="NO_PROMPT"):
        compute_score("demo", "r", "", None, target=service.target)
    with pytest.raises(InvalidArgumentError) as caught:
        compute_score_batch(["d"] * 2, ["r"] * 2, [""] * 2, [{"prompt": "p"}, {}], target=service.target)
    assert caught.value.violations[0].field == "extra_infos[1].prompt"
    with pytest.raises(InvalidArgumentError, match="extra_infos"):
        compute_score_batch(["d"] * 2, ["r"] * 2, [""] * 2, [{"prompt": "p"}], target=service.target)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"target": ""}, InvalidArgumentError),
        ({"unscored": None}, InvalidArgumentError),
        ({"model": "no-such-model", "unscored": 0.0}, NotFoundError),
    ],
)
def test_a_failure_is_an_error_and_no_reward(service: Served, options: dict[str, Any], kind: type[TetherError]) -> None:
    with pytest.raises(kind):
        compute_score(**arguments("r", prompt="p"), **({"target": service.target} | options))


def test_a_response_without_a_score_raises_unless_it_is_given_a_worth(service: Served) -> None:
    empty = arguments("", prompt="p") | {"target": service.target}
    with pytest.raises(InvalidArgumentError, match="EMPTY") as caught:
        compute_score(**empty)
    assert caught.value.violations[0].field == "solution_str"
    assert compute_score(**empty, unscored=-1.0) == -1.0
