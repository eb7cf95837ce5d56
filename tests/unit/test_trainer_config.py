from __future__ import annotations

import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from tether_services.orchestrator.config import PpoConfig, TrainerConfig


def test_the_defaults_are_those_of_the_ppo_reference() -> None:
    ppo = PpoConfig()
    assert (ppo.epochs, ppo.minibatches) == (4, 1)
    assert (ppo.clip_range, ppo.value_clip_range, ppo.first_kl_coef) == (0.2, 0.2, 0.05)
    assert (ppo.gamma, ppo.lam, ppo.temperature) == (1.0, 0.95, 1.0)
    assert (ppo.sampler_correction, ppo.sampler_range) == ("token_tis", (0.0, 2.0))
    assert (ppo.advantage, ppo.aggregation, ppo.kl_in, ppo.score_placement) == ("gae", "token_mean", "reward", "last")
    assert (ppo.missing_eos, ppo.normalise_scores, ppo.whiten_rewards) == ("none", False, False)
    assert (ppo.entropy_coef, ppo.ptx_coef, ppo.critic_warmup_steps) == (0.0, 0.0, 0)
    unset = (ppo.clip_range_high, ppo.dual_clip, ppo.kl_target, ppo.target_kl, ppo.score_clip, ppo.whiten_advantages)
    assert unset == (None,) * 6


def test_the_defaults_of_the_trainer_are_those_of_the_ppo_reference() -> None:
    config = TrainerConfig(learning_rate=1e-3)
    assert (config.schedule, config.warmup_steps, config.optimizer) == ("linear", 0, "adamw")
    assert (config.max_grad_norm, config.ema_decay) == (1.0, None)


@pytest.mark.parametrize(
    ("advantage", "has_critic", "whitens"),
    [
        ("gae", True, True),
        ("grpo", False, False),
        ("dr_grpo", False, False),
        ("rloo", False, False),
        ("reinforce_baseline", False, True),
    ],
)
def test_the_estimator_decides_on_critic_and_whitening(advantage: str, has_critic: bool, whitens: bool) -> None:
    ppo = PpoConfig.model_validate({"advantage": advantage})
    assert (ppo.has_critic, ppo.whitens_advantages) == (has_critic, whitens)
    for told in (True, False):
        assert ppo.model_copy(update={"whiten_advantages": told}).whitens_advantages is told


def test_a_bound_of_the_sampler_correction_may_be_set_alone() -> None:
    assert PpoConfig(sampler_correction="icepop", sampler_low=0.0).sampler_range == (0.0, 5.0)
    assert PpoConfig(sampler_correction="token_mask", sampler_high=3.0).sampler_range == (0.5, 3.0)


def test_the_learning_rate_must_be_stated() -> None:
    with pytest.raises(ValidationError, match="learning_rate"):
        TrainerConfig.model_validate({})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("minibatches", 0),
        ("clip_range", 0.0),
        ("clip_range", 1.0),
        ("value_clip_range", 0.0),
        ("kl_coef", -0.1),
        ("gamma", 1.1),
        ("lam", -0.1),
        ("temperature", 0.0),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("tis_cap", 2.0),
        ("advantage", "ppo"),
        ("clip_range_high", 0.0),
        ("dual_clip", 1.0),
        ("aggregation", "mean"),
        ("entropy_coef", -0.1),
        ("target_kl", 0.0),
        ("critic_warmup_steps", -1),
        ("kl_in", "both"),
        ("kl_target", 0.0),
        ("kl_horizon", 0.0),
        ("score_placement", "first"),
        ("missing_eos", "drop"),
        ("missing_eos_value", math.nan),
        ("score_clip", 0.0),
        ("sampler_correction", "tis"),
        ("sampler_low", -0.1),
        ("sampler_high", 0.0),
        ("ptx_coef", -1.0),
        ("ptx_rows", 0),
        ("mismatch_limit", math.inf),
        ("clip_rnage", 0.2),
    ],
)
def test_a_ppo_setting_out_of_range_or_unknown_is_named(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        PpoConfig.model_validate({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("critic_learning_rate", -1.0),
        ("schedule", "step"),
        ("warmup_steps", -1),
        ("optimizer", "sgd"),
        ("ema_decay", 0.0),
        ("ema_decay", 1.0),
        ("max_grad_norm", 0.0),
        ("lora_rank", 0),
        ("lora_alpha", 0),
        ("lora_target_modules", []),
        ("micro_batch_tokens", 0),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("threads", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("dropout", 0.1),
    ],
)
def test_a_trainer_setting_out_of_range_or_unknown_is_named(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        TrainerConfig.model_validate({"learning_rate": 1e-3, field: value})


def test_the_configuration_loads_without_torch() -> None:
    code = "import sys, tether_services.orchestrator.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
