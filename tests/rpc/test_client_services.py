"""The clients against the real services with their fake engines: every value is the oracle's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.rpc.adapter_files import fake_adapter, fake_probe
from tests.rpc.serving import LOCAL, Served, run, serving
from tether import (
    AbortedError,
    AdapterClient,
    AdapterProbe,
    AdapterPush,
    FailedPreconditionError,
    GeneratorClient,
    InvalidArgumentError,
    LogprobItem,
    Message,
    NotFoundError,
    PushResult,
    ReferenceClient,
    RewardClient,
    SamplingParams,
    ScoreItem,
)
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion
from tether_services.generator.service import GeneratorService
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engines.fake import fake_entropies, fake_ref_logprobs
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_score, fake_text_score
from tether_services.reward.service import RewardService
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256
from tether_services.runtime.text import ByteCodec
from tether_services.runtime.text import Message as ServiceMessage


@asynccontextmanager
async def generator() -> AsyncIterator[tuple[GeneratorClient, AdapterClient]]:
    settings = GeneratorSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    async with serving(settings, lambda registry: GeneratorService(settings, registry)) as served:
        admin = f"127.0.0.1:{served.runner.bound_ports[1]}"
        async with GeneratorClient(served.target) as client, AdapterClient(admin) as adapters:
            yield client, adapters


def with_generator(use: Callable[[GeneratorClient, AdapterClient], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with generator() as (client, adapters):
            await use(client, adapters)

    run(scenario())


def with_reward(use: Callable[[RewardClient], Awaitable[None]]) -> None:
    settings = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})

    async def scenario() -> None:
        served: Served
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as served,
            RewardClient(served.target) as client,
        ):
            await use(client)

    run(scenario())


def with_reference(use: Callable[[ReferenceClient], Awaitable[None]]) -> None:
    settings = ReferenceSettings.model_validate({**LOCAL, "engine": "fake"})

    async def scenario() -> None:
        async with (
            serving(settings, lambda registry: ReferenceService(settings, registry)) as served,
            ReferenceClient(served.target) as client,
        ):
            await use(client)

    run(scenario())


PROMPT = (1, 40, 41, 42)


def test_token_ids_give_the_oracles_completions() -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        result = await client.generate(PROMPT, n=3, sampling=SamplingParams(max_tokens=20, seed=5))
        assert result.prompt_token_ids == PROMPT
        assert (result.policy_version, result.adapter_sha256, result.run_id) == (0, "", "")
        for index, completion in enumerate(result.completions):
            expected = fake_completion(PROMPT, Sampling(max_tokens=20), 0, stream=derive_seed(5, index))
            assert completion.token_ids == tuple(expected.token_ids)
            assert completion.logprobs == pytest.approx(list(expected.logprobs), abs=1e-6)
            assert completion.finish_reason == expected.finish_reason
            assert completion.text == ByteCodec().decode(expected.token_ids)

    with_generator(use)


def test_text_and_chat_are_encoded_by_the_service() -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        text = await client.generate("Hi", sampling=SamplingParams(max_tokens=1))
        assert text.prompt_token_ids == tuple(ByteCodec().encode("Hi", add_special_tokens=True))
        chat = await client.generate([Message("user", "Hi")], sampling=SamplingParams(max_tokens=1))
        expected = ByteCodec().encode_chat([ServiceMessage("user", "Hi")], add_generation_prompt=True)
        assert chat.prompt_token_ids == tuple(expected)

    with_generator(use)


def test_every_sampling_parameter_arrives() -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        endless = SamplingParams(max_tokens=200, seed=1, ignore_eos=True)
        (completion,) = (await client.generate(PROMPT, sampling=endless)).completions
        assert (len(completion.token_ids), completion.finish_reason) == (200, "length")
        first, letter = completion.token_ids[0], completion.text[0]
        stopping = SamplingParams(max_tokens=200, seed=1, stop_token_ids=[first])
        (completion,) = (await client.generate(PROMPT, sampling=stopping)).completions
        assert (completion.token_ids, completion.finish_reason) == ((first,), "stop")
        until = SamplingParams(max_tokens=200, seed=1, stop=[letter])
        (completion,) = (await client.generate(PROMPT, sampling=until)).completions
        assert completion.text.endswith(letter) and completion.finish_reason == "stop"

    with_generator(use)


BAD_SAMPLING = [
    (SamplingParams(temperature=float("nan")), "sampling.temperature"),
    (SamplingParams(temperature=-1), "sampling.temperature"),
    (SamplingParams(top_p=0), "sampling.top_p"),
    (SamplingParams(top_k=-1), "sampling.top_k"),
    (SamplingParams(max_tokens=0), "sampling.max_tokens"),
    (SamplingParams(seed=-1), "sampling.seed"),
]


@pytest.mark.parametrize(("sampling", "field"), BAD_SAMPLING, ids=[field for _s, field in BAD_SAMPLING])
def test_bad_sampling_names_the_field_and_the_service_goes_on(sampling: SamplingParams, field: str) -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await client.generate(PROMPT, sampling=sampling)
        assert caught.value.violations[0].field == field
        assert (await client.generate(PROMPT)).completions

    with_generator(use)


def test_an_empty_prompt_is_refused_in_each_of_its_forms() -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        empty: tuple[str | list[int], ...] = ("", [])
        for prompt in empty:
            with pytest.raises(InvalidArgumentError):
                await client.generate(prompt)

    with_generator(use)


def test_a_version_that_is_not_loaded_is_a_failed_precondition() -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        with pytest.raises(FailedPreconditionError) as caught:
            await client.generate(PROMPT, policy_version=7)
        assert caught.value.reason == "VERSION_NOT_LOADED"

    with_generator(use)


def test_the_state_of_the_generator() -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        state = await client.get_generator()
        assert (state.engine, state.base_model_sha256) == ("fake", FAKE_BASE_SHA256)
        assert state.vocab_size == ByteCodec.vocab_size
        assert state.loaded_policy_versions == (0,)
        assert state.max_n == 64 and state.stop_token_ids == (ByteCodec.eos_id,)

    with_generator(use)


async def push_version(adapters: AdapterClient, folder: Path, version: int) -> PushResult:
    adapter = fake_adapter(version)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(adapter.config)
    (folder / "adapter_model.safetensors").write_bytes(adapter.weights)
    probe = fake_probe(version)
    push = AdapterPush(
        run_id="run-a",
        policy_version=version,
        base_model_sha256=FAKE_BASE_SHA256,
        rank=adapter.rank,
        target_modules=adapter.targets,
        probes=[AdapterProbe(probe.token_ids, probe.logprobs)],
        differs_from_base=True,
    )
    return await adapters.push(folder, push, epoch=1)


def test_a_pushed_adapter_is_proven_activated_used_and_rolled_back(tmp_path: Path) -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        await adapters.activate("run-a", 0, expected_run_id="", expected_policy_version=0, epoch=1)
        for version in (1, 2):
            result = await push_version(adapters, tmp_path, version)
            assert result.mean_abs_dlogp < 1e-5
            assert [stage.name for stage in result.stages] == ["hash", "header", "tensors", "store", "load", "prove"]
            before = await adapters.activate(
                "run-a", version, expected_run_id="run-a", expected_policy_version=version - 1, epoch=1
            )
            assert before == version - 1
        active = await adapters.get_active_adapter()
        assert active.adapter is not None and active.adapter.state == "active"
        sampled = await client.generate(PROMPT, sampling=SamplingParams(max_tokens=10, seed=3))
        assert (sampled.policy_version, sampled.adapter_sha256) == (2, active.adapter.sha256)
        expected = fake_completion(PROMPT, Sampling(max_tokens=10), 2, stream=derive_seed(3, 0))
        assert sampled.completions[0].token_ids == tuple(expected.token_ids)
        assert await adapters.rollback("run-a", expected_policy_version=2, epoch=1) == 1
        assert (await client.generate(PROMPT)).policy_version == 1
        await adapters.delete("run-a", 2, epoch=1)
        for _ in range(100):  # unloading takes its time
            if len(left := await adapters.list_adapters()) == 1:
                break
            assert left[1].state == "retiring"
            await asyncio.sleep(0.05)
        assert [adapter.policy_version for adapter in left] == [1]
        with pytest.raises(NotFoundError):
            await adapters.delete("run-a", 2, epoch=1)

    with_generator(use)


def test_a_lost_compare_and_set_is_aborted(tmp_path: Path) -> None:
    async def use(client: GeneratorClient, adapters: AdapterClient) -> None:
        await adapters.activate("run-a", 0, expected_run_id="", expected_policy_version=0, epoch=1)
        with pytest.raises(AbortedError):
            await adapters.activate("run-b", 0, expected_run_id="", expected_policy_version=0, epoch=1)

    with_generator(use)


def test_text_and_token_ids_give_the_oracles_scores() -> None:
    async def use(client: RewardClient) -> None:
        result = await client.score(
            [ScoreItem("Once", " upon"), ScoreItem(prompt_token_ids=[1, 5], response_token_ids=[6])]
        )
        assert [score.score for score in result.scores] == [fake_text_score("Once", " upon"), fake_score([1, 5], [6])]
        assert result.model == "default" and len(result.model_sha256) == 64

    with_reward(use)


def test_a_bad_item_has_its_error_beside_the_scores_of_the_others() -> None:
    async def use(client: RewardClient) -> None:
        result = await client.score([ScoreItem("a", "b"), ScoreItem("a", "")])
        assert result.scores[0].error is None
        assert isinstance(result.scores[1].error, InvalidArgumentError)

    with_reward(use)


def test_responses_are_ranked_by_their_scores() -> None:
    async def use(client: RewardClient) -> None:
        responses = ["one", "two", "three", "four"]
        result = await client.compare("count", responses)
        scores = [fake_text_score("count", response) for response in responses]
        assert list(result.ranking) == sorted(range(4), key=lambda index: -scores[index])
        assert len(result.preferences) == 6 and all(0 < pair.probability < 1 for pair in result.preferences)
        with pytest.raises(InvalidArgumentError):
            await client.compare("count", ["one"])

    with_reward(use)


def test_an_unknown_reward_model_is_not_found() -> None:
    async def use(client: RewardClient) -> None:
        with pytest.raises(NotFoundError):
            await client.score([ScoreItem("a", "b")], model="nonsense")
        (model,) = await client.list_reward_models()
        assert model.default_model and (await client.score([ScoreItem("a", "b")], model=model.name)).scores

    with_reward(use)


def test_ref_logprobs_and_entropies_are_the_oracles() -> None:
    async def use(client: ReferenceClient) -> None:
        items = [LogprobItem([1, 2, 3], [4, 5]), LogprobItem([9], [8, 7, 6])]
        plain = await client.compute_logprobs(items, temperature=0.7)
        full = await client.compute_logprobs(items, include_entropies=True)
        for item, bare, rich in zip(items, plain.items, full.items, strict=True):
            expected = fake_ref_logprobs(item.prompt_token_ids, item.response_token_ids)
            assert bare.ref_logprobs == pytest.approx(expected, abs=1e-6)
            assert bare.entropies == ()
            entropies = fake_entropies(item.prompt_token_ids, item.response_token_ids)
            assert rich.entropies == pytest.approx(entropies, abs=1e-6)
        assert plain.base_model_sha256 == (await client.get_reference()).base_model_sha256
        with pytest.raises(InvalidArgumentError, match="items"):
            await client.compute_logprobs([LogprobItem([], [1])])

    with_reference(use)


def test_many_calls_in_flight_share_one_channel() -> None:
    async def use(client: RewardClient) -> None:
        results = await asyncio.gather(*(client.score([ScoreItem("p", str(n))]) for n in range(100)))
        assert [r.scores[0].score for r in results] == [fake_text_score("p", str(n)) for n in range(100)]

    with_reward(use)
