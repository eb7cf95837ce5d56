"""Swapping adapters under load: no call fails and every response is exactly one version's."""

from __future__ import annotations

import asyncio
import random

from tests.rpc.adapter_files import activate, begin_request, fake_adapter, push
from tests.rpc.generator_serving import Serving, serve_generator, settings
from tests.rpc.serving import run
from tether.v1 import generator_pb2
from tether_services.generator.engine import Sampling, derive_seed
from tether_services.generator.engines.fake import fake_completion

NUM_SWAPS = 50
NUM_CALLERS = 16


def check_against_oracle(response: generator_pb2.GenerateResponse, seed: int) -> None:
    """Every completion must be that of the version which the response names, and of no other."""
    for index, completion in enumerate(response.completions):
        expected = fake_completion(
            response.prompt_token_ids,
            Sampling(12, seed=seed),
            response.policy_version,
            stream=derive_seed(seed, index),
        )
        assert list(completion.token_ids) == expected.token_ids
        assert all(abs(a - b) < 1e-6 for a, b in zip(completion.logprobs, expected.logprobs, strict=True))


async def call_until(serving: Serving, done: asyncio.Event, seed: int) -> list[int]:
    """Generate again and again and return the versions seen."""
    rng = random.Random(seed)
    versions = []
    while not done.is_set():
        prompt = [rng.randrange(3, 250) for _ in range(rng.randint(1, 12))]
        response = await serving.generate(prompt, n=2, max_tokens=12, seed=seed)
        check_against_oracle(response, seed)
        versions.append(response.policy_version)
    return versions


def test_fifty_swaps_under_sixteen_callers_fail_no_call_and_mix_no_version() -> None:
    async def scenario() -> None:
        slow = settings(fake_token_seconds=0.001)
        async with serve_generator(slow) as serving:
            done = asyncio.Event()
            callers = [asyncio.ensure_future(call_until(serving, done, seed)) for seed in range(NUM_CALLERS)]
            for version in range(1, NUM_SWAPS + 1):
                adapter = fake_adapter(version)
                await push(serving.adapters, begin_request(adapter, "run-a", version), adapter)
                await activate(serving.adapters, "run-a", version)
                # New requests use the new version from the moment on at which the activation is answered.
                assert (await serving.generate()).policy_version == version
            done.set()
            seen = await asyncio.gather(*callers)
            assert all(versions == sorted(versions) for versions in seen)
            assert len(set().union(*seen)) > NUM_SWAPS // 2
            await serving.service.adapters.settle()
            assert len(serving.stored_files()) == 2 * 3
            assert serving.served.value("tether_generator_requests_total", method="Generate", code="OK") > NUM_SWAPS

    run(scenario(), timeout_seconds=120)


def test_many_versions_leave_no_adapter_in_the_engine_that_is_not_on_disk() -> None:
    async def scenario() -> None:
        async with serve_generator(settings(adapters={"keep_versions": 1})) as serving:
            for version in range(1, 21):
                adapter = fake_adapter(version)
                await push(serving.adapters, begin_request(adapter, "run-a", version), adapter)
                await activate(serving.adapters, "run-a", version)
            await serving.service.adapters.settle()
            (version_left,) = serving.service.adapters.all()
            assert version_left.adapter.policy_version == 20
            assert version_left.adapter.number == 20
            assert {path.parent for path in serving.stored_files()} == {version_left.adapter.folder}

    run(scenario())
