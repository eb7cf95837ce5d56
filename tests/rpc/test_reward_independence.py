"""The score of an item does not depend on what it was batched with, beyond the rounding of float32."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rpc.generator_serving import PACKAGED_POLICY
from tests.rpc.serving import LOCAL, run, serving
from tether import RewardClient, ScoreItem
from tether.errors import InvalidArgumentError
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines import transformers as reward_engine
from tether_services.reward.service import RewardService
from tether_services.runtime.padding import PaddedBatch

PACKAGED_REWARD = PACKAGED_POLICY.parent / "reward"
TOLERANCE = 1e-5
"""Of float32 scores, relative to the score or to 1; stated in docs/serving.md."""
NUM_BATCHES = 100


def settings(**fields: object) -> RewardSettings:
    return RewardSettings.model_validate({**LOCAL, "model": str(PACKAGED_REWARD), "device": "cpu", **fields})


def random_item(rng: random.Random, *, longest: int) -> ScoreItem:
    def ids(count: int) -> list[int]:
        return [rng.randrange(3, 300) for _ in range(count)]

    return ScoreItem(prompt_token_ids=ids(rng.randint(1, longest)), response_token_ids=ids(rng.randint(1, longest)))


async def largest_difference(client: RewardClient, items: Sequence[ScoreItem], *, num_batches: int) -> float:
    """Return the largest change of an item's raw score, relative to it or to 1, in random batches of one call."""
    alone = [(await client.score([item])).scores[0].raw_score for item in items]
    rng = random.Random(1)
    worst = 0.0
    for number in range(num_batches):
        batch = [random_item(rng, longest=rng.choice([4, 40, 120])) for _ in range(rng.randint(1, 11))]
        place = rng.randint(0, len(batch))
        batch.insert(place, items[number % len(items)])
        score = (await client.score(batch)).scores[place].raw_score
        expected = alone[number % len(items)]
        worst = max(worst, abs(score - expected) / max(1.0, abs(expected)))
    return worst


def measured(*, num_batches: int = NUM_BATCHES, **fields: object) -> float:
    chosen = settings(**fields)
    rng = random.Random(0)
    items = [random_item(rng, longest=longest) for longest in (3, 30, 100)]

    async def main() -> float:
        async with (
            serving(chosen, lambda registry: RewardService(chosen, registry)) as served,
            RewardClient(served.target) as client,
        ):
            return await largest_difference(client, items, num_batches=num_batches)

    return run(main(), timeout_seconds=200)


def test_an_item_scores_the_same_alone_and_in_100_random_batches() -> None:
    assert measured() <= TOLERANCE


def test_calls_that_share_batches_by_chance_score_the_same() -> None:
    chosen = settings()
    rng = random.Random(3)
    items = [random_item(rng, longest=60) for _ in range(40)]

    async def main() -> None:
        async with (
            serving(chosen, lambda registry: RewardService(chosen, registry)) as served,
            RewardClient(served.target) as client,
        ):
            alone = [(await client.score([item])).scores[0].raw_score for item in items]
            together = await asyncio.gather(*(client.score([item]) for item in items))
            batches = served.value("tether_reward_batch_size_count")
            assert batches < 2 * len(items), "some of the calls did share a batch"
        scores = [result.scores[0].raw_score for result in together]
        assert scores == pytest.approx(alone, rel=TOLERANCE, abs=TOLERANCE)

    run(main(), timeout_seconds=100)


def test_a_score_read_at_the_end_of_the_padding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an engine that takes the last column of the padded rows for their end."""
    forward = reward_engine.TransformersRewardEngine._forward

    def careless(self: Any, batch: PaddedBatch) -> list[float]:
        width = batch.token_ids.shape[1]
        lengths = torch.full_like(batch.lengths, width)
        return forward(self, PaddedBatch(batch.indices, batch.token_ids, batch.position_ids, lengths))

    monkeypatch.setattr(reward_engine.TransformersRewardEngine, "_forward", careless)
    monkeypatch.setattr(reward_engine.TransformersRewardEngine, "_check_causal", lambda self, precision: None)
    assert measured(num_batches=10) > 100 * TOLERANCE


def see_to_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model that is loaded look at all columns of its rows, as one with attention to both sides does."""
    load = reward_engine.load_classifier

    def load_leaking(*args: Any, **kwargs: Any) -> Any:
        classifier = load(*args, **kwargs)

        def leak(module: object, inputs: object, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(dim=1, keepdim=True)
            return output

        getattr(classifier, classifier.base_model_prefix).register_forward_hook(leak)
        return classifier

    monkeypatch.setattr(reward_engine, "load_classifier", load_leaking)


def test_a_model_that_attends_to_padding_is_refused_at_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    see_to_the_right(monkeypatch)
    with pytest.raises(InvalidArgumentError, match="changes with padding"):
        measured(num_batches=0)


def test_such_a_model_would_give_other_scores_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the refusal: what would happen without it."""
    see_to_the_right(monkeypatch)
    monkeypatch.setattr(reward_engine.TransformersRewardEngine, "_check_causal", lambda self, precision: None)
    assert measured(num_batches=10) > 100 * TOLERANCE
