"""Which settings of a run go together: none may be ignored, none may contradict another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tether.errors import FieldViolation
from tether_services.orchestrator.config import RunConfig

__all__ = ["find_contradictions", "find_idle"]


@dataclass(frozen=True, slots=True)
class _Rule:
    """Settings that have no effect in some runs."""

    keys: tuple[str, ...]
    is_idle: Callable[[RunConfig], bool]
    reason: str


_RULES = (
    _Rule(
        (
            "reward_model",
            "ppo.gamma",
            "ppo.lam",
            "ppo.value_clip_range",
            "ppo.whiten_rewards",
            "ppo.score_placement",
            "ppo.critic_warmup_steps",
            "trainer.critic_learning_rate",
        ),
        lambda config: not config.ppo.has_critic,
        'only ppo.advantage = "gae" has a critic',
    ),
    _Rule(
        ("ppo.clip_range", "ppo.clip_range_high", "ppo.dual_clip", "ppo.value_clip_range", "ppo.target_kl"),
        lambda config: config.ppo.epochs * config.ppo.minibatches == 1,
        "in the one optimiser step of an update nothing has moved yet; raise ppo.epochs or ppo.minibatches",
    ),
    _Rule(
        ("ppo.kl_horizon",), lambda config: config.ppo.kl_target is None, "ppo.kl_coef is fixed without ppo.kl_target"
    ),
    _Rule(
        ("ppo.kl_in", "ppo.kl_target", "ppo.kl_horizon"),
        lambda config: config.ppo.first_kl_coef == 0,
        "ppo.kl_coef is 0, and an adaptive one stays 0",
    ),
    _Rule(("failure.max_dropped",), lambda config: config.failure.on_missing == "fail", 'failure.on_missing is "fail"'),
    _Rule(
        ("alarms.action", "alarms.rollback_steps", "alarms.max_rollbacks"),
        lambda config: not config.alarms.is_set,
        "no alarm is set; set one of alarms.kl_max, entropy_min, score_drop, mismatch_max",
    ),
    _Rule(
        ("alarms.rollback_steps", "alarms.max_rollbacks"),
        lambda config: config.alarms.action == "stop",
        'alarms.action is "stop"',
    ),
    _Rule(("evaluation_prompts",), lambda config: not config.evaluation, "evaluation is false"),
    _Rule(("ppo.missing_eos_value",), lambda config: config.ppo.missing_eos == "none", "ppo.missing_eos is none"),
    _Rule(("ppo.ptx_text", "ppo.ptx_rows"), lambda config: config.ppo.ptx_coef == 0, "ppo.ptx_coef is 0"),
    _Rule(
        ("ppo.sampler_low", "ppo.sampler_high"),
        lambda config: config.ppo.sampler_correction == "none",
        "ppo.sampler_correction is none",
    ),
)
_OFF = {
    "alarms.action": "stop",
    "reward_model": "",
    "evaluation_prompts": "",
    "ppo.whiten_rewards": False,
    "ppo.score_placement": "last",
    "ppo.critic_warmup_steps": 0,
    "ppo.kl_in": "reward",
    "ppo.ptx_text": "",
}
"""Values that ask for nothing, so that nothing is ignored; None does so for every setting."""


def find_idle(config: RunConfig) -> list[FieldViolation]:
    """Return one violation per setting that is set and has no effect."""
    idle: dict[str, FieldViolation] = {}
    for rule in _RULES:
        if rule.is_idle(config):
            told = (key for key in rule.keys if _is_told(config, key))
            idle |= {key: FieldViolation(key, f"has no effect: {rule.reason}; leave it out") for key in told}
    return list(idle.values())


def _is_told(config: RunConfig, key: str) -> bool:
    """Return whether a setting is set, by the run or its preset, to a value that asks for something."""
    *path, name = key.split(".")
    table: BaseModel = config
    for part in path:
        table = getattr(table, part)
    value: Any = getattr(table, name)
    return name in table.model_fields_set and value is not None and value != _OFF.get(key)


def find_contradictions(config: RunConfig) -> list[FieldViolation]:
    """Return one violation per setting that another one makes impossible."""
    found = (
        _check_group_size(config),
        _check_minibatches(config),
        _check_warmup(config),
        _check_critic_warmup(config),
        _check_sampler_range(config),
        _check_missing_eos(config),
        _check_pretraining(config),
        _check_mismatch(config),
    )
    return [violation for violation in found if violation is not None]


def _check_group_size(config: RunConfig) -> FieldViolation | None:
    if config.ppo.has_critic or config.responses_per_prompt >= 2:
        return None
    description = f"{config.ppo.advantage} compares the responses to one prompt; it needs at least 2"
    return FieldViolation("responses_per_prompt", description)


def _check_minibatches(config: RunConfig) -> FieldViolation | None:
    num_samples = config.prompts_per_step * config.responses_per_prompt
    if config.ppo.minibatches <= num_samples:
        return None
    return FieldViolation("ppo.minibatches", f"{num_samples} samples a step cannot make {config.ppo.minibatches}")


def _check_warmup(config: RunConfig) -> FieldViolation | None:
    if config.trainer.warmup_steps < config.total_steps:
        return None
    description = f"must be below total_steps = {config.total_steps}, or the learning rate never gets to its value"
    return FieldViolation("trainer.warmup_steps", description)


def _check_critic_warmup(config: RunConfig) -> FieldViolation | None:
    if not config.ppo.has_critic or config.ppo.critic_warmup_steps < config.total_steps:
        return None
    description = f"must be below total_steps = {config.total_steps}, or the policy never learns"
    return FieldViolation("ppo.critic_warmup_steps", description)


def _check_sampler_range(config: RunConfig) -> FieldViolation | None:
    """Refuse a range without the ratio 1, at which trainer and generator agree."""
    low, high = config.ppo.sampler_range
    if low <= 1 <= high:
        return None
    field = "ppo.sampler_low" if low > 1 else "ppo.sampler_high"
    return FieldViolation(field, f"[{low:g}, {high:g}] must hold 1, the ratio where trainer and generator agree")


def _check_missing_eos(config: RunConfig) -> FieldViolation | None:
    """Refuse a bonus for being cut, and to replace scores by a value that nobody chose: it depends on their scale."""
    if config.ppo.missing_eos == "subtract" and config.ppo.missing_eos_value <= 0:
        return FieldViolation("ppo.missing_eos_value", "must be above 0 with subtract, or it rewards being cut")
    if config.ppo.missing_eos != "replace" or "missing_eos_value" in config.ppo.model_fields_set:
        return None
    return FieldViolation("ppo.missing_eos_value", "needed with replace: a score that is low for this reward model")


def _check_pretraining(config: RunConfig) -> FieldViolation | None:
    if config.ppo.ptx_coef == 0 or config.ppo.ptx_text:
        return None
    return FieldViolation("ppo.ptx_text", "needed with ppo.ptx_coef above 0: a file of pretraining text")


def _check_mismatch(config: RunConfig) -> FieldViolation | None:
    if config.alarms.mismatch_max is None or config.alarms.mismatch_max < config.ppo.mismatch_limit:
        return None
    description = f"must be below ppo.mismatch_limit = {config.ppo.mismatch_limit:g}, which refuses the batch before"
    return FieldViolation("alarms.mismatch_max", description)
