from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_reward import VOCABULARY, write_adapter, write_classifier, write_policy, write_tokenizer
from tether.errors import InternalError, InvalidArgumentError
from tether_services.reward.comparison import preference, rank
from tether_services.reward.config import RewardSettings
from tether_services.reward.engine import ScoreTask
from tether_services.reward.engines.fake import FakeRewardEngine, fake_score, fake_text_score
from tether_services.reward.items import PreparedItem, ScoreInput
from tether_services.reward.models import Component, Judgement, Refusal, RewardModel, combine, load_model

LENGTH = {
    "name": "length",
    "engine": "rules",
    "function": "tether_services.reward.rules:length_band",
    "arguments": {"low": 2, "high": 4},
}


def component(name: str = "a", *, weight: float = 1.0, gain: float = 1.0, bias: float = 0.0) -> Component:
    return Component(name, FakeRewardEngine(None), weight, gain, bias)


def item(count: int = 3, *, truncated: bool = False) -> PreparedItem:
    return PreparedItem(ScoreTask(response_token_ids=(5,) * count), truncated)


def with_model(model: dict[str, Any], *inputs: ScoreInput) -> tuple[RewardModel, list[Judgement | Refusal]]:
    """Return the loaded model and what it says to the inputs."""

    async def main() -> tuple[RewardModel, list[Judgement | Refusal]]:
        settings = RewardSettings.model_validate({"models": [model]})
        loaded = await load_model(settings, settings.models[0], field="models[0]")
        try:
            await loaded.check()
            return loaded, await loaded.score([loaded.reader.prepare(given) for given in inputs])
        finally:
            await loaded.close()

    return asyncio.run(main())


def test_the_score_is_the_weighted_sum_of_normalised_values() -> None:
    parts = [component("a", weight=0.5, gain=2.0, bias=1.0), component("b", weight=-3.0)]
    judgement = combine(parts, [4.0, 0.25], item(truncated=True))
    assert judgement.score == 0.5 * 2.0 * (4.0 - 1.0) - 3.0 * 0.25
    assert judgement.raw_score == 0.5 * 4.0 - 3.0 * 0.25
    assert [(part.name, part.value, part.weight) for part in judgement.components] == [
        ("a", 6.0, 0.5),
        ("b", 0.25, -3.0),
    ]
    assert (judgement.token_count, judgement.truncated) == (3, True)
    assert judgement.score == sum(part.weight * part.value for part in judgement.components)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error_naming_the_component(value: float) -> None:
    with pytest.raises(InternalError, match=r"\] b gave") as caught:
        combine([component("a"), component("b")], [1.0, value], item())
    assert caught.value.reason == "NON_FINITE_SCORE"


def test_a_sum_that_overflows_is_an_error() -> None:
    with pytest.raises(InternalError, match="the sum gave"):
        combine([component("a", weight=1e200), component("b")], [1e200, 1.0], item())


def test_an_error_of_one_component_is_the_items_error() -> None:
    error = InternalError("no", reason="RULE_FAILED")
    with pytest.raises(InternalError) as caught:
        combine([component("a"), component("b")], [1.0, error], item())
    assert caught.value is error


def test_gain_and_bias_of_one_component_explain_its_score() -> None:
    model = {"name": "m", "components": [{"name": "a", "engine": "fake", "weight": 2.0, "gain": 3.0, "bias": 0.25}]}
    loaded, (judgement,) = with_model(model, ScoreInput(prompt="p", response="r"))
    assert isinstance(judgement, Judgement)
    gain, bias = loaded.scale()
    assert judgement.score == pytest.approx(gain * (judgement.raw_score - bias), abs=1e-12)
    assert judgement.raw_score == 2.0 * fake_text_score("p", "r")


def test_gain_and_bias_of_equal_gains_explain_the_sum_and_of_different_ones_are_neutral() -> None:
    parts = [{"name": "a", "engine": "fake", "gain": 2.0, "bias": 1.0, "weight": 3.0}]
    parts.append({"name": "b", "engine": "fake", "gain": 2.0, "bias": -1.0})
    loaded, (judgement,) = with_model({"name": "m", "components": parts}, ScoreInput(response="r"))
    assert isinstance(judgement, Judgement)
    gain, bias = loaded.scale()
    assert judgement.score == pytest.approx(gain * (judgement.raw_score - bias), abs=1e-12)
    parts[1]["gain"] = 1.0
    assert with_model({"name": "m", "components": parts})[0].scale() == (1.0, 0.0)


def test_a_fake_model_and_a_rule_judge_the_same_item() -> None:
    model = {"name": "m", "components": [{"name": "f", "engine": "fake"}, LENGTH | {"weight": 10.0}]}
    loaded, (judgement,) = with_model(model, ScoreInput(prompt="p", response="a b"))
    assert isinstance(judgement, Judgement)
    assert judgement.score == fake_text_score("p", "a b") + 10.0
    assert loaded.engine == "fake+rules"
    assert judgement.token_count == 5


def test_a_model_of_rules_alone_reads_no_tokens() -> None:
    loaded, (judgement,) = with_model({"name": "m", "components": [LENGTH]}, ScoreInput(response="a"))
    assert isinstance(judgement, Judgement)
    assert (judgement.score, judgement.token_count) == (0.5, 0)
    assert (loaded.reader.max_model_len, loaded.reader.vocab_size) == (0, 0)


def test_a_configured_tokenizer_lets_rules_read_token_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    ids = ScoreInput(response_token_ids=tuple(VOCABULARY[word] for word in ("the", "cat", "sat")))
    _, (judgement,) = with_model({"name": "m", "components": [LENGTH], "tokenizer": str(tmp_path)}, ids)
    assert isinstance(judgement, Judgement) and judgement.score == 1.0


def test_a_configured_tokenizer_sets_the_vocabulary_of_the_fake(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    model = {"name": "m", "components": [{"name": "f", "engine": "fake"}], "tokenizer": str(tmp_path)}
    loaded, (judgement,) = with_model(model, ScoreInput(prompt="the", response="cat"))
    assert loaded.reader.vocab_size == len(VOCABULARY)
    assert isinstance(judgement, Judgement) and judgement.score == fake_score([1, 4], [5])


def test_the_scale_in_the_configuration_wins_over_the_files(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_policy(tmp_path / "policy"), gain=2.0, bias=0.5)
    part = {"name": "a", "engine": "transformers", "path": str(adapter)}
    given = ScoreInput(prompt="the cat", response="is happy")
    _, (own,) = with_model({"name": "m", "components": [part]}, given)
    _, (other,) = with_model({"name": "m", "components": [part | {"gain": 1.0, "bias": 0.0}]}, given)
    assert isinstance(own, Judgement) and isinstance(other, Judgement)
    assert own.score == pytest.approx(2.0 * (own.raw_score - 0.5))
    assert other.score == other.raw_score == own.raw_score


def test_components_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    parts = [
        {"name": "a", "engine": "transformers", "path": str(write_classifier(tmp_path / "words"))},
        {"name": "b", "engine": "fake"},
    ]
    with pytest.raises(InvalidArgumentError, match="different tokenizers"):
        with_model({"name": "m", "components": parts})


def test_two_models_with_one_tokenizer_make_an_ensemble(tmp_path: Path) -> None:
    folders = [write_classifier(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    parts = [
        {"name": f"m{place}", "engine": "transformers", "path": str(folder), "weight": 0.5}
        for place, folder in enumerate(folders)
    ]
    given = ScoreInput(prompt="the cat", response="is happy")
    _, (both,) = with_model({"name": "m", "components": parts}, given)
    alone = [with_model({"name": "m", "components": [part]}, given)[1][0] for part in parts]
    assert isinstance(both, Judgement)
    assert both.score == pytest.approx(sum(one.score for one in alone if isinstance(one, Judgement)), abs=1e-6)


def test_the_version_is_the_label_or_the_start_of_the_hash() -> None:
    model: dict[str, Any] = {"name": "m", "components": [LENGTH]}
    loaded, _ = with_model(model)
    assert loaded.version == loaded.sha256[:12] and len(loaded.sha256) == 64
    assert with_model(model | {"version": "v7"})[0].version == "v7"


@pytest.mark.parametrize(
    "change", [{"weight": 2.0}, {"gain": 2.0}, {"bias": 0.1}, {"arguments": {"low": 1, "high": 4}}, {"name": "other"}]
)
def test_the_hash_follows_everything_that_changes_an_answer(change: dict[str, Any]) -> None:
    before, _ = with_model({"name": "m", "components": [LENGTH]})
    after, _ = with_model({"name": "m", "components": [LENGTH | change]})
    again, _ = with_model({"name": "other", "version": "9", "components": [LENGTH]})
    assert before.sha256 != after.sha256
    assert before.sha256 == again.sha256


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"name": "a", "engine": "transformers", "path": "/no/such/model"}, "models[0].components[1].path"),
        ({"name": "a", "engine": "rules", "function": "no.such:f"}, "models[0].components[1].function"),
        (LENGTH | {"arguments": {"low": 1}}, "models[0].components[1].arguments"),
    ],
)
def test_a_component_that_cannot_start_is_named_with_its_path(part: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        with_model({"name": "m", "components": [{"name": "f", "engine": "fake"}, part | {"name": "a"}]})
    assert caught.value.violations[0].field == path


def test_a_tokenizer_that_is_not_there_is_named_with_its_path() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        with_model({"name": "m", "components": [LENGTH], "tokenizer": "/no/such/folder"})
    assert caught.value.violations[0].field == "models[0].tokenizer"


def test_ranking_is_best_first_and_stable() -> None:
    assert rank([1.0, 3.0, 1.0, 3.0, -2.0]) == [1, 3, 0, 2, 4]
    assert rank([0.0, 0.0]) == [0, 1]


@pytest.mark.parametrize("difference", [0.0, 1e-9, 0.3, 5.0, 40.0])
def test_preference_is_the_sigmoid_of_the_difference(difference: float) -> None:
    assert preference(difference, 0.0) == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-15)
    assert preference(difference, 0.0) + preference(0.0, difference) == pytest.approx(1.0, abs=1e-15)


def test_preference_of_extreme_scores_neither_overflows_nor_leaves_its_range() -> None:
    assert preference(-1e6, 1e6) == 0.0
    assert preference(1e6, -1e6) == 1.0
