"""The reward service over a real loopback channel."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import tether_services
from tests.rpc import reward_rules
from tests.rpc.serving import LOCAL, Served, health, run, serving
from tests.unit.tiny_reward import VOCABULARY, write_adapter, write_classifier, write_policy
from tether.errors import InternalError, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from tether.generator import Message
from tether.reward import RewardClient, ScoreItem
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import FAKE_REWARD_SHA256, fake_score, fake_text_score
from tether_services.reward.service import SERVICE_NAME, RewardService
from tether_services.runtime.metrics import new_registry
from tether_services.runtime.server import ServiceRunner
from tether_services.runtime.text import HfCodec

PACKAGED_MODEL = Path(tether_services.__file__).parent / "demo" / "models" / "reward"
Scenario = Callable[[RewardClient, Served], Awaitable[None]]
LENGTH = {
    "name": "length",
    "engine": "rules",
    "function": "tether_services.reward.rules:length_band",
    "arguments": {"low": 2, "high": 4},
}


def rule(name: str) -> dict[str, Any]:
    part = {"name": name, "engine": "rules", "function": f"tests.rpc.reward_rules:{name}"}
    return {"name": name, "components": [part]}


def with_reward(scenario: Scenario, **values: object) -> None:
    settings = RewardSettings.model_validate(LOCAL | values)

    async def main() -> None:
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as served,
            RewardClient(served.target, timeout_seconds=20) as client,
        ):
            await scenario(client, served)

    run(main())


def test_a_fake_score_equals_the_oracle_for_text_and_token_ids() -> None:
    async def scenario(client: RewardClient, served: Served) -> None:
        items = [
            ScoreItem(prompt="Once", response=" upon"),
            ScoreItem(prompt_token_ids=(1, 40), response_token_ids=(50, 2)),
            ScoreItem(response="alone"),
        ]
        result = await client.score(items)
        expected = [fake_text_score("Once", " upon"), fake_score((1, 40), (50, 2)), fake_text_score("", "alone")]
        assert [score.score for score in result.scores] == expected
        assert [score.raw_score for score in result.scores] == expected
        assert [score.token_count for score in result.scores] == [10, 4, 6]
        assert (result.model, result.version) == ("default", result.model_sha256[:12])
        assert not any(score.error or score.truncated for score in result.scores)

    with_reward(scenario, engine="fake")


def test_a_transformers_model_scores_text_chat_and_token_ids_alike(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")
    ids = [1, *(VOCABULARY[word] for word in ["the", "cat", "is", "happy"])]
    chat = [VOCABULARY[word] for word in ["user:", "the", "cat", "end", "assistant:", "happy", "end"]]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits[0, 0]) for row in (ids, chat)]

    async def scenario(client: RewardClient, served: Served) -> None:
        result = await client.score(
            [
                ScoreItem(prompt="the cat", response="is happy"),
                ScoreItem(prompt_token_ids=ids[:3], response_token_ids=ids[3:]),
                ScoreItem(messages=(Message("user", "the cat"), Message("assistant", "happy"))),
            ]
        )
        assert [score.score for score in result.scores] == pytest.approx(
            [expected[0], expected[0], expected[1]], abs=1e-5
        )
        assert [score.token_count for score in result.scores] == [5, 5, 7]

    with_reward(scenario, model=str(folder))


def test_preferences_are_on_the_scale_that_the_model_was_trained_on(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")
    (folder / "tether_reward.json").write_text('{"gain": 4.0, "bias": 0.5}')

    async def scenario(client: RewardClient, served: Served) -> None:
        found = await client.compare("the cat", ["is happy", "is sad"])
        first, second = found.scores
        assert first.score - second.score == pytest.approx(4.0 * (first.raw_score - second.raw_score))
        expected = 1 / (1 + math.exp(second.raw_score - first.raw_score))
        assert [pair.probability for pair in found.preferences] == pytest.approx([expected])

    with_reward(scenario, model=str(folder))


def test_components_come_back_beside_their_sum(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_policy(tmp_path / "policy"), gain=2.0, bias=0.5)
    parts = [
        {"name": "model", "engine": "transformers", "path": str(adapter), "weight": 0.5},
        LENGTH | {"weight": -3.0},
    ]

    async def scenario(client: RewardClient, served: Served) -> None:
        (score,) = (await client.score([ScoreItem(prompt="the cat", response="is happy on mat")])).scores
        assert [part.name for part in score.components] == ["model", "length"]
        assert [part.weight for part in score.components] == [0.5, -3.0]
        assert score.score == pytest.approx(sum(part.weight * part.value for part in score.components), abs=1e-12)
        raw = score.components[0].value / 2.0 + 0.5
        assert score.raw_score == pytest.approx(0.5 * raw - 3.0, abs=1e-9)
        (model,) = await client.list_reward_models()
        assert (model.engine, model.max_model_len, model.vocab_size) == ("transformers+rules", 40, len(VOCABULARY))
        assert (model.gain, model.bias) == (1.0, 0.0)

    with_reward(scenario, models=[{"name": "sum", "components": parts}])


def test_a_long_prompt_is_cut_and_said_to_be(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")

    async def scenario(client: RewardClient, served: Served) -> None:
        long, cut = (4,) * 100, (4,) * 45
        result = await client.score(
            [
                ScoreItem(prompt_token_ids=long, response_token_ids=(5, 6, 7)),
                ScoreItem(prompt_token_ids=cut, response_token_ids=(5, 6, 7)),
            ]
        )
        assert [score.truncated for score in result.scores] == [True, False]
        assert [score.token_count for score in result.scores] == [48, 48]
        assert result.scores[0].score == pytest.approx(result.scores[1].score, abs=1e-5)

    with_reward(scenario, model=str(folder))


def test_one_bad_item_leaves_the_scores_of_the_others() -> None:
    async def scenario(client: RewardClient, served: Served) -> None:
        items = [ScoreItem(response="1.5"), ScoreItem(response="x"), ScoreItem(response="nan"), ScoreItem(response="2")]
        first, raised, not_a_number, last = (await client.score([*items])).scores
        assert (first.score, last.score) == (1.5, 2.0)
        for index, score, reason in ((1, raised, "RULE_FAILED"), (2, not_a_number, "NON_FINITE_SCORE")):
            assert isinstance(score.error, InternalError)
            assert score.error.reason == reason
            assert score.error.violations[0].field == f"items[{index}]"
            assert math.isnan(score.score) and score.components == ()
        assert served.value("tether_reward_items_total", outcome="scored") == 2
        assert served.value("tether_reward_items_total", outcome="failed") == 2

    with_reward(scenario, models=[rule("number")])


def test_a_call_of_bad_items_only_still_answers() -> None:
    async def scenario(client: RewardClient, served: Served) -> None:
        result = await client.score([ScoreItem(), ScoreItem(prompt="p")])
        assert [type(score.error) for score in result.scores] == [InvalidArgumentError] * 2
        assert served.value("tether_reward_items_total", outcome="refused") == 2

    with_reward(scenario, engine="fake")


def test_models_are_chosen_by_name_and_version_and_listed_in_pages() -> None:
    fake = {"components": [{"name": "f", "engine": "fake"}]}
    models = [{"name": "first", "version": "1"} | fake, {"name": "second"} | fake, {"name": "third"} | rule("number")]
    models[2]["name"] = "third"

    async def scenario(client: RewardClient, served: Served) -> None:
        assert (await client.score([ScoreItem(response="1")])).model == "first"
        assert (await client.score([ScoreItem(response="1")], model="first", version="1")).version == "1"
        assert (await client.score([ScoreItem(response="7")], model="third")).scores[0].score == 7.0
        listed = await client.list_reward_models()
        assert [(model.name, model.default_model) for model in listed] == [
            ("first", True),
            ("second", False),
            ("third", False),
        ]
        assert (listed[0].vocab_size, listed[0].max_model_len, listed[0].max_items) == (259, 2048, 64)
        assert (listed[2].vocab_size, listed[2].max_model_len, listed[2].engine) == (0, 0, "rules")

    with_reward(scenario, models=models)


def test_comparison_ranks_and_gives_pairwise_probabilities() -> None:
    async def scenario(client: RewardClient, served: Served) -> None:
        result = await client.compare("p", ["1", "3", "1", "-2"])
        assert result.ranking == (1, 0, 2, 3)
        assert [score.score for score in result.scores] == [1.0, 3.0, 1.0, -2.0]
        assert [(pair.first, pair.second) for pair in result.preferences] == [
            (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3),
        ]  # fmt: skip
        values = [1.0, 3.0, 1.0, -2.0]
        for pair in result.preferences:
            expected = 1 / (1 + math.exp(values[pair.second] - values[pair.first]))
            assert pair.probability == pytest.approx(expected, abs=1e-12)

    with_reward(scenario, models=[rule("number")])


def test_many_calls_share_batches_and_each_gets_its_own_answers() -> None:
    async def scenario(client: RewardClient, served: Served) -> None:
        async def one(index: int) -> None:
            texts = [f"{index}-{place}" for place in range(3)]
            result = await client.score([ScoreItem(prompt="p", response=text) for text in texts])
            assert [score.score for score in result.scores] == [fake_text_score("p", text) for text in texts]

        await asyncio.gather(*(one(index) for index in range(40)))
        assert served.value("tether_reward_batch_size_sum") == 120
        assert served.value("tether_reward_batch_size_count") < 40
        assert served.value("tether_reward_queue_depth") == 0

    with_reward(scenario, engine="fake", batch={"max_delay_seconds": 0.05})


def test_a_full_queue_refuses_with_a_delay_and_the_service_recovers() -> None:
    reward_rules.GATE.clear()

    async def scenario(client: RewardClient, served: Served) -> None:
        waiting = [asyncio.create_task(client.score([ScoreItem(response="x")] * 4)) for _ in range(2)]
        while served.value("tether_reward_queue_depth") != 4:
            await asyncio.sleep(0.01)
        async with RewardClient(served.target, retries=False) as impatient:
            with pytest.raises(ResourceExhaustedError) as caught:
                await impatient.score([ScoreItem(response="x")])
        assert caught.value.retry_after_seconds == 1.0
        assert await health(served.target, SERVICE_NAME) == 1
        assert served.value("tether_reward_rejected_total", reason="queue_full") == 1
        reward_rules.GATE.set()
        results = await asyncio.gather(*waiting)
        assert all(score.score == 1.0 for result in results for score in result.scores)
        assert (await client.score([ScoreItem(response="x")])).scores[0].score == 1.0

    with_reward(scenario, models=[rule("wait_for_gate")], max_items=4, batch={"queue_limit": 4, "max_items": 4})


def test_a_call_without_room_is_refused_before_it_is_read() -> None:
    reward_rules.GATE.clear()

    async def scenario(client: RewardClient, served: Served) -> None:
        unreadable = [ScoreItem(response="")]
        assert (await client.score(unreadable)).scores[0].error is not None, "with room, the item has an error"
        waiting = [asyncio.create_task(client.score([ScoreItem(response="x")] * 4)) for _ in range(2)]
        while served.value("tether_reward_queue_depth") != 4:
            await asyncio.sleep(0.01)
        async with RewardClient(served.target, retries=False) as impatient:
            with pytest.raises(ResourceExhaustedError):
                await impatient.score(unreadable)
        reward_rules.GATE.set()
        await asyncio.gather(*waiting)

    with_reward(scenario, models=[rule("wait_for_gate")], max_items=4, batch={"queue_limit": 4, "max_items": 4})


def test_an_engine_that_hangs_turns_health_and_only_then_calls_are_refused() -> None:
    reward_rules.GATE.clear()

    async def scenario(client: RewardClient, served: Served) -> None:
        assert await health(served.target, SERVICE_NAME) == 1
        hanging = asyncio.create_task(client.score([ScoreItem(response="x")]))
        while await health(served.target, "liveness") == 1:
            await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError):
            await client.score([ScoreItem(response="x")])
        reward_rules.GATE.set()
        assert (await hanging).scores[0].score == 1.0
        while await health(served.target, SERVICE_NAME) != 1:
            await asyncio.sleep(0.05)
        assert (await client.score([ScoreItem(response="x")])).scores[0].score == 1.0

    with_reward(scenario, models=[rule("wait_for_gate")], liveness_seconds=0.3, rule_seconds=0.3)


def test_metrics_name_the_model_and_count_tokens() -> None:
    async def scenario(client: RewardClient, served: Served) -> None:
        result = await client.score([ScoreItem(prompt="ab", response="cd")])
        assert served.value("tether_reward_tokens_total") == 5
        labels = {"model": "m", "version": "v1", "sha256": result.model_sha256}
        assert served.value("tether_reward_model_info", **labels) == 1
        assert served.value("tether_reward_requests_total", method="Score", code="OK") == 1
        families = (
            "requests_total", "request_seconds", "queue_depth", "queue_limit", "queue_wait_seconds", "batch_size",
            "batch_tokens", "rejected_total", "items_total", "tokens_total", "model_info",
        )  # fmt: skip
        text = served.metrics()
        assert [name for name in families if f"tether_reward_{name}" not in text] == []
        assert FAKE_REWARD_SHA256 not in text

    models = [{"name": "m", "version": "v1", "components": [{"name": "f", "engine": "fake"}]}]
    with_reward(scenario, models=models)


def test_a_service_that_cannot_load_its_model_never_serves(tmp_path: Path) -> None:
    async def scenario(client: RewardClient, served: Served) -> None:
        raise AssertionError("it must not start")

    folder = write_policy(tmp_path / "policy")
    fake = {"name": "a", "components": [{"name": "f", "engine": "fake"}]}
    bad = {"name": "b", "components": [{"name": "f", "engine": "transformers", "path": str(folder)}]}
    with pytest.raises(InvalidArgumentError) as caught:
        with_reward(scenario, models=[fake, bad])
    assert caught.value.violations[0].field == "models[1].components[0].path"


def test_the_packaged_reward_model_serves_what_a_direct_forward_and_its_scale_give() -> None:
    scale = json.loads((PACKAGED_MODEL / "tether_reward.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(PACKAGED_MODEL.parent / "policy", num_labels=1)
    model = PeftModel.from_pretrained(base, str(PACKAGED_MODEL)).eval()
    prompt, responses = "Mia went to the park.", [" She was happy and smiled.", " She was sad and cried."]
    codec = HfCodec(PACKAGED_MODEL.parent / "policy")
    rows = [codec.encode(prompt + response, add_special_tokens=True) for response in responses]
    with torch.no_grad():
        raw = [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]

    async def scenario(client: RewardClient, served: Served) -> None:
        result = await client.score([ScoreItem(prompt=prompt, response=response) for response in responses])
        assert [score.raw_score for score in result.scores] == pytest.approx(raw, abs=1e-5)
        expected = [scale["gain"] * (value - scale["bias"]) for value in raw]
        assert [score.score for score in result.scores] == pytest.approx(expected, abs=1e-5)
        assert [score.token_count for score in result.scores] == [len(row) for row in rows]

    with_reward(scenario, model=str(PACKAGED_MODEL))


def test_a_bad_path_of_the_one_model_names_the_setting_that_was_typed() -> None:
    async def scenario(client: RewardClient, served: Served) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(InvalidArgumentError) as caught:
        with_reward(scenario, model="/no/such/folder")
    assert caught.value.violations[0].field == "model"


def test_health_answers_not_serving_while_the_model_loads(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")
    settings = RewardSettings.model_validate(LOCAL | {"model": str(folder)})

    async def main() -> list[int]:
        registry = new_registry()
        runner = ServiceRunner(settings, RewardService(settings, registry), registry)
        starting = asyncio.create_task(runner.start())
        while not runner.bound_ports:
            await asyncio.sleep(0.001)
        seen = []
        while not starting.done():
            seen.append(await health(f"127.0.0.1:{runner.bound_ports[0]}", SERVICE_NAME))
        await starting
        seen.append(await health(f"127.0.0.1:{runner.bound_ports[0]}", SERVICE_NAME))
        await runner.close()
        return seen

    statuses = run(main())
    assert statuses[0] == 2 and statuses[-1] == 1
