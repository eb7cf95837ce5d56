"""The generator on real vLLM over gRPC, against plain transformers and PEFT passes. One engine for the module."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tests.rpc import generation_checks as checks
from tests.rpc.adapter_files import (
    AdapterBytes,
    activate,
    begin_request,
    commit,
    list_adapters,
    push,
    read_adapter,
    upload,
    write_peft_adapter,
)
from tests.rpc.generator_serving import (
    PACKAGED_POLICY,
    Refusal,
    Serving,
    generate_request,
    refusal,
    serve_generator,
    settings,
)
from tests.rpc.serving import health
from tether.v1 import adapter_pb2, generator_pb2
from tether_services.generator.engine import LoadedAdapter

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning"),  # vLLM leaves its zmq context to the collector
]

FAILED = grpc.StatusCode.FAILED_PRECONDITION
MAX_RANK = 8


@dataclass(frozen=True)
class Running:
    """A generator on vLLM that lives on one event loop across tests."""

    serving: Serving
    runner: asyncio.Runner

    def check(self, scenario: Callable[[Serving], Awaitable[Any]], *, timeout_seconds: float = 240.0) -> Any:
        """Run a scenario against it."""

        async def bounded() -> Any:
            return await asyncio.wait_for(scenario(self.serving), timeout_seconds)

        return self.runner.run(bounded())


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    given = settings(
        engine="vllm", model=str(PACKAGED_POLICY), adapters={"max_rank": MAX_RANK}, gpu_memory_utilization=0.1
    )
    before = set(psutil.Process().children(recursive=True))
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        serving = runner.run(stack.enter_async_context(serve_generator(given)))
        yield Running(serving, runner)
        runner.run(stack.aclose())
    gc.collect()  # here, where the warning of the collector is expected
    _, alive = psutil.wait_procs(find_engine_processes() - before, timeout=15)
    assert not alive, "vLLM's processes outlive the service"


def find_engine_processes() -> set[psutil.Process]:
    """Children that vLLM started; multiprocessing's own helper process is not one of them."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if "VLLM" in process.name() or "VLLM" in " ".join(process.cmdline()):
                found.add(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "one": write_peft_adapter(PACKAGED_POLICY, root / "one", seed=1),
        "two": write_peft_adapter(PACKAGED_POLICY, root / "two", seed=2, rank=8, targets=("q_proj", "down_proj")),
        "three": write_peft_adapter(PACKAGED_POLICY, root / "three", seed=3, rank=2, use_rslora=True),
    }


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> checks.Oracle:
    return checks.Oracle(PACKAGED_POLICY, folders)


def test_state_names_the_engine_and_the_base(running: Running, oracle: checks.Oracle) -> None:
    async def scenario(serving: Serving) -> generator_pb2.GetGeneratorResponse:
        assert len(find_engine_processes()) >= 1
        return await serving.generator.GetGenerator(generator_pb2.GetGeneratorRequest(), timeout=5)

    state = running.check(scenario)
    assert (state.engine, state.base_model, state.max_lora_rank) == ("vllm", "policy", MAX_RANK)
    assert state.base_model_sha256 == oracle.sha256
    assert state.vocab_size == oracle.model.config.vocab_size


def test_logprobs_are_those_of_the_distribution_sampled_from(running: Running, oracle: checks.Oracle) -> None:
    running.check(lambda serving: checks.check_logprobs(serving, oracle, tolerance=1e-4))


def test_greedy_logprobs_are_those_of_temperature_one(running: Running, oracle: checks.Oracle) -> None:
    running.check(lambda serving: checks.check_greedy_logprobs(serving, oracle, tolerance=1e-4))


def test_seeds_are_reproducible_alone_and_in_company(running: Running) -> None:
    running.check(checks.check_seeds)


def test_stop_ids_and_stop_texts_end_a_completion(running: Running) -> None:
    running.check(checks.check_stops)


def test_each_version_has_its_own_output_through_swaps(
    running: Running, oracle: checks.Oracle, folders: dict[str, Path]
) -> None:
    running.check(
        lambda serving: checks.check_adapter_parity(serving, oracle, folders, tolerance=1e-4, run_id="parity")
    )


def test_base_and_adapters_are_served_side_by_side(
    running: Running, oracle: checks.Oracle, folders: dict[str, Path]
) -> None:
    for attempt in range(5):  # the mix of a batch is a matter of timing
        run_id = f"side-{attempt}"
        running.check(
            lambda serving, run_id=run_id: checks.check_versions_side_by_side(  # type: ignore[misc]
                serving, oracle, folders, tolerance=1e-4, run_id=run_id
            )
        )


def test_fifty_swaps_under_sixteen_callers(running: Running, oracle: checks.Oracle, folders: dict[str, Path]) -> None:
    running.check(lambda serving: checks.check_swaps_under_load(serving, oracle, folders, swaps=50, run_id="swaps"))


def test_request_for_an_unloaded_version_is_refused_and_the_engine_lives(running: Running) -> None:
    async def scenario(serving: Serving) -> None:
        for version in (77, 10_000):
            request = generate_request(policy_version=version)
            refused = await refusal(serving.generator.Generate(request, timeout=10))
            assert (refused.code, refused.reason) == (FAILED, "VERSION_NOT_LOADED")
        assert (await serving.generate(policy_version=0)).completions[0].token_ids

    running.check(scenario)


def test_bad_adapters_never_reach_vllm(running: Running, oracle: checks.Oracle, folders: dict[str, Path]) -> None:
    good = read_adapter(folders["one"])
    unknown_prefix = AdapterBytes(
        good.config, good.weights.replace(b"model.layers.0.", b"model.foobar.0."), good.rank, good.targets
    )
    truncated = AdapterBytes(good.config, good.weights[:-4], good.rank, good.targets)
    nan = AdapterBytes(good.config, good.weights[:-4] + b"\x00\x00\xc0\x7f", good.rank, good.targets)
    no_proof = AdapterBytes(good.config, good.weights, good.rank, good.targets)

    async def refuse(serving: Serving, adapter: AdapterBytes, proof: str | None) -> Refusal:
        fields: dict[str, Any] = {"base_model_sha256": oracle.sha256, "probes": oracle.probes(proof)}
        upload_id = await upload(serving.adapters, begin_request(adapter, "bad", 1, **fields), adapter.data)
        return await refusal(commit(serving.adapters, upload_id))

    async def scenario(serving: Serving) -> None:
        stored, loaded = serving.stored_files(), await serving.service.engine._llm.list_loras()  # type: ignore[attr-defined]
        assert (await refuse(serving, unknown_prefix, "one")).reason == "UNKNOWN_TENSOR"
        assert (await refuse(serving, truncated, "one")).reason == "NOT_SAFETENSORS"
        assert (await refuse(serving, nan, "one")).reason == "NOT_FINITE"
        assert (await refuse(serving, no_proof, "two")).reason == "PROOF_FAILED"
        big = begin_request(good, "bad", 1, base_model_sha256=oracle.sha256, rank=MAX_RANK + 1)
        assert (await refusal(serving.adapters.BeginPush(big, timeout=5))).reason == "RANK_TOO_LARGE"
        other = begin_request(good, "bad", 1)
        assert (await refusal(serving.adapters.BeginPush(other, timeout=5))).reason == "WRONG_BASE_MODEL"
        assert serving.stored_files() == stored
        assert await serving.service.engine._llm.list_loras() == loaded  # type: ignore[attr-defined]
        assert (await serving.generate(policy_version=0)).completions[0].token_ids
        assert await health(serving.served.target, "tether.v1.GeneratorService") == 1

    running.check(scenario)


def test_adapter_with_zero_b_equals_the_base(running: Running, oracle: checks.Oracle, tmp_path: Path) -> None:
    adapter = read_adapter(write_peft_adapter(PACKAGED_POLICY, tmp_path / "zero", seed=1, scale=0.0))
    fields: dict[str, Any] = {"base_model_sha256": oracle.sha256, "probes": oracle.probes(None)}

    async def scenario(serving: Serving) -> None:
        request = begin_request(adapter, "zero", 1, differs_from_base=False, **fields)
        await push(serving.adapters, request, adapter)
        await activate(serving.adapters, "zero", 1)
        served = await serving.generate((1, 40, 50), max_tokens=24, seed=1)
        base = await serving.generate((1, 40, 50), max_tokens=24, seed=1, policy_version=0)
        assert (served.policy_version, base.policy_version) == (1, 0)
        assert served.completions[0].token_ids == base.completions[0].token_ids
        differing = begin_request(adapter, "zero", 2, differs_from_base=True, **fields)
        refused = await refusal(push(serving.adapters, differing, adapter))
        assert (refused.code, refused.reason) == (FAILED, "SAME_AS_BASE")

    running.check(scenario)


def test_request_that_runs_while_its_version_is_retired_finishes(
    running: Running, oracle: checks.Oracle, folders: dict[str, Path]
) -> None:
    async def scenario(serving: Serving) -> None:
        await checks.push_real(serving, oracle, "one", folders["one"], 1, run_id="retire")
        await activate(serving.adapters, "retire", 1)
        running_call = asyncio.ensure_future(serving.generate((1, 40), n=2, max_tokens=300, ignore_eos=True))
        while serving.served.value("tether_generator_completions_in_flight") < 2:
            await asyncio.sleep(0.005)
        await checks.push_real(serving, oracle, "two", folders["two"], 2, run_id="retire")
        await activate(serving.adapters, "retire", 2)
        request = adapter_pb2.DeleteAdapterRequest(
            request_id=str(uuid.uuid4()), run_id="retire", policy_version=1, epoch=1
        )
        await serving.adapters.DeleteAdapter(request, timeout=10)
        assert (await list_adapters(serving.adapters))[("retire", 1)] == "RETIRING"
        response = await running_call
        assert response.policy_version == 1
        for completion in response.completions:
            assert checks.best_match(oracle, (1, 40), completion, list(folders)) == "one"
        await serving.service.adapters.settle()
        assert ("retire", 1) not in await list_adapters(serving.adapters)
        assert (await serving.generate()).policy_version == 2

    running.check(scenario)


def test_number_of_an_adapter_is_never_reused(running: Running, folders: dict[str, Path]) -> None:
    async def scenario(serving: Serving) -> None:
        engine = serving.service.engine
        adapter = LoadedAdapter(9001, "direct@1", "direct", 1, "", folders["one"])
        await engine.load_adapter(adapter)
        same_number = LoadedAdapter(9001, "direct@2", "direct", 2, "", folders["two"])
        with pytest.raises(RuntimeError, match="in use"):
            await engine.load_adapter(same_number)
        await engine.unload_adapter(adapter)
        assert 9001 not in await engine._llm.list_loras()  # type: ignore[attr-defined]

    running.check(scenario)


def test_a_busy_engine_proves_its_life_without_a_token(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may wait behind the prompts of others for longer than `liveness_seconds`; here it never comes."""

    async def scenario(serving: Serving) -> None:
        engine = serving.service.engine
        monkeypatch.setattr(engine, "compute_logprobs", lambda *_: asyncio.sleep(600))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.check(), 1)
        call = asyncio.ensure_future(serving.generate((1, 40), n=32, max_tokens=480, ignore_eos=True))
        while serving.served.value("tether_generator_completions_in_flight") < 32:
            await asyncio.sleep(0.005)
        await asyncio.wait_for(engine.check(), 5)
        assert not call.done(), "it was busy"
        await call

    running.check(scenario)


def test_cancelled_and_expired_calls_free_the_engine(running: Running) -> None:
    async def scenario(serving: Serving) -> None:
        long = generate_request((1, 40), n=32, max_tokens=480, ignore_eos=True)
        call = serving.generator.Generate(long, timeout=60)
        while serving.served.value("tether_generator_completions_in_flight") < 32:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.generator.Generate(long, timeout=0.5)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        llm = serving.service.engine._llm  # type: ignore[attr-defined]

        def is_free() -> bool:
            in_flight = serving.served.value("tether_generator_completions_in_flight")
            return in_flight == 0 and not llm.output_processor.has_unfinished_requests()

        for _ in range(100):
            if is_free():
                break
            await asyncio.sleep(0.05)
        assert is_free()
        assert (await serving.generate()).completions[0].token_ids

    running.check(scenario)


def test_completions_beyond_the_places_wait_their_turn(running: Running) -> None:
    async def scenario(serving: Serving) -> None:
        responses = await asyncio.gather(*(serving.generate((1, 40 + i), n=32, max_tokens=4) for i in range(4)))
        assert [len(response.completions) for response in responses] == [32] * 4
        assert serving.served.value("tether_generator_queue_depth") == 0
        assert serving.served.value("tether_generator_queue_wait_seconds_count") >= 128

    running.check(scenario)
