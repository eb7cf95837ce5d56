"""Where items are read: text in a thread of its own, a few token ids right away."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.rpc.reward_model_serving import fake_model, serve_rewards
from tests.rpc.serving import run
from tether.reward import ScoreItem
from tether_services.reward.engines.fake import fake_score
from tether_services.reward.scoring import MAX_IDS_AT_ONCE
from tether_services.runtime.text import ByteCodec

IDS = (5, 6, 7)
TEXT = ScoreItem("a", "b")
RULE = {"name": "length", "engine": "rules", "function": "tests.rpc.reward_rules:number"}


def ids(count: int) -> list[ScoreItem]:
    """Return items of so many token ids together."""
    whole, rest = divmod(count, 1024)
    return [ScoreItem(response_token_ids=[5] * length) for length in [1024] * whole + [rest] if length]


@pytest.mark.parametrize(
    ("items", "answered"),
    [
        ([ScoreItem(prompt_token_ids=IDS, response_token_ids=IDS)], True),
        (ids(MAX_IDS_AT_ONCE), True),
        (ids(MAX_IDS_AT_ONCE + 1), False),
        ([TEXT], False),
        ([*ids(3), TEXT], False),
        ([ScoreItem(response_token_ids=IDS)] * 1024, False),
        ([ScoreItem()] * 1024, False),
    ],
    ids=["few ids", "as many ids as may be", "one more", "text", "ids and text", "many items", "many empty items"],
)
def test_only_calls_of_few_token_ids_are_read_without_the_thread_for_text(
    items: list[ScoreItem], answered: bool
) -> None:
    async def scenario() -> None:
        free = threading.Event()
        async with serve_rewards(models=[fake_model("m", "1")], max_items=1024) as rewards:
            held = asyncio.create_task(rewards.service._scorer.in_text_thread(free.wait, 20))
            call = asyncio.create_task(rewards.reward.score(items))
            try:
                if answered:
                    await asyncio.wait_for(asyncio.shield(call), 10)
                else:
                    probe = [ScoreItem(prompt_token_ids=IDS, response_token_ids=IDS)]
                    for _ in range(20):  # others come and go meanwhile
                        assert (await rewards.reward.score(probe)).scores[0].error is None
                    assert not call.done()
            finally:
                free.set()
            assert await held
            scores = (await call).scores
            assert [score.error is None for score in scores] == [item != ScoreItem() for item in items]

    run(scenario())


def test_ids_for_a_rule_that_reads_text_are_decoded_in_the_thread() -> None:
    ids_of_four = ByteCodec().encode("4", add_special_tokens=False)
    both = {"name": "both", "components": [{"name": "f", "engine": "fake"}, RULE]}

    async def scenario() -> None:
        free = threading.Event()
        async with serve_rewards(models=[both, fake_model("m", "1")]) as rewards:
            held = asyncio.create_task(rewards.service._scorer.in_text_thread(free.wait, 20))
            call = asyncio.create_task(rewards.reward.score([ScoreItem(response_token_ids=ids_of_four)], model="both"))
            try:
                for _ in range(20):  # others come and go meanwhile
                    await rewards.reward.score([ScoreItem(response_token_ids=IDS)], model="m")
                assert not call.done()
            finally:
                free.set()
            assert await held
            assert (await call).scores[0].score == pytest.approx(fake_score((), ids_of_four) + 4.0)

    run(scenario())
