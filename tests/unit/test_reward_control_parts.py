"""The parts of the reward service that hold, name, keep and compare models, each on its own."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.unit.tiny_reward import write_classifier
from tether.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from tether_services.reward import defaults
from tether_services.reward.config import RewardSettings
from tether_services.reward.defaults import Defaults, DefaultsFile
from tether_services.reward.items import ScoreInput
from tether_services.reward.loading import ModelLoader, warm_up
from tether_services.reward.metrics import RewardMetrics
from tether_services.reward.models import load_model
from tether_services.reward.names import ModelId, read_selector
from tether_services.reward.pool import HeldModel, ModelPool
from tether_services.reward.shadow import count_pairs
from tether_services.runtime.text import Message

SHA = "ab" * 32


def fakes(*labels: str, **values: Any) -> RewardSettings:
    models = []
    for label in labels:
        name, _, version = label.partition("@")
        models.append(
            {"name": name, "version": version, "components": [{"name": "f", "engine": "fake", "salt": label}]}
        )
    return RewardSettings.model_validate({"models": models, **values})


async def pool_of(*labels: str) -> ModelPool:
    """Return a pool with fake models."""
    settings = fakes(*labels)
    pool = ModelPool(max_models=settings.max_models)
    await ModelLoader(settings, pool, RewardMetrics(CollectorRegistry(), queue_limit=1)).load_configured()
    return pool


@pytest.mark.parametrize(
    ("model", "version", "expected"),
    [
        ("", "", ("", "")),
        ("m", "", ("m", "")),
        ("m", "1", ("m", "1")),
        ("m@1", "", ("m", "1")),
        ("m@1", "1", ("m", "1")),
        ("", "1", ("", "1")),
        ("m@v@1", "", ("m", "v@1")),
    ],
)
def test_a_selector_is_split_at_its_first_sign(model: str, version: str, expected: tuple[str, str]) -> None:
    assert read_selector(model, version) == expected


def test_versions_of_one_name_are_configured_beside_each_other_and_the_first_is_the_default() -> None:
    pool = asyncio.run(pool_of("b@2", "a@1", "b@1", "a@2"))
    assert str(pool.default) == "b@2"
    assert [str(pool.default_of(name)) for name in ("a", "b", "c")] == ["a@1", "b@2", "None"]
    assert [str(held.id) for held in pool.selectable()] == ["b@2", "a@1", "b@1", "a@2"]


FAKE_PART = {"name": "f", "engine": "fake"}
SALTED = {"name": "r", "engine": "transformers", "path": "x", "salt": "s"}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"models": [{"name": "m", "version": "1", "components": [FAKE_PART]}] * 2}, "'m@1' is taken"),
        ({"models": [{"name": f"m{n}", "components": [FAKE_PART]} for n in range(3)], "max_models": 2}, "raise it"),
        ({"engine": "fake", "cache": {"max_items": 1}, "batch": {"mix_calls": False}}, "leaves the batch"),
        ({"models": [{"name": "m", "components": [SALTED]}]}, "ignore salt"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RewardSettings.model_validate(values)


def test_two_configured_models_of_the_same_content_and_no_label_are_one_too_many() -> None:
    part = {"name": "f", "engine": "fake"}
    models = [{"name": "m", "version": "", "components": [part]}, {"name": "m", "version": "", "components": [part]}]
    settings = fakes("m@1").model_copy(
        update={"models": RewardSettings.model_validate({"models": models[:1]}).models * 2}
    )

    async def load() -> None:
        pool = ModelPool(max_models=4)
        await ModelLoader(settings, pool, RewardMetrics(CollectorRegistry(), queue_limit=1)).load_configured()

    with pytest.raises(InvalidArgumentError, match="there twice") as caught:
        asyncio.run(load())
    assert caught.value.violations[0].field == "models[1]"


def test_a_model_is_unused_only_when_its_last_user_has_left() -> None:
    async def scenario() -> list[str]:
        pool = await pool_of("m@1", "m@2")
        held = pool.need(ModelId("m", "2"))
        seen = []
        with pool.selected("m@2", ""), pool.selected("m", "2"):
            pool.retire(held.id)
            waiting = asyncio.create_task(held.wait_until_unused())
            await asyncio.sleep(0)
            seen.append(f"{held.num_users} {waiting.done()}")
        await waiting
        seen.append(str(held.num_users))
        pool.forget(held)
        return [*seen, str(pool.holds(held))]

    assert asyncio.run(scenario()) == ["2 False", "0", "False"]


def test_a_place_is_kept_for_what_is_loaded_and_given_back_when_that_fails() -> None:
    async def scenario() -> None:
        pool = await pool_of("m@1")
        with pytest.raises(ZeroDivisionError), pool.place(ModelId("m", "2")):
            assert str(pool.loading) == "m@2"
            with pytest.raises(ResourceExhaustedError), pool.place(ModelId("m", "3")):
                pass
            raise ZeroDivisionError
        assert pool.loading is None
        with pytest.raises(FailedPreconditionError), pool.place(ModelId("m", "1")):
            pass

    asyncio.run(scenario())


def test_warming_up_scores_with_what_reads_tokens_and_calls_no_rule() -> None:
    rule = {"name": "r", "engine": "rules", "function": "tests.rpc.reward_rules:overflow"}
    settings = RewardSettings.model_validate(
        {"models": [{"name": "m", "components": [rule, {"name": "f", "engine": "fake"}]}]}
    )

    async def scenario() -> int:
        model = await load_model(settings, settings.models[0], field="models[0]")
        asked: list[int] = []
        engine: Any = model.components[1].engine
        real = engine.score

        async def noting(tasks: Any) -> Any:
            asked.append(len(tasks))
            return await real(tasks)

        engine.score = noting
        await warm_up(model, field="models[0]")
        return sum(asked)

    assert asyncio.run(scenario()) == 1


def test_the_weights_of_a_closed_model_are_freed(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")
    settings = RewardSettings.model_validate({"model": str(folder)})

    async def scenario() -> bool:
        held = HeldModel(await load_model(settings, settings.reward_models()[0], field="models[0]"), cacheable=True)
        engine: Any = held.model.components[0].engine
        weights = weakref.ref(engine._body)
        await held.model.close()
        gc.collect()
        return weights() is None

    assert asyncio.run(scenario())


def test_the_defaults_are_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        file = DefaultsFile(str(tmp_path / "new" / "state"))
        assert await file.open() == Defaults()
        first = Defaults().with_switch(ModelId("m", "2"), SHA, name_only=False)
        await file.write(first)

        def full(path: Path, text: str) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(defaults, "write_text", full)
            with pytest.raises(ResourceExhaustedError) as caught:
                await file.write(first.with_switch(ModelId("n", "1"), SHA, name_only=True))
            assert caught.value.reason == "STORAGE_FULL"
        assert file.defaults == first
        again = DefaultsFile(str(tmp_path / "new" / "state"))
        assert await again.open() == Defaults("m", {"m": ("2", SHA)})
        assert first.without(ModelId("m", "2")).versions == {} and first.without(ModelId("m", "1")) == first

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        json.dumps({"default_name": "m", "versions": {}}),
        json.dumps({"default_name": "m", "versions": {"m": ["1", "xyz"]}}),
        json.dumps({"default_name": "m", "versions": {"m": ["", SHA]}}),
        json.dumps({"default_name": "m", "versions": {"m": ["1", SHA]}, "more": 1}),
        "\x00",
    ],
)
def test_a_damaged_file_of_defaults_is_named_and_not_taken_for_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "default_models.json").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="Delete it") as caught:
        asyncio.run(DefaultsFile(str(tmp_path)).open())
    assert caught.value.violations[0].field == "state_dir"


def test_pairs_are_of_one_prompt_and_equal_scores_are_an_order() -> None:
    inputs = [ScoreInput("p", "a"), ScoreInput("q", "a"), ScoreInput("p", "b"), ScoreInput("p", "c")]
    assert list(count_pairs(inputs, [1.0, 0.0, 2.0, 2.0], [5.0, 9.0, 6.0, 6.0])) == [True, True, True]
    assert list(count_pairs(inputs, [1.0, 0.0, 2.0, 2.0], [5.0, 9.0, 4.0, 6.0])) == [False, True, False]
    assert list(count_pairs(inputs, [1.0, 0.0, 2.0, 2.0], [None, 9.0, 4.0, 6.0])) == [False]
    chats = [ScoreInput(messages=(Message("user", "x"), Message("assistant", text))) for text in ("a", "b")]
    assert list(count_pairs(chats, [1.0, 2.0], [1.0, 2.0])) == [True]
    ids = [ScoreInput(prompt_token_ids=(1,), response_token_ids=(2,)), ScoreInput(response_token_ids=(2,))]
    assert list(count_pairs(ids, [1.0, 2.0], [1.0, 2.0])) == []


def test_the_pairs_of_a_large_call_are_bounded() -> None:
    inputs = [ScoreInput("p", str(number)) for number in range(1000)]
    scores = [float(number) for number in range(1000)]
    assert sum(count_pairs(inputs, scores, scores)) == 120
