"""Answers from the score cache are those of the engines, over a real loopback port."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.reward_model_serving import ServedRewards, fake_model, serve_rewards, store_model
from tests.rpc.serving import run
from tests.unit.tiny_reward import write_classifier
from tether.generator import Message
from tether.reward import ScoreItem, ScoreResult
from tether_services.reward.engines.fake import fake_text_score

CACHE = {"max_items": 100}
LENGTH = {
    "name": "length",
    "engine": "rules",
    "function": "tether_services.reward.rules:length_band",
    "arguments": {"low": 2, "high": 4},
    "weight": -2.0,
}


def lookups(rewards: ServedRewards) -> tuple[float, float]:
    """Return hits and misses so far."""
    value = rewards.served.value
    results = [value("tether_reward_cache_lookups_total", result=result) for result in ("hit", "miss")]
    return results[0], results[1]


def executed(rewards: ServedRewards) -> float:
    """Return how many items the engines were given."""
    return rewards.served.value("tether_reward_batch_size_sum")


def test_a_cached_answer_is_the_fresh_one_in_every_field_and_form(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")
    parts = [{"name": "model", "engine": "transformers", "path": str(folder), "gain": 2.0, "bias": 0.5}, LENGTH]
    items = [
        ScoreItem("the cat", "is happy on mat"),
        ScoreItem(prompt_token_ids=(4,) * 100, response_token_ids=(5, 6, 7)),
        ScoreItem(messages=(Message("user", "the cat"), Message("assistant", "happy"))),
    ]

    async def scenario() -> None:
        models = [{"name": "sum", "version": "1", "components": parts, "tokenizer": str(folder)}]
        async with serve_rewards(models=models, cache=CACHE) as rewards:
            fresh = await rewards.reward.score(items)
            assert [score.truncated for score in fresh.scores] == [False, True, False]
            assert await rewards.reward.score(items) == fresh
            assert lookups(rewards) == (3, 3) and executed(rewards) == 3
            mixed = await rewards.reward.score([items[1], ScoreItem("the dog", "sat"), items[0]])
            assert [mixed.scores[0], mixed.scores[2]] == [fresh.scores[1], fresh.scores[0]]
            assert lookups(rewards) == (5, 4) and executed(rewards) == 4
            compared = await rewards.reward.compare("the cat", ["is happy on mat", "sat"])
            assert compared.scores[0] == fresh.scores[0]
            held = await rewards.models.list_loaded()
            assert (held.cache.item_count, held.cache.max_item_count) == (5, 100)
            assert 0 < held.cache.size_bytes <= held.cache.max_size_bytes
            assert (held.models[0].cache_hit_count, held.models[0].cache_miss_count) == (6, 5)
            assert rewards.served.value("tether_reward_cache_bytes") == held.cache.size_bytes

    run(scenario())


def test_the_same_tokens_cut_or_whole_are_different_answers(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")

    async def scenario() -> None:
        async with serve_rewards(model=str(folder), cache=CACHE) as rewards:
            cut = ScoreItem(prompt_token_ids=(4,) * 100, response_token_ids=(5, 6, 7))
            whole = ScoreItem(prompt_token_ids=(4,) * 45, response_token_ids=(5, 6, 7))
            for item, truncated in ((cut, True), (whole, False), (cut, True), (whole, False)):
                assert (await rewards.reward.score([item])).scores[0].truncated == truncated
            assert lookups(rewards) == (2, 2)

    run(scenario())


def test_where_prompt_and_response_meet_counts() -> None:
    async def scenario() -> None:
        async with serve_rewards(cache=CACHE) as rewards:
            for prompt, response in (("ab", "c"), ("a", "bc"), ("", "abc")):
                (score,) = (await rewards.reward.score([ScoreItem(prompt, response)])).scores
                assert score.score == fake_text_score(prompt, response, salt="1")
            assert lookups(rewards) == (0, 3)

    run(scenario())


def test_errors_are_never_cached() -> None:
    async def scenario() -> None:
        rule = {"name": "n", "engine": "rules", "function": "tests.rpc.reward_rules:number"}
        async with serve_rewards(models=[{"name": "m", "components": [rule]}], cache=CACHE) as rewards:
            for _ in range(2):
                bad, empty, good = (
                    await rewards.reward.score([ScoreItem("p", "x"), ScoreItem("p", ""), ScoreItem("p", "2")])
                ).scores
                assert bad.error is not None and math.isnan(bad.score)
                assert empty.error is not None and good.score == 2.0
            assert lookups(rewards) == (1, 3)
            assert (await rewards.models.list_loaded()).cache.item_count == 1

    run(scenario())


def test_versions_share_nothing_even_under_one_label(tmp_path: Path) -> None:
    store_model(tmp_path, "m", "2")

    async def scenario() -> None:
        async with serve_rewards(model_store=str(tmp_path), cache=CACHE) as rewards:

            async def score(version: str) -> float:
                return (await rewards.reward.score([ScoreItem("p", "r")], model=f"m@{version}")).scores[0].score

            await rewards.models.load("m", "2")
            for version in ("1", "2", "1", "2"):
                assert await score(version) == fake_text_score("p", "r", salt=version)
            await rewards.models.unload("m", "2")
            (tmp_path / "m" / "2" / "model.toml").write_text('components = [{name = "f", engine = "fake", salt = "x"}]')
            await rewards.models.load("m", "2")
            assert await score("2") == fake_text_score("p", "r", salt="x")
            assert lookups(rewards) == (2, 3)

    run(scenario())


@pytest.mark.parametrize("values", [{}, {"cache": CACHE, "models": [fake_model("m", "1") | {"cacheable": False}]}])
def test_nothing_is_cached_by_default_or_where_a_model_opts_out(values: dict[str, Any]) -> None:
    async def scenario() -> list[ScoreResult]:
        async with serve_rewards(**values) as rewards:
            results = [await rewards.reward.score([ScoreItem("p", "r")]) for _ in range(3)]
            assert executed(rewards) == 3 and lookups(rewards) == (0, 0)
            return results

    first, *others = run(scenario())
    assert all(other == first for other in others)


def test_the_cache_holds_no_more_than_it_may_and_keeps_what_was_used_last() -> None:
    async def scenario() -> None:
        async with serve_rewards(cache={"max_items": 2}) as rewards:
            for text in ("a", "b", "a", "c", "a", "b"):  # b makes room for c, then c for b
                await rewards.reward.score([ScoreItem("p", text)])
            assert lookups(rewards) == (2, 4)
            assert rewards.served.value("tether_reward_cache_items") == 2
            assert rewards.served.value("tether_reward_cache_evictions_total") == 2

    run(scenario())
