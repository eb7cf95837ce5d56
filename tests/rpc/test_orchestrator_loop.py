"""The training loop against real services over a loopback channel: generator and reference on a tiny random policy."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from pathlib import Path

import pytest

from tests.rpc.run_services import (
    generator_settings,
    run_services,
    small_run_toml,
    write_tiny_policy,
    write_word_prompts,
)
from tests.rpc.run_world import World, in_world, names
from tests.rpc.serving import run, serving
from tether.errors import (
    AbortedError,
    CancelledError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from tether.generator import GeneratorClient, SamplingParams
from tether_services.generator.service import GeneratorService
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.loop import run_step, run_training
from tether_services.orchestrator.records import RunState
from tether_services.orchestrator.report import build_report
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.orchestrator.session import open_session


@in_world()
async def test_a_run_of_three_steps_commits_publishes_and_agrees_with_its_services(w: World) -> None:
    async with w.begin() as session:
        await run_training(session)
    steps = w.ledger.list_steps("demo")
    assert [step.policy_version for step in steps] == [0, 1, 2]
    assert steps[0].metrics["kl_per_token"] == pytest.approx(0.0, abs=1e-5)
    assert steps[-1].metrics["kl_k3_per_token"] > 1e-6, "nothing was learned"
    for step in steps:
        assert step.metrics["first_ratio_deviation"] == 0.0
        assert step.metrics["mean_abs_dlogp"] < 1e-4
        assert step.metrics["probe_mean_abs_dlogp"] < 1e-4
        assert step.metrics["samples_generated"] == step.metrics["samples_trained"] == 8
    async with w.adapter_client() as adapters:
        active = await adapters.get_active_adapter()
    assert (active.run_id, active.policy_version) == ("demo", 3)
    assert w.ledger.get_run("demo").policy_version == 3
    report = build_report(w.ledger, "demo", state=RunState.SUCCEEDED, error="")
    assert (report["before"]["policy_version"], report["after"]["policy_version"]) == (0, 3)
    assert report["before"]["kl_per_response"] == pytest.approx(0.0, abs=1e-4)
    assert len(report["before"]["samples"]) == 4
    assert report["versions_as_expected"]


@in_world()
async def test_temperature_below_one_still_gives_kl_zero_at_step_zero(w: World) -> None:
    async with w.begin(extra="evaluation = false\n", ppo="temperature = 0.7") as session:
        record = await run_step(session, 0)
    assert record.metrics["kl_per_token"] == pytest.approx(0.0, abs=1e-5)
    assert record.metrics["mean_abs_dlogp"] < 1e-4


@in_world()
async def test_a_step_leaves_its_samples_its_adapter_and_its_checkpoint_in_the_ledger(w: World, tmp_path: Path) -> None:
    attempt = w.new_run(extra="evaluation = false")
    async with w.session(attempt) as session:
        await run_training(session)
    states = w.ledger.list_states("demo")
    for state in states:
        assert (state.samples.asked, state.samples.generated, state.samples.trained) == (8, 8, 8)
    newest = states[-1]
    assert newest.adapter_sha256 == hashlib.sha256(w.weights(attempt, 3)).hexdigest()
    assert newest.checkpoint is not None
    state_json = (attempt.directory / newest.checkpoint.path / "state.json").read_bytes()
    assert newest.checkpoint.sha256 == hashlib.sha256(state_json).hexdigest()
    assert [bool(state.checkpoint) for state in states] == [False, True, True]
    assert w.ledger.count_samples("demo") == {"trained": 24}
    with sqlite3.connect(tmp_path / "runs" / "ledger.sqlite") as connection:
        rows = connection.execute("SELECT sample, policy_version, adapter_sha256 FROM samples WHERE step = 1")
        assert rows.fetchall() == [(number, 1, states[0].adapter_sha256) for number in range(8)]


@in_world()
async def test_a_worker_that_lost_its_lease_stops_before_its_next_effect(w: World) -> None:
    attempt = w.new_run(extra="evaluation = false")
    config = parse_run_config(w.ledger.get_run("demo").config_toml)
    held = [True] * 3  # once at the take-over, once at the begin of the step, once at the export

    def check_lease() -> None:
        if not held:
            raise AbortedError("taken", reason="LEASE_LOST")
        held.pop()

    with pytest.raises(AbortedError, match="checkpoint: taken"):
        async with open_session(w.services.settings, config, w.ledger, attempt, check_lease=check_lease) as session:
            await run_step(session, 0)
    assert not (attempt.directory / "checkpoints").exists()
    assert w.ledger.list_steps("demo") == []
    async with w.adapter_client() as adapters:
        assert (await adapters.get_active_adapter()).policy_version == 0


@in_world()
async def test_a_new_run_takes_the_generator_over_from_an_older_one(w: World) -> None:
    old = w.new_run("old", "evaluation = false")
    async with w.session(old) as session:
        await run_step(session, 0)
    w.ledger.finish(old, RunState.FAILED)
    new = w.new_run("new", "evaluation = false")
    async with w.session(new) as session, w.adapter_client() as adapters:
        active = await adapters.get_active_adapter()
        assert (active.run_id, active.policy_version) == ("new", 0)
        await run_step(session, 0)


@in_world()
async def test_a_run_whose_generator_was_taken_stops_instead_of_fighting(w: World) -> None:
    async with w.begin(extra="evaluation = false") as session, w.adapter_client() as adapters:
        await adapters.activate("thief", 0, expected_run_id="demo", expected_policy_version=0, epoch=1)
        with pytest.raises(FailedPreconditionError, match="'thief' has taken the generator") as caught:
            await run_step(session, 0)
        assert caught.value.reason == "GENERATOR_TAKEN"


@in_world()
async def test_an_attempt_with_an_older_epoch_is_refused_by_the_generator(w: World) -> None:
    attempt = w.new_run(extra="evaluation = false")
    async with w.adapter_client() as adapters:
        await adapters.activate("demo", 0, expected_run_id="", expected_policy_version=0, epoch=7)
    with pytest.raises(AbortedError) as caught:
        async with w.session(attempt):
            pass
    assert caught.value.reason == "STALE_EPOCH"


@in_world()
async def test_a_restarted_generator_gets_the_current_version_again(w: World) -> None:
    attempt = w.new_run(extra="evaluation = false")
    settings = w.services.settings.model_copy(update={"max_retries": 20})
    config = parse_run_config(w.ledger.get_run("demo").config_toml)
    async with open_session(settings, config, w.ledger, attempt) as session:
        await run_step(session, 0)
        await w.services.generator.runner.close()
        again = generator_settings(w.model, address=settings.generator_address, admin_address=settings.adapter_address)
        async with serving(again, lambda r: GeneratorService(again, r)):
            record = await run_step(session, 1)
            assert record.policy_version == 1
            assert record.metrics["mean_abs_dlogp"] < 1e-4
            async with w.adapter_client() as adapters:
                assert (await adapters.get_active_adapter()).policy_version == 2


@pytest.mark.parametrize("name", ["reward", "reference", "generator"])
@in_world()
async def test_a_service_that_dies_in_a_run_is_named_within_the_retries(w: World, name: str) -> None:
    async with w.begin(extra="evaluation = false") as session:
        served = getattr(w.services, name)
        await served.runner.close()
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(run_step(session, 0), 60)
        assert caught.value.message.startswith(f"step 0, rollout: {name} at {served.target}: UNAVAILABLE after 2")
        assert w.ledger.get_run("demo").num_committed_steps == 0


def test_a_reference_with_another_base_is_refused_with_both_hashes(tmp_path: Path) -> None:
    async def scenario() -> None:
        model, prompts = write_tiny_policy(tmp_path / "policy"), write_word_prompts(tmp_path / "prompts.txt")
        other = write_tiny_policy(tmp_path / "other", seed=1)
        async with run_services(model, tmp_path / "runs", reference=other) as services:
            w = World(services, Ledger(tmp_path / "runs"), model, prompts)
            with pytest.raises(FailedPreconditionError, match="reference at") as caught:
                async with w.session(w.new_run()):
                    pass
            assert caught.value.reason == "BASE_MISMATCH"
            generated = await _base_sha256(services.settings.generator_address)
            assert generated in caught.value.message

    run(scenario(), timeout_seconds=120)


async def _base_sha256(target: str) -> str:
    async with GeneratorClient(target) as client:
        return (await client.get_generator()).base_model_sha256


@pytest.mark.parametrize(
    ("extra", "trainer", "field"),
    [
        ("max_response_tokens = 60", "", "max_prompt_tokens + max_response_tokens"),
        ('score_model = "unknown"', "", "score_model"),
        ("", "lora_rank = 32", "trainer.lora_rank"),
    ],
)
@in_world()
async def test_a_run_beyond_the_limits_of_a_service_is_refused_before_a_model_loads(
    w: World, extra: str, trainer: str, field: str
) -> None:
    text = small_run_toml(w.model, w.prompts)
    for line in filter(None, (extra, trainer)):
        key = line.split(" = ")[0]
        text = "\n".join(line if old.startswith(f"{key} =") else old for old in text.split("\n"))
    if extra.startswith("score_model"):
        text = extra + "\n" + text
    attempt = w.ledger.create_run("demo", config_toml=text, total_steps=3)
    with pytest.raises(InvalidArgumentError, match=r"at 127[.]0") as caught:
        async with w.session(attempt):
            pass
    assert caught.value.violations[0].field == field


@in_world()
async def test_a_cancelled_run_stops_before_its_next_step(w: World) -> None:
    attempt = w.new_run()
    w.ledger.request_cancel("demo")
    async with w.session(attempt) as session:
        with pytest.raises(CancelledError):
            await run_training(session)
    assert w.ledger.list_steps("demo") == []


@in_world()
async def test_the_canary_stops_a_run_whose_generator_samples_from_something_else(w: World) -> None:
    attempt = w.new_run(extra="evaluation = false", ppo="mismatch_limit = 1e-9")
    async with w.session(attempt) as session:
        with pytest.raises(FailedPreconditionError, match=r"step 0, train: generator and trainer") as caught:
            await run_step(session, 0)
    assert caught.value.reason == "LOGPROB_MISMATCH"
    assert w.ledger.list_steps("demo") == []
    assert not (attempt.directory / "checkpoints").exists()


@in_world()
async def test_checkpoints_and_adapters_are_kept_as_configured(w: World) -> None:
    attempt = w.new_run(extra="evaluation = false\nkeep_checkpoints = 1")
    async with w.session(attempt) as session:
        await run_training(session)
    assert names(attempt, "checkpoints") == ["000003-e1"]
    assert names(attempt, "adapters") == ["000003"]
    services = json.loads((attempt.directory / "services.json").read_text())
    assert services["generator"]["engine"] == "transformers"
    assert services["reward"]["engine"] == "fake"


@in_world()
async def test_the_same_seed_samples_the_same_and_another_seed_does_not(w: World) -> None:
    async with GeneratorClient(w.services.settings.generator_address) as client:
        prompt, sampling = (1, 5, 6), SamplingParams(max_tokens=8, seed=3)
        once = await client.generate(prompt, n=2, sampling=sampling)
        again = await client.generate(prompt, n=2, sampling=sampling)
        other = await client.generate(prompt, n=2, sampling=SamplingParams(max_tokens=8, seed=4))
        assert once.completions == again.completions
        assert once.completions != other.completions
        assert once.completions[0] != once.completions[1]
