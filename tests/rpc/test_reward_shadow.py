"""A candidate scores along: what is counted, and that callers do not notice, over real loopback ports."""

from __future__ import annotations

import asyncio
from itertools import combinations
from typing import Any

import pytest

from tests.rpc import reward_rules
from tests.rpc.reward_model_serving import ServedRewards, fake_model, serve_rewards
from tests.rpc.serving import run
from tether.errors import InvalidArgumentError, NotFoundError, TetherError
from tether.reward import ScoreItem
from tether.reward_models import RewardModelShadow
from tether_services.reward.engines.fake import fake_text_score
from tether_services.runtime.batching import Batcher
from tether_services.runtime.callers import ANONYMOUS, current_caller

TWO = [fake_model("m", "1"), fake_model("m", "2")]
NUMBER: dict[str, Any] = {
    "name": "rule",
    "version": "1",
    "components": [{"name": "n", "engine": "rules", "function": "tests.rpc.reward_rules:number"}],
}


async def settled(rewards: ServedRewards, count: int) -> RewardModelShadow:
    """Return the shadow once that many items are accounted for."""
    while True:
        shadow = (await rewards.models.list_loaded()).shadow
        assert shadow is not None
        if shadow.scored_count + shadow.dropped_count + shadow.failed_count >= count:
            return shadow
        await asyncio.sleep(0.005)


def order(first: float, second: float) -> int:
    return (first > second) - (first < second)


def test_differences_and_agreement_are_those_of_the_oracle() -> None:
    responses = [f"answer {number}" for number in range(6)]
    scores = {v: [fake_text_score("p", response, salt=v) for response in responses] for v in ("1", "2")}
    differences = [second - first for first, second in zip(scores["1"], scores["2"], strict=True)]
    pairs = [
        order(scores["1"][i], scores["1"][j]) == order(scores["2"][i], scores["2"][j])
        for i, j in combinations(range(6), 2)
    ]
    assert 0 < sum(pairs) < 15  # or nothing would be told apart

    async def scenario() -> None:
        async with serve_rewards(models=TWO) as rewards:
            set_to = await rewards.models.set_shadow("m", "2")
            assert (set_to.base, set_to.candidate, set_to.fraction) == ("m@1", "m@2", 1.0)
            compared = await rewards.reward.compare("p", responses)
            assert [score.score for score in compared.scores] == scores["1"]
            await rewards.reward.score([ScoreItem("p", responses[0]), ScoreItem("other", "x")], model="m@2")  # not base
            shadow = await settled(rewards, 6)
            assert shadow.mean_difference == pytest.approx(sum(differences) / 6, abs=1e-12)
            assert shadow.mean_abs_difference == pytest.approx(sum(map(abs, differences)) / 6, abs=1e-12)
            while shadow.pair_count < 15:
                shadow = await settled(rewards, 6)
            assert (shadow.pair_count, shadow.agreeing_pair_count) == (15, sum(pairs))
            value = rewards.served.value
            assert value("tether_reward_shadow_items_total", outcome="scored") == 6
            assert value("tether_reward_shadow_difference_sum") == pytest.approx(sum(map(abs, differences)))
            assert value("tether_reward_shadow_mean_difference") == pytest.approx(sum(differences) / 6)
            assert value("tether_reward_shadow_pairs_total", order="same") == sum(pairs)
            assert value("tether_reward_shadow_fraction", base="m@1", candidate="m@2") == 1.0
            assert value("tether_reward_items_total", outcome="scored") == 8  # callers' alone
            last = await rewards.models.clear_shadow()
            assert last == shadow
            assert 'candidate="m@2"' not in rewards.served.metrics()
            assert await rewards.models.clear_shadow() is None

    run(scenario())


def test_a_candidate_that_fails_is_counted_and_fails_no_caller() -> None:
    async def scenario() -> None:
        async with serve_rewards(models=[*TWO, NUMBER]) as rewards:
            await rewards.models.set_shadow("rule", "1")
            result = await rewards.reward.score([ScoreItem("p", "x"), ScoreItem("p", "2.5"), ScoreItem(response="")])
            assert [score.error is None for score in result.scores] == [True, True, False]
            shadow = await settled(rewards, 2)
            assert (shadow.scored_count, shadow.failed_count, shadow.dropped_count) == (1, 1, 0)
            assert shadow.mean_difference == pytest.approx(2.5 - fake_text_score("p", "2.5", salt="1"))

    run(scenario())


def test_an_answer_does_not_wait_for_the_candidate_and_what_does_not_fit_is_dropped() -> None:
    reward_rules.GATE.clear()
    gate = {"name": "gate", "version": "1", "components": [
        {"name": "g", "engine": "rules", "function": "tests.rpc.reward_rules:wait_for_gate"}]}  # fmt: skip

    async def scenario() -> None:
        async with serve_rewards(models=[fake_model("m", "1"), gate], shadow={"queue_limit": 3}) as rewards:
            await rewards.models.set_shadow("gate", "1")
            items = [ScoreItem("p", str(number)) for number in range(4)]
            assert len((await rewards.reward.score(items)).scores) == 4  # four do not fit
            result = await rewards.reward.score(items[:2])  # answered though the candidate hangs
            assert [score.error for score in result.scores] == [None, None]
            reward_rules.GATE.set()
            shadow = await settled(rewards, 6)
            assert (shadow.scored_count, shadow.dropped_count) == (2, 4)
            assert rewards.served.value("tether_reward_shadow_items_total", outcome="dropped") == 4

    run(scenario())


def test_the_fraction_decides_how_many_calls_are_scored_along() -> None:
    async def scenario() -> None:
        async with serve_rewards(models=TWO) as rewards:
            await rewards.models.set_shadow("m", "2", fraction=0.5)
            await asyncio.gather(*(rewards.reward.score([ScoreItem("p", str(number))]) for number in range(200)))
            await rewards.models.set_default("m", "2", expected_current="m@1")
            shadow = await settled(rewards, 50)
            assert 50 <= shadow.scored_count + shadow.dropped_count <= 150  # 7 standard deviations

    run(scenario())


def test_the_candidate_is_asked_by_a_caller_of_its_own_with_little_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []
    real = Batcher.submit_all

    async def noting(self: Any, items: Any, **options: Any) -> Any:
        seen.append((current_caller().name, current_caller().weight))
        return await real(self, items, **options)

    monkeypatch.setattr(Batcher, "submit_all", noting)

    async def scenario() -> None:
        async with serve_rewards(models=TWO) as rewards:
            await rewards.models.set_shadow("m", "2")
            await rewards.reward.score([ScoreItem("p", "r")])
            await settled(rewards, 1)

    run(scenario())
    assert seen == [("anonymous", 1.0), ("shadow", 0.05)]


def test_items_wait_for_nobody_while_callers_fill_the_queue() -> None:
    async def scenario() -> None:
        async with serve_rewards(models=TWO) as rewards:
            scorer = rewards.service._scorer
            await rewards.models.set_shadow("m", "2")
            room, count = scorer.batcher._room, rewards.service._settings.batch.queue_limit // 2 + 1
            room.take(ANONYMOUS, count)
            await rewards.reward.score([ScoreItem("p", "r")])
            shadow = await settled(rewards, 1)
            assert (shadow.scored_count, shadow.dropped_count) == (0, 1)
            room.give_back(ANONYMOUS, count)
            await rewards.reward.score([ScoreItem("p", "r")])
            shadow = await settled(rewards, 2)
            assert (shadow.scored_count, shadow.dropped_count) == (1, 1)

    run(scenario())


@pytest.mark.parametrize(
    ("candidate", "options", "kind"),
    [
        (("m", "3"), {}, NotFoundError),
        (("m", "2"), {"base": "m@3"}, NotFoundError),
        (("m", "1"), {}, InvalidArgumentError),
        (("m", "2"), {"base": "m"}, InvalidArgumentError),
        (("m", "2"), {"fraction": 0.0}, InvalidArgumentError),
        (("m", "2"), {"fraction": 1.5}, InvalidArgumentError),
        (("m", "2"), {"fraction": float("nan")}, InvalidArgumentError),
    ],
)
def test_a_shadow_that_cannot_be_is_refused(
    candidate: tuple[str, str], options: dict[str, Any], kind: type[TetherError]
) -> None:
    async def scenario() -> None:
        async with serve_rewards(models=TWO) as rewards:
            with pytest.raises(kind):
                await rewards.models.set_shadow(*candidate, **options)
            assert (await rewards.models.list_loaded()).shadow is None

    run(scenario())
