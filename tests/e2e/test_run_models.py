"""Whole runs on real models: a story model, and the packaged policy and reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.small_runs import ROOT, SECONDS, tiny_run, world
from tests.rpc.serving import LOCAL, run, serving
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService

pytestmark = pytest.mark.slow
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
DEMO = ROOT / "services" / "tether_services" / "demo"


@pytest.mark.skipif(not STORIES.exists(), reason="../shared/models/stories260k is not there")
def test_a_run_on_a_real_story_model_that_ends_stories_with_token_one(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "".join(f"Once upon a time, there was a {w}\n" for w in ("cat", "dog", "boy", "girl", "bird", "fish"))
    )
    text = (
        f'model = "{STORIES}"\nprompts = "{prompts}"\nevaluation_count = 2\ntotal_steps = 2\nprompts_per_step = 4\n'
        "responses_per_prompt = 2\nmax_response_tokens = 24\n[ppo]\nepochs = 1\ntemperature = 0.7\n"
        "[trainer]\nlearning_rate = 1e-3\n"
    )

    async def scenario() -> None:
        settings = RewardSettings.model_validate({**LOCAL, "models": STORY_RULE})
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as reward,
            world(STORIES, tmp_path / "runs", reward_address=reward.target) as w,
        ):
            await w.client.start_run("stories", text)
            steps, end = await w.watch("stories")
            assert end.state == "succeeded", end.error
            assert abs(steps[0].metrics["kl_per_token"]) < 1e-4
            assert max(step.metrics["mean_abs_dlogp"] for step in steps) < 1e-3
            stops = json.loads((tmp_path / "runs" / "stories" / "services.json").read_text())["generator"]
            assert sorted(stops["stop_token_ids"]) == [1, 2]

    run(scenario(), timeout_seconds=SECONDS)


STORY_RULE = [
    {
        "name": "length",
        "tokenizer": str(STORIES),
        "components": [
            {
                "name": "length",
                "engine": "rules",
                "function": "tether_services.reward.rules:length_band",
                "arguments": {"low": 20, "high": 60},
            }
        ],
    }
]


@pytest.mark.parametrize("ends_text", [False, True])
def test_a_run_on_the_packaged_models_starts_its_critic_from_the_reward_model(
    ends_text: bool, tmp_path: Path, forked_worker: tuple[str, ...]
) -> None:
    shutil.copytree(DEMO / "models", tmp_path / "models")
    policy, reward_model = tmp_path / "models" / "policy", tmp_path / "models" / "reward"
    scale = json.loads((reward_model / "tether_reward.json").read_text())
    (reward_model / "tether_reward.json").write_text(json.dumps(scale | {"ends_text": ends_text, "max_length": 40}))
    text = (
        f'model = "{policy}"\nreward_model = "{reward_model}"\nprompts = "{DEMO / "prompts.txt"}"\n'
        "evaluation_count = 8\ntotal_steps = 2\nprompts_per_step = 8\nresponses_per_prompt = 1\n"
        "max_response_tokens = 24\n[ppo]\nepochs = 1\n[trainer]\nlearning_rate = 1e-3\n"
    )

    async def scenario() -> None:
        settings = RewardSettings.model_validate({**LOCAL, "model": str(reward_model)})
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as reward,
            world(policy, tmp_path / "runs", reward_address=reward.target, worker=forked_worker) as w,
        ):
            await w.client.start_run("demo", text)
            steps, end = await w.watch("demo")
            assert end.state == "succeeded", end.error
            assert max(step.metrics["mean_abs_dlogp"] for step in steps) < 1e-3
            assert abs(steps[0].metrics["value_mean"] - steps[0].metrics["score_mean"]) < 3.0
            assert len(w.report("demo")["after"]["samples"]) == 8

    run(scenario(), timeout_seconds=SECONDS)


def test_a_reward_model_that_reads_other_token_ids_than_the_policy_is_refused(
    tmp_path: Path, forked_worker: tuple[str, ...]
) -> None:
    model, text = tiny_run(tmp_path)

    async def scenario() -> None:
        settings = RewardSettings.model_validate({**LOCAL, "model": str(DEMO / "models" / "reward")})
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as reward,
            world(model, tmp_path / "runs", reward_address=reward.target, worker=forked_worker) as w,
        ):
            await w.client.start_run("demo", text)
            steps, end = await w.watch("demo")
            assert (end.state, steps) == ("failed", [])
            assert "[TOKENIZER_MISMATCH]" in end.error and f"reward at {reward.target}" in end.error

    run(scenario(), timeout_seconds=SECONDS)
