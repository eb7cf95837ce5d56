"""Rollouts against the shipped fake engines, whose oracles say what every number must be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.rpc.byte_tokenizer import write_byte_tokenizer
from tests.rpc.serving import LOCAL, Served, run, serving
from tether.adapter import AdapterPush
from tether.errors import FailedPreconditionError, NotFoundError, UnavailableError
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.engines.fake import fake_logprob
from tether_services.generator.service import GeneratorService
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.fleet import Fleet
from tether_services.orchestrator.prompts import Prompt
from tether_services.orchestrator.publishing import LocalAdapter
from tether_services.orchestrator.records import Attempt
from tether_services.orchestrator.remote import Services, open_services
from tether_services.orchestrator.rollouts import Identities, Rollout, RolloutCollector, RolloutPlan
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.engines.fake import fake_ref_logprobs
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_score
from tether_services.reward.service import RewardService
from tether_services.runtime.fake_policy import FAKE_BASE_SHA256

PLAN = RolloutPlan(run_id="demo", n=3, temperature=1.0, max_tokens=12, score_model="")
PROMPTS = [Prompt(str(i), (1, 40 + i, 50)) for i in range(6)]
SEEDS = [100 + i for i in range(6)]


@dataclass(frozen=True, slots=True)
class World:
    """Fake services and a collector over them."""

    generator: Served
    services: Services
    fleet: Fleet
    collector: RolloutCollector

    async def collect(self, plan: RolloutPlan = PLAN, *, prompts: Sequence[Prompt] = PROMPTS) -> Rollout:
        return await self.collector.collect(prompts, SEEDS[: len(prompts)], plan)


@asynccontextmanager
async def world(*, concurrency: int = 64, token_seconds: float = 0.0, reward: object = None) -> AsyncIterator[World]:
    generating = GeneratorSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", "fake_token_seconds": token_seconds}
    )
    rewarding = RewardSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", **({"models": reward} if reward else {"engine": "fake"})}
    )
    referring = ReferenceSettings.model_validate({**LOCAL, "engine": "fake"})
    async with AsyncExitStack() as stack:
        generator = await stack.enter_async_context(serving(generating, lambda r: GeneratorService(generating, r)))
        scored = await stack.enter_async_context(serving(rewarding, lambda r: RewardService(rewarding, r)))
        compared = await stack.enter_async_context(serving(referring, lambda r: ReferenceService(referring, r)))
        settings = OrchestratorSettings(
            generator_address=generator.target,
            adapter_address=f"127.0.0.1:{generator.runner.bound_ports[1]}",
            reward_address=scored.target,
            reference_address=compared.target,
            concurrency=concurrency,
            max_retries=0,
        )
        services = await stack.enter_async_context(open_services(settings))
        fleet = await stack.enter_async_context(Fleet(services, Attempt("demo", 1, Path("unused"))))
        await fleet.take_over(None)
        yield World(generator, services, fleet, RolloutCollector(services, fleet, Identities(FAKE_BASE_SHA256)))


def test_d35_every_number_of_a_sample_is_the_oracles() -> None:
    async def scenario() -> None:
        async with world() as w:
            rollout = await w.collect()
        assert (rollout.num_generated, len(rollout.samples), rollout.dropped.total()) == (18, 18, 0)
        for sample in rollout.samples:
            prompt, response = sample.prompt.token_ids, sample.completion.token_ids
            whole = (*prompt, *response)
            expected = [fake_logprob(whole, len(prompt) + t, 0) for t in range(len(response))]
            assert sample.completion.logprobs == pytest.approx(expected, abs=1e-6)
            assert sample.ref_logprobs == pytest.approx(fake_ref_logprobs(prompt, response), abs=1e-6)
            assert sample.score == pytest.approx(fake_score(prompt, response))

    run(scenario())


def test_samples_come_in_the_order_of_the_prompts_whatever_arrives_first() -> None:
    async def scenario() -> None:
        async with world(concurrency=2, token_seconds=0.001) as w:
            rollout = await w.collect()
        assert [sample.prompt.text for sample in rollout.samples] == [str(i) for i in range(6) for _ in range(3)]

    run(scenario())


def test_the_result_does_not_depend_on_how_many_are_in_flight() -> None:
    async def scenario() -> None:
        async with world(concurrency=1) as one, world(concurrency=64) as many:
            first, second = await asyncio.gather(one.collect(), many.collect())
        assert first.samples == second.samples

    run(scenario())


def test_at_most_concurrency_prompts_are_generated_at_once() -> None:
    async def scenario() -> None:
        async with world(concurrency=2, token_seconds=0.01) as w:
            collecting = asyncio.create_task(w.collect(replace(PLAN, n=1)))
            most = 0.0
            while not collecting.done():
                most = max(most, w.generator.value("tether_generator_completions_in_flight"))
                await asyncio.sleep(0.005)
            assert len((await collecting).samples) == 6
        assert 1 <= most <= 2

    run(scenario())


def test_scoring_begins_before_the_last_prompt_is_generated() -> None:
    async def scenario() -> None:
        async with world(concurrency=1, token_seconds=0.005) as w:
            rollout = await w.collect()
        assert rollout.score.first_start is not None and rollout.generate.last_end is not None
        assert rollout.score.first_start < rollout.generate.last_end
        assert rollout.reference.first_start is not None
        assert rollout.reference.first_start < rollout.generate.last_end

    run(scenario())


def test_a_rollout_is_judged_by_the_version_that_it_asked_for_whatever_is_made_meanwhile() -> None:
    push = AdapterPush("demo", 1, FAKE_BASE_SHA256, 2, ("q_proj",), (), True)

    async def scenario() -> None:
        async with world(concurrency=1, token_seconds=0.005) as w:
            collecting = asyncio.create_task(w.collect())
            while not w.generator.value("tether_generator_completions_total", finish_reason="length"):
                await asyncio.sleep(0.005)
            assert not collecting.done()
            w.fleet._current = LocalAdapter(Path("unused"), "ab", 1, push)
            rollout = await collecting
            assert {(row.policy_version, row.adapter_sha256, row.dropped) for row in rollout.rows} == {(0, "", "")}
            assert len(rollout.samples) == 18

    run(scenario())


def test_generated_tokens_are_counted() -> None:
    async def scenario() -> None:
        async with world() as w:
            rollout = await w.collect()
        assert rollout.generated_tokens == sum(len(sample.completion.token_ids) for sample in rollout.samples)

    run(scenario())


def test_a_completion_that_cannot_be_scored_is_dropped_and_counted(tmp_path: Path) -> None:
    model = {
        "name": "picky",
        "tokenizer": str(write_byte_tokenizer(tmp_path)),
        "components": [{"name": "rule", "engine": "rules", "function": "tests.rpc.scoring_rules:refuse_some"}],
    }

    async def scenario() -> None:
        async with world(reward=[model]) as w:
            rollout = await w.collect(replace(PLAN, max_tokens=2, n=12))
            assert 0 < rollout.dropped["not_scored"] < 36
            assert rollout.num_generated == 72 == len(rollout.samples) + rollout.dropped["not_scored"]
            assert all(sample.score == 1.0 for sample in rollout.samples)

    run(scenario())


def test_a_reward_model_that_is_not_there_ends_the_rollout_by_name() -> None:
    async def scenario() -> None:
        async with world() as w:
            with pytest.raises(NotFoundError, match="reward at 127"):
                await w.collect(replace(PLAN, score_model="unknown"))

    run(scenario())


def test_the_first_failure_cancels_the_other_prompts() -> None:
    async def scenario() -> None:
        async with world(concurrency=1, token_seconds=0.01) as w:
            collecting = asyncio.create_task(w.collect(replace(PLAN, n=1)))
            await asyncio.sleep(0.05)
            await w.generator.runner.close()
            with pytest.raises((UnavailableError, FailedPreconditionError)):
                await asyncio.wait_for(collecting, 30)

    run(scenario())


def test_a_generator_that_lost_the_run_is_brought_back_once_for_all_prompts() -> None:
    async def scenario() -> None:
        async with world() as w:
            adapter = w.services.generators[0].adapter.client
            await adapter.activate("other", 0, expected_run_id="demo", expected_policy_version=0, epoch=1)
            with pytest.raises(FailedPreconditionError) as caught:
                await w.collect()
            assert caught.value.reason == "GENERATOR_TAKEN"
            await adapter.activate("demo", 0, expected_run_id="other", expected_policy_version=0, epoch=1)
            assert len((await w.collect()).samples) == 18

    run(scenario())
