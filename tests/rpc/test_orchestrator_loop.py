"""The training loop against real services over a loopback channel: generator and reference on a tiny random policy."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rpc.run_services import (
    RunServices,
    generator_settings,
    run_services,
    small_run_toml,
    write_tiny_policy,
    write_word_prompts,
)
from tests.rpc.serving import LOCAL, run, serving
from tether.adapter import AdapterClient
from tether.errors import (
    AbortedError,
    CancelledError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from tether.generator import GeneratorClient, SamplingParams
from tether_services.generator.service import GeneratorService
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.loop import run_step, run_training
from tether_services.orchestrator.publishing import LocalAdapter, PushFigures
from tether_services.orchestrator.records import Attempt, RunState, StepOutcome, StepRecord
from tether_services.orchestrator.report import build_report
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.orchestrator.session import Session, open_session
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.fault_points import PLAN_VARIABLE, arm


@dataclass(frozen=True, slots=True)
class World:
    """Services, a ledger, and the files of runs."""

    services: RunServices
    ledger: Ledger
    model: Path
    prompts: Path

    def new_run(self, run_id: str = "demo", extra: str = "", *, ppo: str = "", trainer: str = "") -> Attempt:
        text = small_run_toml(self.model, self.prompts, extra, ppo=ppo, trainer=trainer)
        total = parse_run_config(text).total_steps
        return self.ledger.create_run(run_id, config_toml=text, total_steps=total)

    @asynccontextmanager
    async def session(self, attempt: Attempt) -> AsyncIterator[Session]:
        config = parse_run_config(self.ledger.get_run(attempt.run_id).config_toml)
        async with open_session(self.services.settings, config, self.ledger, attempt) as session:
            yield session

    def adapter_client(self) -> AdapterClient:
        return AdapterClient(self.services.settings.adapter_address)

    def weights(self, attempt: Attempt, version: int) -> bytes:
        return (attempt.directory / "adapters" / f"{version:06d}" / "adapter_model.safetensors").read_bytes()


@asynccontextmanager
async def world(folder: Path, *, one_by_one: bool = False) -> AsyncIterator[World]:
    model, prompts = write_tiny_policy(folder / "policy"), write_word_prompts(folder / "prompts.txt")
    async with run_services(model, folder / "runs", one_by_one=one_by_one) as services:
        yield World(services, Ledger(folder / "runs"), model, prompts)


def test_a_run_of_three_steps_commits_publishes_and_agrees_with_its_services(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run()
            async with w.session(attempt) as session:
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

    run(scenario(), timeout_seconds=120)


def test_temperature_below_one_still_gives_kl_zero_at_step_zero(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false\n", ppo="temperature = 0.7")
            async with w.session(attempt) as session:
                record = await run_step(session, 0)
            assert record.metrics["kl_per_token"] == pytest.approx(0.0, abs=1e-5)
            assert record.metrics["mean_abs_dlogp"] < 1e-4

    run(scenario(), timeout_seconds=120)


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_interrupted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, one_by_one=True) as w:
            whole = w.new_run("whole", "evaluation = false")
            async with w.session(whole) as session:
                await run_training(session)
            w.ledger.finish(whole, RunState.SUCCEEDED)
            first = w.new_run("parts", "evaluation = false")
            async with w.session(first) as session:
                await run_step(session, 0)
                await run_step(session, 1)
            w.ledger.finish(first, RunState.FAILED, error="killed")
            second = w.ledger.begin_attempt("parts")
            async with w.session(second) as session:
                assert session.trainer.num_updates == 2
                await run_training(session)
            assert w.weights(second, 3) == w.weights(whole, 3)
            assert [s.metrics["score_mean"] for s in w.ledger.list_steps("parts")] == [
                s.metrics["score_mean"] for s in w.ledger.list_steps("whole")
            ]

    run(scenario(), timeout_seconds=120)


def test_a_step_that_is_not_committed_never_reaches_the_generator(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            first = w.new_run(extra="evaluation = false")
            async with w.session(first) as session:
                await run_step(session, 0)
                refuse_commits(session.ledger)
                with pytest.raises(AbortedError, match="step 1, commit: over"):
                    await run_step(session, 1)
            del session.ledger.commit_step
            w.ledger.finish(first, RunState.FAILED, error="killed between checkpoint and commit")
            assert (first.directory / "checkpoints" / "000002-e1").is_dir()
            async with w.adapter_client() as adapters:
                assert [a.policy_version for a in await adapters.list_adapters()] == [1]
                second = w.ledger.begin_attempt("demo")
                async with w.session(second) as session:
                    assert (await adapters.get_active_adapter()).policy_version == 1
                    assert names(second, "checkpoints") == ["000001-e1"], "what was not committed is gone"
                    assert names(second, "adapters") == ["000001"]
                    await run_training(session)
                assert (await adapters.get_active_adapter()).policy_version == 3
            assert w.ledger.count_samples("demo") == {"trained": 24, "abandoned": 8}

    run(scenario(), timeout_seconds=120)


def refuse_commits(ledger: Ledger) -> None:
    def refuse(attempt: Attempt, record: StepRecord, outcome: StepOutcome | None = None) -> None:
        raise AbortedError("over", reason="STALE_EPOCH")

    ledger.commit_step = refuse  # type: ignore[method-assign]


def names(attempt: Attempt, kind: str) -> list[str]:
    return sorted(path.name for path in (attempt.directory / kind).iterdir())


def refuse_pushes(session: Session) -> None:
    async def refuse(adapter: LocalAdapter) -> PushFigures:
        raise UnavailableError("adapter at x: UNAVAILABLE")

    session.publisher.publish = refuse  # type: ignore[method-assign]


def test_a_step_whose_push_failed_is_committed_and_pushed_before_the_next_prompt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, one_by_one=True) as w:
            whole = w.new_run("whole", "evaluation = false")
            async with w.session(whole) as session:
                await run_training(session)
            w.ledger.finish(whole, RunState.SUCCEEDED)
            first = w.new_run(extra="evaluation = false")
            async with w.session(first) as session:
                await run_step(session, 0)
                refuse_pushes(session)
                with pytest.raises(UnavailableError, match="step 1, push: adapter at x"):
                    await run_step(session, 1)
            w.ledger.finish(first, RunState.FAILED, error="generator away")
            left = w.ledger.get_run("demo")
            assert (left.num_committed_steps, left.policy_version) == (2, 1)
            async with w.adapter_client() as adapters, w.session(w.ledger.begin_attempt("demo")) as session:
                assert (await adapters.get_active_adapter()).policy_version == 2
                assert w.ledger.get_run("demo").policy_version == 2
                assert not w.ledger.has_open_push("demo")
                assert session.trainer.num_updates == 2, "the step is not computed again"
                await run_training(session)
            assert w.weights(first, 3) == w.weights(whole, 3)

    run(scenario(), timeout_seconds=120)


def test_a_step_leaves_its_samples_its_adapter_and_its_checkpoint_in_the_ledger(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
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

    run(scenario(), timeout_seconds=120)


def test_a_resume_leaves_the_committed_adapter_as_it_is_and_restores_a_damaged_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session:
                await run_step(session, 0)
            weights = attempt.directory / "adapters" / "000001" / "adapter_model.safetensors"
            content, before = weights.read_bytes(), weights.stat()
            for damage in (False, True):
                w.ledger.finish(attempt, RunState.FAILED)
                if damage:
                    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
                attempt = w.ledger.begin_attempt("demo")
                async with w.session(attempt):
                    assert weights.read_bytes() == content
                    assert damage or weights.stat().st_mtime_ns == before.st_mtime_ns

    run(scenario(), timeout_seconds=120)


def test_a_damaged_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session:
                await run_step(session, 0)
            w.ledger.finish(attempt, RunState.FAILED)
            second = w.ledger.begin_attempt("demo")
            folder = attempt.directory / "checkpoints" / "000001-e1"
            for name in ("state.json", "weights.safetensors", "optimiser.safetensors"):
                content = (folder / name).read_bytes()
                (folder / name).write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
                with pytest.raises(FailedPreconditionError) as caught:
                    async with w.session(second):
                        pass
                assert caught.value.reason == "CHECKPOINT_DAMAGED", name
                (folder / name).write_bytes(content)
            async with w.session(second):
                pass

    run(scenario(), timeout_seconds=120)


@pytest.fixture
def disarmed() -> Iterator[None]:
    """Take the fault points of this process away at the end."""
    yield
    os.environ.pop(PLAN_VARIABLE, None)
    arm("worker", 0)


@pytest.mark.parametrize("point", ["checkpoint.staged", "checkpoint.renamed", "commit.open"])
def test_a_disk_that_fills_up_in_a_step_is_named_and_the_run_ends_with_the_same_bits(
    tmp_path: Path, point: str, disarmed: None
) -> None:
    async def scenario() -> None:
        async with world(tmp_path, one_by_one=True) as w:
            whole = w.new_run("whole", "evaluation = false")
            async with w.session(whole) as session:
                await run_training(session)
            w.ledger.finish(whole, RunState.SUCCEEDED)
            (tmp_path / "plan.json").write_text(json.dumps({"worker": {"1": f"{point}@2=enospc"}}))
            os.environ[PLAN_VARIABLE] = str(tmp_path / "plan.json")
            arm("worker", 1)
            first = w.new_run(extra="evaluation = false")
            phase = point.partition(".")[0]
            async with w.session(first) as session:
                await run_step(session, 0)
                with pytest.raises(ResourceExhaustedError, match=rf"step 1, {phase}: .*free some space") as caught:
                    await run_step(session, 1)
                assert caught.value.reason == "STORAGE_FULL"
            assert w.ledger.get_run("demo").num_committed_steps == 1
            async with w.adapter_client() as adapters:
                assert (await adapters.get_active_adapter()).policy_version == 1, "the old version serves"
            w.ledger.finish(first, RunState.FAILED, error="STORAGE_FULL")
            second = w.ledger.begin_attempt("demo")
            async with w.session(second) as session:
                assert names(second, "checkpoints") == ["000001-e1"]
                await run_training(session)
            assert w.weights(second, 3) == w.weights(whole, 3)

    run(scenario(), timeout_seconds=120)


def test_other_prompts_at_a_resume_are_refused_until_the_old_ones_are_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session:
                await run_step(session, 0)
            w.ledger.finish(attempt, RunState.FAILED)
            second, old = w.ledger.begin_attempt("demo"), w.prompts.read_text()
            w.prompts.write_text(old.replace("w4 w5", "w5 w4"))
            with pytest.raises(FailedPreconditionError, match="put the old files back") as caught:
                async with w.session(second):
                    pass
            assert caught.value.reason == "PROMPTS_CHANGED"
            w.prompts.write_text(old)
            async with w.session(second) as session:
                await run_training(session)

    run(scenario(), timeout_seconds=120)


def test_another_reward_model_at_a_resume_is_refused(tmp_path: Path) -> None:
    model = {"name": "other", "components": [{"name": "fake", "engine": "fake", "gain": 2.0}]}
    rewarding = RewardSettings.model_validate({**LOCAL, "models": [model]})

    async def scenario() -> None:
        async with world(tmp_path) as w, serving(rewarding, lambda r: RewardService(rewarding, r)) as other:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session:
                await run_step(session, 0)
            w.ledger.finish(attempt, RunState.FAILED)
            second = w.ledger.begin_attempt("demo")
            settings = w.services.settings.model_copy(update={"reward_address": other.target})
            config = parse_run_config(w.ledger.get_run("demo").config_toml)
            with pytest.raises(FailedPreconditionError, match="the run began with") as caught:
                async with open_session(settings, config, w.ledger, second):
                    pass
            assert caught.value.reason == "REWARD_MODEL_CHANGED"

    run(scenario(), timeout_seconds=120)


def test_another_base_model_at_a_resume_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session:
                await run_step(session, 0)
            w.ledger.finish(attempt, RunState.FAILED)
        write_tiny_policy(tmp_path / "policy", seed=1)  # and every service is started again on it
        async with run_services(w.model, tmp_path / "runs") as services:
            again = World(services, w.ledger, w.model, w.prompts)
            with pytest.raises(FailedPreconditionError) as caught:
                async with again.session(w.ledger.begin_attempt("demo")):
                    pass
            assert caught.value.reason == "BASE_CHANGED"

    run(scenario(), timeout_seconds=120)


def test_a_worker_that_lost_its_lease_stops_before_its_next_effect(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            config = parse_run_config(w.ledger.get_run("demo").config_toml)
            held = [True] * 3  # once at the take-over, once at the begin of the step, once at the export

            def check_lease() -> None:
                if not held:
                    raise AbortedError("taken", reason="LEASE_LOST")
                held.pop()

            with pytest.raises(AbortedError, match="checkpoint: taken"):
                async with open_session(
                    w.services.settings, config, w.ledger, attempt, check_lease=check_lease
                ) as session:
                    await run_step(session, 0)
            assert not (attempt.directory / "checkpoints").exists()
            assert w.ledger.list_steps("demo") == []
            async with w.adapter_client() as adapters:
                assert (await adapters.get_active_adapter()).policy_version == 0

    run(scenario(), timeout_seconds=120)


def test_a_new_run_takes_the_generator_over_from_an_older_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            old = w.new_run("old", "evaluation = false")
            async with w.session(old) as session:
                await run_step(session, 0)
            w.ledger.finish(old, RunState.FAILED)
            new = w.new_run("new", "evaluation = false")
            async with w.session(new) as session, w.adapter_client() as adapters:
                active = await adapters.get_active_adapter()
                assert (active.run_id, active.policy_version) == ("new", 0)
                await run_step(session, 0)

    run(scenario(), timeout_seconds=120)


def test_a_run_whose_generator_was_taken_stops_instead_of_fighting(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session, w.adapter_client() as adapters:
                await adapters.activate("thief", 0, expected_run_id="demo", expected_policy_version=0, epoch=1)
                with pytest.raises(FailedPreconditionError, match="'thief' has taken the generator") as caught:
                    await run_step(session, 0)
                assert caught.value.reason == "GENERATOR_TAKEN"

    run(scenario(), timeout_seconds=120)


def test_an_attempt_with_an_older_epoch_is_refused_by_the_generator(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            async with w.adapter_client() as adapters:
                await adapters.activate("demo", 0, expected_run_id="", expected_policy_version=0, epoch=7)
            with pytest.raises(AbortedError) as caught:
                async with w.session(attempt):
                    pass
            assert caught.value.reason == "STALE_EPOCH"

    run(scenario(), timeout_seconds=120)


def test_a_restarted_generator_gets_the_current_version_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            settings = w.services.settings.model_copy(update={"max_retries": 20})
            config = parse_run_config(w.ledger.get_run("demo").config_toml)
            async with open_session(settings, config, w.ledger, attempt) as session:
                await run_step(session, 0)
                await w.services.generator.runner.close()
                again = generator_settings(
                    w.model, address=settings.generator_address, admin_address=settings.adapter_address
                )
                async with serving(again, lambda r: GeneratorService(again, r)):
                    record = await run_step(session, 1)
                    assert record.policy_version == 1
                    assert record.metrics["mean_abs_dlogp"] < 1e-4
                    async with w.adapter_client() as adapters:
                        assert (await adapters.get_active_adapter()).policy_version == 2

    run(scenario(), timeout_seconds=120)


@pytest.mark.parametrize("name", ["reward", "reference", "generator"])
def test_a_service_that_dies_in_a_run_is_named_within_the_retries(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false")
            async with w.session(attempt) as session:
                served = getattr(w.services, name)
                await served.runner.close()
                with pytest.raises(UnavailableError) as caught:
                    await asyncio.wait_for(run_step(session, 0), 60)
                assert caught.value.message.startswith(
                    f"step 0, rollout: {name} at {served.target}: UNAVAILABLE after 2"
                )
                assert w.ledger.get_run("demo").num_committed_steps == 0

    run(scenario(), timeout_seconds=120)


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
def test_a_run_beyond_the_limits_of_a_service_is_refused_before_a_model_loads(
    tmp_path: Path, extra: str, trainer: str, field: str
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
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

    run(scenario(), timeout_seconds=120)


def test_a_cancelled_run_stops_before_its_next_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run()
            w.ledger.request_cancel("demo")
            async with w.session(attempt) as session:
                with pytest.raises(CancelledError):
                    await run_training(session)
            assert w.ledger.list_steps("demo") == []

    run(scenario(), timeout_seconds=120)


def test_the_canary_stops_a_run_whose_generator_samples_from_something_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false", ppo="mismatch_limit = 1e-9")
            async with w.session(attempt) as session:
                with pytest.raises(FailedPreconditionError, match=r"step 0, train: generator and trainer") as caught:
                    await run_step(session, 0)
            assert caught.value.reason == "LOGPROB_MISMATCH"
            assert w.ledger.list_steps("demo") == []
            assert not (attempt.directory / "checkpoints").exists()

    run(scenario(), timeout_seconds=120)


def test_checkpoints_and_adapters_are_kept_as_configured(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            attempt = w.new_run(extra="evaluation = false\nkeep_checkpoints = 1")
            async with w.session(attempt) as session:
                await run_training(session)
            assert names(attempt, "checkpoints") == ["000003-e1"]
            assert names(attempt, "adapters") == ["000003"]
            services = json.loads((attempt.directory / "services.json").read_text())
            assert services["generator"]["engine"] == "transformers"
            assert services["reward"]["engine"] == "fake"

    run(scenario(), timeout_seconds=120)


def test_the_same_seed_samples_the_same_and_another_seed_does_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w, GeneratorClient(w.services.settings.generator_address) as client:
            prompt, sampling = (1, 5, 6), SamplingParams(max_tokens=8, seed=3)
            once = await client.generate(prompt, n=2, sampling=sampling)
            again = await client.generate(prompt, n=2, sampling=sampling)
            other = await client.generate(prompt, n=2, sampling=SamplingParams(max_tokens=8, seed=4))
            assert once.completions == again.completions
            assert once.completions != other.completions
            assert once.completions[0] != once.completions[1]

    run(scenario(), timeout_seconds=120)
