"""`batch.mix_calls = false` with the real engines: the same bits whatever else is in flight."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.rpc.adapter_files import write_peft_adapter
from tests.rpc.generator_serving import PACKAGED_POLICY
from tests.rpc.serving import LOCAL, run, serving
from tether import GeneratorClient, LogprobItem, ReferenceClient, RewardClient, SamplingParams, ScoreItem
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engine import EngineCompletion, GenerateCall, LoadedAdapter, Sampling
from tether_services.generator.engines.transformers import TransformersEngine
from tether_services.generator.service import GeneratorService
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.metrics import QueueMetrics

PACKAGED_REWARD = PACKAGED_POLICY.parent / "reward"
ROUNDS = 6

Call = Callable[[int, int], Awaitable[object]]
"""Takes a seed and a number of items, and returns every number of the answer."""


def token_ids(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(3, 300) for _ in range(rng.randint(low, high))]


@asynccontextmanager
async def generator(batch: dict[str, Any]) -> AsyncIterator[Call]:
    settings = GeneratorSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "model": str(PACKAGED_POLICY), "dtype": "float32", "batch": batch}
    )
    async with (
        serving(settings, lambda registry: GeneratorService(settings, registry)) as served,
        GeneratorClient(served.target) as client,
    ):

        async def call(seed: int, count: int) -> object:
            prompt = token_ids(random.Random(seed), 2, 20)
            sampling = SamplingParams(max_tokens=6 + seed % 20, seed=seed, ignore_eos=True)
            result = await client.generate(prompt, n=count, sampling=sampling)
            return [(completion.token_ids, completion.logprobs) for completion in result.completions]

        yield call


@asynccontextmanager
async def reference(batch: dict[str, Any]) -> AsyncIterator[Call]:
    settings = ReferenceSettings.model_validate({**LOCAL, "model": str(PACKAGED_POLICY), "batch": batch})
    async with (
        serving(settings, lambda registry: ReferenceService(settings, registry)) as served,
        ReferenceClient(served.target) as client,
    ):

        async def call(seed: int, count: int) -> object:
            rng = random.Random(seed)
            items = [LogprobItem(token_ids(rng, 2, 20), token_ids(rng, 3, 30)) for _ in range(count)]
            return [item.ref_logprobs for item in (await client.compute_logprobs(items)).items]

        yield call


@asynccontextmanager
async def reward(batch: dict[str, Any]) -> AsyncIterator[Call]:
    settings = RewardSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "model": str(PACKAGED_REWARD), "batch": batch}
    )
    async with (
        serving(settings, lambda registry: RewardService(settings, registry)) as served,
        RewardClient(served.target) as client,
    ):

        async def call(seed: int, count: int) -> object:
            rng = random.Random(seed)
            items = [
                ScoreItem(prompt_token_ids=token_ids(rng, 2, 40), response_token_ids=token_ids(rng, 3, 200))
                for _ in range(3 * count)
            ]
            return [item.raw_score for item in (await client.score(items)).scores]

        yield call


async def answers_in_company(call: Call) -> tuple[object, list[object]]:
    """Return the answer to one call of 4 items alone, and its answers among other calls that come at the same time."""
    alone = await call(7, 4)
    rng = random.Random(0)
    crowded = []
    for _ in range(ROUNDS):
        others = [asyncio.ensure_future(call(rng.randrange(100, 10_000), rng.randint(1, 6))) for _ in range(5)]
        await asyncio.sleep(rng.random() * 0.01)
        crowded.append(await call(7, 4))
        await asyncio.gather(*others)
    return alone, crowded


@pytest.mark.parametrize("service", [generator, reference, reward])
def test_b5_the_bits_of_an_answer_do_not_depend_on_what_else_is_in_flight(service: Callable[..., Any]) -> None:
    async def main() -> None:
        async with service({"mix_calls": False}) as call:
            alone, crowded = await answers_in_company(call)
        assert crowded == [alone] * ROUNDS

    run(main(), timeout_seconds=120)


@pytest.mark.parametrize("service", [generator, reference, reward])
def test_b5_calls_that_share_a_batch_do_change_each_others_bits(service: Callable[..., Any]) -> None:
    """The control: otherwise the setting would be of no use, or the test above of no worth."""

    async def main() -> None:
        async with service({"mix_calls": True, "max_delay_seconds": 0.3}) as call:
            alone, crowded = await answers_in_company(call)
        assert any(answer != alone for answer in crowded)

    run(main(), timeout_seconds=120)


def test_b5_the_bits_of_an_adapter_do_not_depend_on_what_the_process_has_loaded_before(tmp_path: Path) -> None:
    """What a restarted generator, which gets one version again, must give beside one that has served for long."""
    ranks = {"first": 4, "second": 8, "third": 2}
    folders = {
        name: write_peft_adapter(PACKAGED_POLICY, tmp_path / name, seed=rank, rank=rank) for name, rank in ranks.items()
    }
    settings = GeneratorSettings.model_validate({"model": str(PACKAGED_POLICY), "dtype": "float32"})

    async def answers(*names: str) -> list[list[EngineCompletion]]:
        """Load adapters one after the other, and return what the base and the last one answer."""
        engine = TransformersEngine(settings, QueueMetrics("g", CollectorRegistry(), queue_limit=9))
        await engine.start()
        try:
            last: LoadedAdapter | None = None
            for number, name in enumerate(names, 1):
                last = LoadedAdapter(number, name, "run", number, "", folders[name])
                await engine.load_adapter(last)
                await engine.generate(GenerateCall((1, 40, 50), 2, Sampling(max_tokens=4, seed=1), last, 30.0))
            sampling = Sampling(max_tokens=12, seed=3, ignore_eos=True)
            return [
                await engine.generate(GenerateCall((1, 40, 50), 3, sampling, adapter, 30.0)) for adapter in (None, last)
            ]
        finally:
            await engine.close()

    async def main() -> None:
        restarted, long_lived = await answers("first"), await answers("second", "third", "first")
        assert restarted == long_lived
        assert restarted[0] != restarted[1], "the adapter does change something"
        assert restarted[0] == (await answers())[0], "nor does a base that has never seen an adapter differ"

    run(main(), timeout_seconds=120)
