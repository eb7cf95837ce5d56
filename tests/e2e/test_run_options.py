"""Whole runs over the real services with the options that change what a step is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.small_runs import SECONDS, world
from tests.rpc.run_services import small_run_toml, write_tiny_policy, write_word_prompts
from tests.rpc.serving import run
from tether import StepEvent
from tether.errors import InvalidArgumentError

pytestmark = pytest.mark.slow

EVERYTHING = """
kl_target = 0.001
kl_horizon = 50
clip_range_high = 0.3
dual_clip = 3.0
entropy_coef = 0.01
aggregation = "sequence_mean"
score_placement = "n_plus"
missing_eos = "subtract"
missing_eos_value = 0.5
score_clip = 2.0
normalise_scores = true
whiten_rewards = true
critic_warmup_steps = 1
sampler_correction = "icepop"
ptx_coef = 0.5
ptx_rows = 2
"""
TRAINER = 'schedule = "cosine"\nwarmup_steps = 1\nema_decay = 0.9\noptimizer = "adamw_8bit"\n'


def watch(
    folder: Path, worker: Sequence[str], *, ppo: str, trainer: str = "", extra: str = "", quantization: str = "none"
) -> list[StepEvent]:
    """Return the steps of a run that succeeded."""
    model, prompts = write_tiny_policy(folder / "policy"), write_word_prompts(folder / "prompts.txt")
    text = small_run_toml(model, prompts, extra, ppo=ppo, trainer=trainer)

    async def scenario() -> list[StepEvent]:
        async with world(model, folder / "runs", worker=worker, quantization=quantization) as w:
            await w.client.start_run("demo", text)
            steps, end = await w.watch("demo")
            assert end.state == "succeeded", end.error
            return steps

    return run(scenario(), timeout_seconds=SECONDS)


def test_a_run_with_every_option_of_a_critic_succeeds_and_shows_their_figures(
    tmp_path: Path, forked_worker: tuple[str, ...]
) -> None:
    pytest.importorskip("bitsandbytes", reason="the 8-bit optimiser needs the quant extra")
    ppo = f'{EVERYTHING}ptx_text = "{tmp_path / "prompts.txt"}"\n'
    first, second, third = (step.metrics for step in watch(tmp_path, forked_worker, ppo=ppo, trainer=TRAINER))
    assert "policy_loss" not in first and "critic_grad_norm" in first, "only the critic learns"
    assert first["kl_per_sequence"] == second["kl_per_sequence"] == 0.0, "the policy is still the reference"
    assert first["kl_coef"] == second["kl_coef"] == 0.05, "it does not adapt to a policy that may not move"
    assert third["kl_coef"] < second["kl_coef"], "the KL was below its target"
    for figures in (second, third):
        assert figures["first_ratio_deviation"] == 0.0
        assert all(math.isfinite(figures[name]) for name in ("ptx_loss", "ptx_grad_norm", "entropy_bonus"))
        assert figures["mean_abs_dlogp"] < 1e-3
    assert third["kl_k3_per_token"] > 0.0
    average = load_file(tmp_path / "runs" / "demo" / "adapters" / "average" / "adapter_model.safetensors")
    last = load_file(tmp_path / "runs" / "demo" / "adapters" / "000003" / "adapter_model.safetensors")
    assert average.keys() == last.keys()
    assert any(not average[name].equal(last[name]) for name in last)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_agrees_with_its_services(
    tmp_path: Path, forked_worker: tuple[str, ...], quantization: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the quant extra")
    trainer = f'quantization = "{quantization}"\n'
    steps = watch(
        tmp_path, forked_worker, ppo="", trainer=trainer, extra="evaluation = false", quantization=quantization
    )
    assert abs(steps[0].metrics["kl_per_token"]) < 1e-3
    for step in steps:
        assert step.metrics["mean_abs_dlogp"] < 1e-3
        assert step.metrics["policy_grad_norm"] > 0.0
    assert steps[-1].metrics["kl_k3_per_token"] > steps[0].metrics["kl_k3_per_token"], "the adapter has moved"


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_a_run_without_a_critic_learns_from_groups(
    tmp_path: Path, forked_worker: tuple[str, ...], advantage: str
) -> None:
    kl = 'kl_in = "loss"\nkl_coef = 0.05\n' if advantage == "grpo" else ""
    steps = watch(tmp_path, forked_worker, ppo=f'advantage = "{advantage}"\n{kl}', extra="evaluation = false")
    for step in steps:
        assert step.metrics["policy_grad_norm"] > 0.0
        assert not {"value_loss", "critic_grad_norm", "critic_learning_rate"} & step.metrics.keys()
        assert ("kl_loss" in step.metrics) == (advantage == "grpo")
    assert steps[-1].metrics["kl_k3_per_token"] > 0.0


def test_d8_a_run_cannot_filter_what_it_samples(tmp_path: Path, forked_worker: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        watch(tmp_path, forked_worker, ppo="top_p = 0.9\ntop_k = 5\n")
    assert {violation.field for violation in caught.value.violations} == {"ppo.top_p", "ppo.top_k"}
