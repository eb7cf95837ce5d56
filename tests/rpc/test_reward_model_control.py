"""Loading, unloading and switching of reward models, over real loopback ports."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.rpc import reward_rules
from tests.rpc.reward_model_serving import fake_model, serve_rewards, store_model
from tests.rpc.serving import run
from tests.unit.tiny_reward import VOCABULARY, write_adapter, write_classifier, write_policy
from tether.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    TetherError,
    UnimplementedError,
)
from tether.reward import RewardClient, ScoreItem
from tether.reward_models import RewardModelClient
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.remote import Remote, Services
from tether_services.orchestrator.retrying import RetryBudget, RetryPolicy
from tether_services.orchestrator.service_checks import find_reward_model
from tether_services.reward import loading
from tether_services.reward.engines.fake import fake_text_score

ITEM = ScoreItem("Once", " upon")


async def refused(call: Awaitable[object]) -> tuple[type[TetherError], str]:
    """Return class and reason of the error of a call that must fail."""
    with pytest.raises(TetherError) as caught:
        await call
    return type(caught.value), caught.value.reason


def oracle(version: str) -> float:
    return fake_text_score("Once", " upon", salt=version)


def test_a_loaded_version_is_pinned_by_name_and_version_beside_the_default_one(tmp_path: Path) -> None:
    store_model(tmp_path, "m", "2")

    async def scenario() -> None:
        async with serve_rewards(model_store=str(tmp_path)) as rewards:
            loaded = await rewards.models.load("m", "2")
            assert (loaded.state, loaded.engine, loaded.default_version) == ("warm", "fake", False)
            pins = {("", ""): "1", ("m", ""): "1", ("m@2", ""): "2", ("m", "2"): "2", ("m@2", "2"): "2", ("", "2"): "2"}
            for (model, version), expected in pins.items():
                result = await rewards.reward.score([ITEM], model=model, version=version)
                assert (result.model, result.version) == ("m", expected)
                assert result.scores[0].score == oracle(expected)
                compared = await rewards.reward.compare("Once", [" upon", "x"], model=model, version=version)
                assert compared.version == expected and compared.scores[0].score == oracle(expected)
            result = await rewards.reward.score([ITEM], model="m@2")
            assert result.model_sha256 == loaded.model_sha256
            listed = await rewards.reward.list_reward_models()
            assert [(m.version, m.default_model, m.default_version) for m in listed] == [
                ("1", True, True),
                ("2", False, False),
            ]

    run(scenario())


@pytest.mark.parametrize(
    ("model", "version", "kind", "reason", "field"),
    [
        ("m@1", "2", InvalidArgumentError, "VERSION_CONTRADICTS", "version"),
        ("m@", "", InvalidArgumentError, "INVALID_FIELD", "model"),
        ("@1", "", InvalidArgumentError, "INVALID_FIELD", "model"),
        ("m@3", "", NotFoundError, "VERSION_NOT_FOUND", "version"),
        ("m", "3", NotFoundError, "VERSION_NOT_FOUND", "version"),
        ("x", "", NotFoundError, "MODEL_NOT_FOUND", "model"),
        ("x@1", "", NotFoundError, "MODEL_NOT_FOUND", "model"),
    ],
)
def test_a_pin_that_cannot_be_is_refused_with_its_field(
    model: str, version: str, kind: type[TetherError], reason: str, field: str
) -> None:
    async def scenario() -> None:
        async with serve_rewards(models=[fake_model("m", "1"), fake_model("m", "2")]) as rewards:
            for call in (
                rewards.reward.score([ITEM], model=model, version=version),
                rewards.reward.compare("a", ["b", "c"], model=model, version=version),
            ):
                with pytest.raises(kind) as caught:
                    await call
                assert (caught.value.reason, caught.value.violations[0].field) == (reason, field)

    run(scenario())


def test_the_default_is_switched_by_compare_and_set_for_the_service_or_for_one_name(tmp_path: Path) -> None:
    store_model(tmp_path, "m", "2")
    store_model(tmp_path, "other", "1")
    store_model(tmp_path, "other", "2")

    async def scenario() -> None:
        async with serve_rewards(model_store=str(tmp_path)) as rewards:
            for name, version in (("m", "2"), ("other", "1"), ("other", "2")):
                await rewards.models.load(name, version)
            lost = rewards.models.set_default("m", "2", expected_current="m@7")
            assert await refused(lost) == (AbortedError, "UNEXPECTED_DEFAULT")
            assert await rewards.default() == "m@1"
            assert await rewards.models.set_default("m", "2", expected_current="m@1") == "m@1"
            assert (await rewards.reward.score([ITEM])).version == "2"
            assert (await rewards.reward.score([ITEM], model="m")).version == "2"
            assert await rewards.models.set_default("m", "2", expected_current="m@1") == "m@2"  # it is already
            switched = await rewards.models.set_default("other", "2", expected_current="other@1", name_only=True)
            assert switched == "other@1"
            assert (await rewards.reward.score([ITEM], model="other")).version == "2"
            assert await rewards.default() == "m@2"
            assert await rewards.models.set_default("other", "1", expected_current="m@2") == "m@2"
            result = await rewards.reward.score([ITEM])
            assert (result.model, result.version) == ("other", "1")

    run(scenario())


def test_a_repeat_of_a_request_gets_its_first_answer(tmp_path: Path) -> None:
    store_model(tmp_path, "m", "2")
    request_id = str(uuid.uuid4())

    async def scenario() -> None:
        async with serve_rewards(model_store=str(tmp_path)) as rewards:
            first, second = await asyncio.gather(
                rewards.models.load("m", "2", request_id=request_id),
                rewards.models.load("m", "2", request_id=request_id),
            )
            assert first == second
            assert rewards.served.value("tether_reward_model_loads_total", result="ok") == 1
            assert (await rewards.models.load("m", "2")).model_sha256 == first.model_sha256
            misused = rewards.models.load("m", "3", request_id=request_id)
            assert (await refused(misused))[0] is InvalidArgumentError
            call = str(uuid.uuid4())
            await rewards.models.set_default("m", "2", expected_current="m@1", request_id=call)
            await rewards.models.set_default("m", "1", expected_current="m@2")
            again = await rewards.models.set_default("m", "2", expected_current="m@1", request_id=call)
            assert again == "m@1" and await rewards.default() == "m@1"

    run(scenario())


def test_what_calls_need_is_not_unloaded(tmp_path: Path) -> None:
    for name, version in (("m", "2"), ("other", "1"), ("other", "2")):
        store_model(tmp_path, name, version)

    async def scenario() -> None:
        async with serve_rewards(model_store=str(tmp_path)) as rewards:
            assert (await refused(rewards.models.unload("m", "1"))) == (FailedPreconditionError, "LAST_MODEL")
            for name, version in (("m", "2"), ("other", "1"), ("other", "2")):
                await rewards.models.load(name, version)
            assert (await refused(rewards.models.unload("m", "1"))) == (FailedPreconditionError, "DEFAULT_MODEL")
            assert (await refused(rewards.models.unload("other", "1"))) == (FailedPreconditionError, "DEFAULT_VERSION")
            await rewards.models.set_shadow("m", "2", base="other@2")
            for name, version in (("m", "2"), ("other", "2")):
                assert (await refused(rewards.models.unload(name, version)))[1] == "SHADOWED"
            await rewards.models.clear_shadow()
            await rewards.models.unload("other", "2")
            await rewards.models.unload("other", "1")  # the last of its name
            assert (await refused(rewards.models.unload("other", "1")))[0] is NotFoundError
            assert (await refused(rewards.reward.score([ITEM], model="other")))[1] == "MODEL_NOT_FOUND"
            assert await rewards.states() == {"m@1": "serving", "m@2": "warm"}
            text = rewards.served.metrics()
            assert 'tether_reward_model_info{model="m"' in text and 'model="other"' not in text

    run(scenario())


def test_unloading_waits_for_calls_in_flight_and_no_new_one_gets_in() -> None:
    reward_rules.GATE.clear()

    async def scenario() -> None:
        async with serve_rewards(models=[fake_model("m", "1"), reward_rules.GATED_MODEL]) as rewards:
            (version,) = [m.version for m in (await rewards.models.list_loaded()).models if m.name == "gate"]
            waiting = asyncio.create_task(rewards.reward.score([ITEM], model="gate"))
            while [m.active_request_count for m in (await rewards.models.list_loaded()).models] != [0, 2]:
                await asyncio.sleep(0.01)  # the call, and the batch that is executed for it
            unloading = asyncio.create_task(rewards.models.unload("gate", version))
            while (await rewards.states())[f"gate@{version}"] != "draining":
                await asyncio.sleep(0.01)
            assert (await refused(rewards.reward.score([ITEM], model="gate")))[1] == "MODEL_NOT_FOUND"
            assert not unloading.done()
            reward_rules.GATE.set()
            assert (await waiting).scores[0].score == 1.0
            await unloading
            assert await rewards.states() == {"m@1": "serving"}

    run(scenario())


def test_a_batch_whose_caller_has_left_still_keeps_its_engine_open() -> None:
    reward_rules.GATE.clear()

    async def scenario() -> None:
        async with serve_rewards(models=[fake_model("m", "1"), reward_rules.GATED_MODEL]) as rewards:

            async def wait_for_users(count: int) -> str:
                while True:
                    (gate,) = [m for m in (await rewards.models.list_loaded()).models if m.name == "gate"]
                    if gate.active_request_count == count:
                        return gate.version
                    await asyncio.sleep(0.01)

            leaving = asyncio.create_task(rewards.reward.score([ITEM], model="gate"))
            version = await wait_for_users(2)
            leaving.cancel()
            await wait_for_users(1)  # the batch alone
            unloading = asyncio.create_task(rewards.models.unload("gate", version))
            while (await rewards.states())[f"gate@{version}"] != "draining":
                await asyncio.sleep(0.01)
            assert not unloading.done()
            reward_rules.GATE.set()
            await unloading

    run(scenario())


@pytest.mark.parametrize("stage", ["load_model", "warm_up"])
def test_others_are_served_while_one_loads_and_one_is_loaded_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    for version in ("2", "3"):
        store_model(tmp_path, "m", version)
    gate = asyncio.Event()
    real = getattr(loading, stage)

    async def slow(*arguments: Any, **options: Any) -> Any:
        await gate.wait()
        return await real(*arguments, **options)

    async def scenario() -> None:
        async with serve_rewards(model_store=str(tmp_path), max_models=2) as rewards:
            monkeypatch.setattr(loading, stage, slow)
            coming = asyncio.create_task(rewards.models.load("m", "2"))
            while "m@2" not in await rewards.states():
                await asyncio.sleep(0.01)
            assert await rewards.states() == {"m@1": "serving", "m@2": "loading"}
            assert (await rewards.reward.score([ITEM])).scores[0].score == oracle("1")
            assert (await refused(rewards.reward.score([ITEM], model="m@2")))[1] == "VERSION_NOT_FOUND"
            with pytest.raises(ResourceExhaustedError) as caught:
                await rewards.models.load("m", "3")
            assert caught.value.reason == "LOAD_IN_PROGRESS" and caught.value.retry_after_seconds
            gate.set()
            assert (await coming).state == "warm"
            full = rewards.models.load("m", "3")
            assert await refused(full) == (ResourceExhaustedError, "TOO_MANY_MODELS")
            await rewards.models.unload("m", "2")
            assert (await rewards.models.load("m", "3")).version == "3"

    run(scenario())


def test_a_load_that_fails_changes_nothing_and_the_next_one_passes(tmp_path: Path) -> None:
    write_policy(tmp_path / "m" / "policy")
    endless = {"name": "f", "engine": "fake", "gain": 1e308, "bias": -1e308}
    store_model(tmp_path, "m", "endless", components=[endless])
    store_model(tmp_path, "m", "unknown", components=[{"name": "f", "engine": "magic"}])
    store_model(tmp_path, "m", "renamed", version="other")
    (tmp_path / "m" / "broken").mkdir()
    (tmp_path / "m" / "broken" / "model.toml").write_text("= no", encoding="utf-8")
    (tmp_path / "m" / "empty").mkdir()
    store_model(tmp_path, "m", "2")

    async def scenario() -> None:
        async with serve_rewards(model_store=str(tmp_path)) as rewards:
            before = await rewards.models.list_loaded()
            for version in ("policy", "unknown", "renamed", "broken", "empty"):
                assert await refused(rewards.models.load("m", version)) == (
                    FailedPreconditionError,
                    "MODEL_LOAD_FAILED",
                ), version
            with pytest.raises(FailedPreconditionError, match="not a finite number"):
                await rewards.models.load("m", "endless")
            wrong = rewards.models.load("m", "2", expected_sha256="0" * 64)
            assert await refused(wrong) == (FailedPreconditionError, "WRONG_SHA256")
            assert (await refused(rewards.models.load("m", "nowhere")))[0] is NotFoundError
            assert await rewards.models.list_loaded() == before
            assert (await rewards.reward.score([ITEM])).scores[0].score == oracle("1")
            assert rewards.served.value("tether_reward_model_loads_total", result="failed") == 8
            loaded = await rewards.models.load("m", "2")
            assert (await rewards.models.load("m", "2", expected_sha256=loaded.model_sha256)) == loaded
            late = rewards.models.load("m", "2", expected_sha256="0" * 64)
            assert (await refused(late))[1] == "WRONG_SHA256"

    run(scenario())


@pytest.mark.parametrize("name", ["..", "../m", "m/1", "/m", "", "M", "m@1", "m\n", "a" * 65])
def test_names_are_never_paths(tmp_path: Path, name: str) -> None:
    store_model(tmp_path / "store", "m", "2")
    store_model(tmp_path, "m", "2")

    async def scenario() -> None:
        async with serve_rewards(model_store=str(tmp_path / "store")) as rewards:
            for call, field in ((rewards.models.load(name, "2"), "name"), (rewards.models.load("m", name), "version")):
                with pytest.raises(InvalidArgumentError) as caught:
                    await call
                assert caught.value.violations[0].field == field

    run(scenario())


def test_without_a_store_nothing_is_loaded() -> None:
    async def scenario() -> None:
        async with serve_rewards() as rewards:
            assert await refused(rewards.models.load("m", "2")) == (FailedPreconditionError, "NO_MODEL_STORE")

    run(scenario())


def test_control_and_scoring_are_reached_on_their_own_port_only() -> None:
    async def scenario() -> None:
        async with serve_rewards() as rewards:
            async with RewardModelClient(rewards.served.target, retries=False) as lost:
                assert (await refused(lost.list_loaded()))[0] is UnimplementedError
                assert (await refused(lost.load("m", "2")))[0] is UnimplementedError
            async with RewardClient(rewards.admin_target, retries=False) as lost_too:
                assert (await refused(lost_too.score([ITEM])))[0] is UnimplementedError

    run(scenario())


@pytest.mark.parametrize(("selector", "version"), [("", "1"), ("m", "1"), ("m@2", "2"), ("m@3", ""), ("n", "")])
def test_a_training_run_finds_the_version_that_its_calls_select(selector: str, version: str) -> None:
    async def scenario() -> str:
        async with serve_rewards(models=[fake_model("m", "1"), fake_model("m", "2")]) as rewards:
            remote = Remote("reward", rewards.reward, RetryPolicy(0, 0.001), RetryBudget(1))
            services, config = SimpleNamespace(reward=remote), SimpleNamespace(score_model=selector)
            return (await find_reward_model(cast(Services, services), cast(RunConfig, config))).version

    if version:
        assert run(scenario()) == version
    else:
        with pytest.raises(InvalidArgumentError, match="it has m@1, m@2"):
            run(scenario())


def test_real_models_and_adapters_are_loaded_from_the_store_and_score_what_they_did_elsewhere(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = write_classifier(tmp_path / "first", seed=1)
    second = write_classifier(store / "m" / "2", seed=2)
    (store / "m" / "adapter").mkdir(parents=True)
    adapter = write_adapter(store / "m" / "adapter", write_policy(store / "m" / "policy"))
    ids = [1, *(VOCABULARY[word] for word in ("the", "cat", "is", "happy"))]
    from transformers import AutoModelForSequenceClassification

    with torch.no_grad():
        expected = {
            version: float(
                AutoModelForSequenceClassification.from_pretrained(folder).eval()(torch.tensor([ids])).logits
            )
            for version, folder in (("1", first), ("2", second))
        }

    async def alone() -> float:
        async with serve_rewards(model=str(adapter)) as rewards:
            return (await rewards.reward.score([ScoreItem("the cat", "is happy")])).scores[0].score

    async def scenario(by_adapter: float) -> None:
        part = {"name": "score", "engine": "transformers", "path": str(first)}
        models = [{"name": "m", "version": "1", "components": [part]}]
        async with serve_rewards(models=models, model_store=str(store)) as rewards:
            for version in ("2", "adapter"):
                loaded = await rewards.models.load("m", version)
                assert (loaded.engine, loaded.state) == ("transformers", "warm")
            for version, score in (*expected.items(), ("adapter", by_adapter)):
                result = await rewards.reward.score([ScoreItem("the cat", "is happy")], model=f"m@{version}")
                assert result.scores[0].score == pytest.approx(score, abs=1e-5), version
            await rewards.models.set_default("m", "adapter", expected_current="m@1")
            await rewards.models.unload("m", "1")
            assert (await rewards.reward.score([ScoreItem("the cat", "is happy")])).version == "adapter"

    run(scenario(run(alone())))
