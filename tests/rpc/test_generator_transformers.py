"""The embedded engine over gRPC, against plain transformers and PEFT forward passes of the packaged policy."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.rpc import generation_checks as checks
from tests.rpc.adapter_files import activate, begin_request, push, read_adapter, write_peft_adapter
from tests.rpc.generator_serving import (
    PACKAGED_POLICY,
    STORIES,
    Serving,
    generate_request,
    needs_stories,
    refusal,
    serve_generator,
    settings,
)
from tests.rpc.serving import health, run
from tether.errors import InvalidArgumentError
from tether.v1 import adapter_pb2, generator_pb2
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import LoadedAdapter
from tether_services.generator.engines.transformers import TransformersEngine
from tether_services.runtime.text import HfCodec

Scenario = Callable[[Serving], Awaitable[None]]
FAILED = grpc.StatusCode.FAILED_PRECONDITION


def real(model: Path = PACKAGED_POLICY, **changes: Any) -> GeneratorSettings:
    return settings(engine="transformers", model=str(model), device="cpu", **changes)


def with_server(scenario: Scenario, given: GeneratorSettings | None = None) -> None:
    async def main() -> None:
        async with serve_generator(given or real()) as serving:
            await scenario(serving)

    run(main(), timeout_seconds=240)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the packaged policy, of different rank and targets."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "one": write_peft_adapter(PACKAGED_POLICY, root / "one", seed=1),
        "two": write_peft_adapter(PACKAGED_POLICY, root / "two", seed=2, rank=8, targets=("q_proj", "down_proj")),
        "three": write_peft_adapter(PACKAGED_POLICY, root / "three", seed=3, rank=2, use_rslora=True),
    }


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> checks.Oracle:
    return checks.Oracle(PACKAGED_POLICY, folders)


def test_adapter_that_cannot_be_loaded_leaves_nothing_in_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    async def scenario(serving: Serving) -> None:
        engine = serving.service.engine
        assert isinstance(engine, TransformersEngine)
        broken = shutil.copytree(folders["one"], tmp_path / "broken")
        (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
        request: dict[str, Any] = {"max_tokens": 8, "seed": 5}
        before = await serving.generate(**request)
        for number in (1, 3):  # as the first adapter of the process, and beside one that is loaded
            with pytest.raises(Exception, match="header"):
                await engine.load_adapter(LoadedAdapter(number, f"broken{number}", "run-a", number, "", broken))
            assert [name for name in find_lora_names(engine) if name.startswith(f"adapter_{number}")] == []
            assert await serving.generate(**request) == before
            good = LoadedAdapter(number + 1, f"good{number}", "run-a", number + 1, "", folders["one"])
            await engine.load_adapter(good)
            assert find_lora_names(engine) >= {f"adapter_{number + 1}"}
            assert await serving.generate(**request) == before

    with_server(scenario)


def find_lora_names(engine: TransformersEngine) -> set[str]:
    """The adapters that have matrices in the model."""
    return {
        name.split(".lora_A.")[1].split(".")[0] for name, _ in engine._model.named_parameters() if ".lora_A." in name
    }


@needs_stories
def test_golden_story_is_reproduced_token_for_token() -> None:
    with_server(lambda serving: checks.check_golden_story(serving, STORIES), real(STORIES))


@needs_stories
def test_end_of_story_comes_from_the_generation_config() -> None:
    async def scenario(serving: Serving) -> None:
        state = await serving.generator.GetGenerator(generator_pb2.GetGeneratorRequest(), timeout=5)
        assert list(state.stop_token_ids) == [2, 1]
        assert (state.vocab_size, state.max_model_len) == (512, 512)

    with_server(scenario, real(STORIES))


def test_state_names_the_packaged_model(oracle: checks.Oracle) -> None:
    async def scenario(serving: Serving) -> None:
        state = await serving.generator.GetGenerator(generator_pb2.GetGeneratorRequest(), timeout=5)
        assert (state.engine, state.base_model) == ("transformers", "policy")
        assert state.base_model_sha256 == oracle.sha256
        assert state.vocab_size == oracle.model.config.vocab_size

    with_server(scenario)


def test_d8_logprobs_are_those_of_the_distribution_sampled_from(oracle: checks.Oracle) -> None:
    with_server(lambda serving: checks.check_logprobs(serving, oracle, tolerance=1e-5))


def test_greedy_logprobs_are_those_of_temperature_one(oracle: checks.Oracle) -> None:
    with_server(lambda serving: checks.check_greedy_logprobs(serving, oracle, tolerance=1e-5))


def test_seeds_are_reproducible_alone_and_in_company() -> None:
    with_server(checks.check_seeds)


def test_stop_ids_and_stop_texts_end_a_completion() -> None:
    with_server(checks.check_stops)


def test_each_version_has_its_own_output_through_swaps(oracle: checks.Oracle, folders: dict[str, Path]) -> None:
    with_server(lambda serving: checks.check_adapter_parity(serving, oracle, folders, tolerance=1e-5))


def test_base_and_adapters_are_served_side_by_side(oracle: checks.Oracle, folders: dict[str, Path]) -> None:
    with_server(lambda serving: checks.check_versions_side_by_side(serving, oracle, folders, tolerance=1e-5))


def test_fifty_swaps_under_sixteen_callers(oracle: checks.Oracle, folders: dict[str, Path]) -> None:
    with_server(lambda serving: checks.check_swaps_under_load(serving, oracle, folders, swaps=50))


def test_text_prompt_and_completion_pass_through_the_models_tokenizer() -> None:
    async def scenario(serving: Serving) -> None:
        codec = HfCodec(PACKAGED_POLICY)
        request = generate_request((), temperature=0.0)
        request.prompt = "Once upon a time </s> there was"
        response = await serving.generator.Generate(request, timeout=30)
        assert list(response.prompt_token_ids) == codec.encode(request.prompt, add_special_tokens=True)
        completion = response.completions[0]
        assert completion.text == codec.decode(list(completion.token_ids))

    with_server(scenario)


def test_messages_to_a_model_without_a_chat_template_are_a_failed_precondition() -> None:
    async def scenario(serving: Serving) -> None:
        request = generate_request(())
        request.messages.add(role="user", content="hi")
        refused = await refusal(serving.generator.Generate(request, timeout=10))
        assert (refused.code, refused.reason, refused.fields) == (FAILED, "NO_CHAT_TEMPLATE", ("messages",))

    with_server(scenario)


def test_adapter_with_zero_b_equals_the_base(tmp_path: Path, oracle: checks.Oracle) -> None:
    zero = write_peft_adapter(PACKAGED_POLICY, tmp_path / "zero", seed=1, scale=0.0)

    async def scenario(serving: Serving) -> None:
        base = await serving.generate((1, 40, 50), max_tokens=16, seed=1)
        same = oracle.probes(None)
        adapter = read_adapter(zero)
        fields = {"base_model_sha256": oracle.sha256, "probes": same}
        wrong = begin_request(adapter, "run-a", 1, differs_from_base=True, **fields)
        refused = await refusal(push(serving.adapters, wrong, adapter))
        assert (refused.code, refused.reason) == (FAILED, "SAME_AS_BASE")
        assert serving.stored_files() == []
        right = begin_request(adapter, "run-a", 1, differs_from_base=False, **fields)
        result = await push(serving.adapters, right, adapter)
        assert result.mean_abs_dlogp < 1e-5
        await activate(serving.adapters, "run-a", 1)
        served = await serving.generate((1, 40, 50), max_tokens=16, seed=1)
        assert served.policy_version == 1
        assert served.completions == base.completions

    with_server(scenario)


def test_adapter_whose_proofs_are_anothers_is_refused_and_the_old_one_serves_on(
    oracle: checks.Oracle, folders: dict[str, Path]
) -> None:
    async def scenario(serving: Serving) -> None:
        await checks.push_real(serving, oracle, "one", folders["one"], 1)
        await activate(serving.adapters, "run-a", 1)
        before = await serving.generate(seed=3)
        for claimed in ("one", None):
            adapter = read_adapter(folders["two"])
            fields = {"base_model_sha256": oracle.sha256, "probes": oracle.probes(claimed)}
            refused = await refusal(push(serving.adapters, begin_request(adapter, "run-a", 2, **fields), adapter))
            assert (refused.code, refused.reason) == (FAILED, "PROOF_FAILED")
        assert len(serving.stored_files()) == 2
        assert list(serving.service.engine._peft.peft_config) == ["adapter_1"]  # type: ignore[attr-defined]
        after = await serving.generate(seed=3)
        assert after == before
        assert await health(serving.served.target, "tether.v1.AdapterService") == 1

    with_server(scenario)


def test_targets_of_one_base_do_not_fit_another(tmp_path: Path, oracle: checks.Oracle) -> None:
    adapter = read_adapter(write_peft_adapter(PACKAGED_POLICY, tmp_path / "a", seed=1))

    async def scenario(serving: Serving) -> None:
        request = begin_request(adapter, "run-a", 1, probes=oracle.probes(None))  # hash of the fake base
        refused = await refusal(serving.adapters.BeginPush(request, timeout=5))
        assert (refused.code, refused.reason) == (FAILED, "WRONG_BASE_MODEL")
        head = begin_request(adapter, "run-a", 1, base_model_sha256=oracle.sha256, target_modules=["lm_head"])
        del head.probes[:]
        head.probes.extend(oracle.probes(None))
        refused = await refusal(serving.adapters.BeginPush(head, timeout=5))
        assert refused.reason == "UNKNOWN_TARGET_MODULE"

    with_server(scenario)


def test_request_that_runs_while_its_version_is_retired_finishes(
    oracle: checks.Oracle, folders: dict[str, Path]
) -> None:
    async def scenario(serving: Serving) -> None:
        await checks.push_real(serving, oracle, "one", folders["one"], 1)
        await activate(serving.adapters, "run-a", 1)
        running = asyncio.ensure_future(serving.generate((1, 40), n=4, max_tokens=300, ignore_eos=True))
        while serving.served.value("tether_generator_completions_in_flight") < 4:
            await asyncio.sleep(0.005)
        await checks.push_real(serving, oracle, "two", folders["two"], 2)
        await activate(serving.adapters, "run-a", 2)
        request = adapter_pb2.DeleteAdapterRequest(
            request_id="7f4df5d0-6b0c-4f57-9c29-0f0f0c3b1f10", run_id="run-a", policy_version=1, epoch=1
        )
        await serving.adapters.DeleteAdapter(request, timeout=10)
        response = await running
        assert response.policy_version == 1
        for completion in response.completions:
            assert checks.best_match(oracle, (1, 40), completion, list(folders)) == "one"
        await serving.service.adapters.settle()
        assert len(serving.stored_files()) == 2

    with_server(scenario)


@pytest.mark.alone
def test_cancelled_call_leaves_the_batch_and_others_go_on() -> None:
    async def scenario(serving: Serving) -> None:
        long = serving.generator.Generate(generate_request((1, 40), n=8, max_tokens=480, ignore_eos=True), timeout=60)
        while serving.served.value("tether_generator_completions_in_flight") < 8:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        long.cancel()
        started = time.monotonic()
        response = await serving.generate((1, 50), max_tokens=4)
        assert response.completions[0].token_ids
        # 480 steps of 8 rows take several seconds; a cancelled batch ends at its next step.
        assert time.monotonic() - started < 2.0

    with_server(scenario)


@pytest.mark.alone
def test_call_past_its_deadline_is_answered_at_once() -> None:
    async def scenario(serving: Serving) -> None:
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            request = generate_request((1, 40), n=8, max_tokens=480, ignore_eos=True)
            await serving.generator.Generate(request, timeout=0.3)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 1.3

    with_server(scenario)


def test_batches_are_measured() -> None:
    async def scenario(serving: Serving) -> None:
        assert serving.served.value("tether_generator_queue_limit") == 2048
        await asyncio.gather(*(serving.generate((1, 40 + i), max_tokens=4) for i in range(8)))
        batches = serving.served.value("tether_generator_batch_size_count")
        assert serving.served.value("tether_generator_batch_size_sum") == 8
        assert batches < 8
        assert serving.served.value("tether_generator_queue_depth") == 0

    with_server(scenario)


def test_requests_with_different_sampling_share_a_batch() -> None:
    async def scenario(serving: Serving) -> None:
        kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}]
        alone = [await serving.generate((1, 40), seed=1, **kind) for kind in kinds]
        before = serving.served.value("tether_generator_batch_size_count")
        together = await asyncio.gather(*(serving.generate((1, 40), seed=1, **kind) for kind in kinds))
        assert serving.served.value("tether_generator_batch_size_count") - before <= 2
        for one, other in zip(alone, together, strict=True):
            assert list(one.completions[0].token_ids) == list(other.completions[0].token_ids)

    with_server(scenario)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model", {"model": "/no/such/folder"}),
        ("max_model_len", {"model": str(PACKAGED_POLICY), "max_model_len": 9999}),
    ],
)
def test_bad_model_settings_name_the_setting(field: str, changes: dict[str, Any]) -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            async with serve_generator(settings(engine="transformers", **changes)):
                pass
        assert [violation.field for violation in caught.value.violations] == [field]

    run(scenario())
