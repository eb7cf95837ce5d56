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
    assert (ppo.clip_range, ppo.value_clip_range, ppo.kl_coef) == (0.2, 0.2, 0.05)
    assert (ppo.gamma, ppo.lam, ppo.temperature, ppo.tis_cap) == (1.0, 0.95, 1.0, 2.0)
    assert ppo.whiten_advantages


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
        ("tis_cap", 0.9),
        ("mismatch_limit", math.inf),
        ("clip_rnage", 0.2),
    ],
)
def test_a_ppo_setting_out_of_range_or_unknown_is_named(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        PpoConfig.model_validate({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("critic_learning_rate", -1.0),
        ("schedule", "cosine"),
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
