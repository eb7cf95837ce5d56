"""Settings that would be ignored and settings that contradict each other are refused, and only those."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from tests.unit.run_inputs import fields_of, run_config, write_prompts
from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether_services.orchestrator.config import PpoConfig, RunConfig
from tether_services.orchestrator.run_config import check_run_config, check_run_settings
from tether_services.orchestrator.run_rules import find_idle
from tether_services.orchestrator.trainer.model import AdapterName

GROUPS = 'advantage = "grpo"\n'
ONE_STEP = "epochs = 1\nminibatches = 1\n"

IDLE = [
    (GROUPS, "ppo.gamma = 0.99", "critic"),
    (GROUPS, "ppo.gamma = 0.0", "critic"),
    (GROUPS, "ppo.lam = 0.95", "critic"),
    (GROUPS, "ppo.value_clip_range = 0.2", "critic"),
    (GROUPS, "ppo.whiten_rewards = true", "critic"),
    (GROUPS, 'ppo.score_placement = "n_plus"', "critic"),
    (GROUPS, "ppo.critic_warmup_steps = 1", "critic"),
    (GROUPS, "trainer.critic_learning_rate = 1e-3", "critic"),
    (ONE_STEP, "ppo.clip_range = 0.2", "one optimiser step"),
    (ONE_STEP, "ppo.clip_range_high = 0.28", "one optimiser step"),
    (ONE_STEP, "ppo.dual_clip = 3.0", "one optimiser step"),
    (ONE_STEP, "ppo.value_clip_range = 0.5", "one optimiser step"),
    (ONE_STEP, "ppo.target_kl = 0.1", "one optimiser step"),
    ("", "ppo.kl_horizon = 1000.0", "kl_target"),
    ("kl_coef = 0.0", "ppo.kl_target = 6.0", "kl_coef is 0"),
    ("kl_coef = 0.0", 'ppo.kl_in = "loss"', "kl_coef is 0"),
    ("", "ppo.missing_eos_value = -1.0", "missing_eos"),
    ("", "ppo.ptx_text = 'stories.txt'", "ptx_coef is 0"),
    ("", "ppo.ptx_rows = 4", "ptx_coef is 0"),
    ('sampler_correction = "none"', "ppo.sampler_low = 0.5", "sampler_correction"),
    ('sampler_correction = "none"', "ppo.sampler_high = 3.0", "sampler_correction"),
]


def configure(folder: Path, ppo: str, setting: str = "", extra: str = "") -> RunConfig:
    """Return a run with settings of the [ppo] table, one setting by its path, and top-level ones."""
    table, _, key = setting.partition(".")
    ppo, trainer = (f"{ppo}\n{key}", "") if table == "ppo" else (ppo, key)
    return run_config(folder, extra, ppo=ppo, trainer=trainer)


@pytest.mark.parametrize(("ppo", "setting", "reason"), IDLE, ids=[setting for _, setting, _ in IDLE])
def test_a_setting_that_would_be_ignored_is_refused_with_the_reason(
    tmp_path: Path, ppo: str, setting: str, reason: str
) -> None:
    check_run_settings(configure(tmp_path, ppo))
    found = fields_of(lambda: check_run_settings(configure(tmp_path, ppo, setting)))
    assert set(found) == {setting.split(" = ")[0]}
    (description,) = found.values()
    assert reason in description and "leave it out" in description


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_baseline"])
def test_no_estimator_of_groups_takes_a_reward_model_for_a_critic(tmp_path: Path, advantage: str) -> None:
    config = run_config(tmp_path, 'reward_model = "somewhere"', ppo=f'advantage = "{advantage}"')
    assert set(fields_of(lambda: check_run_settings(config))) == {"reward_model"}
    check_run_settings(run_config(tmp_path, 'reward_model = "somewhere"', ppo='advantage = "gae"'))


def test_a_value_that_asks_for_nothing_is_not_ignored(tmp_path: Path) -> None:
    ppo = f'{GROUPS}whiten_rewards = false\nscore_placement = "last"\ncritic_warmup_steps = 0\nptx_text = ""\n'
    check_run_settings(run_config(tmp_path, 'reward_model = ""', ppo=ppo))
    check_run_settings(run_config(tmp_path, ppo='kl_coef = 0.0\nkl_in = "reward"'))


def test_every_ignored_setting_is_named_at_once(tmp_path: Path) -> None:
    config = run_config(tmp_path, ppo=f"{GROUPS}{ONE_STEP}gamma = 1.0\nvalue_clip_range = 0.2\nkl_horizon = 10.0")
    assert set(fields_of(lambda: check_run_settings(config))) == {
        "ppo.gamma",
        "ppo.value_clip_range",
        "ppo.kl_horizon",
    }


def test_all_options_of_a_critic_go_together(tmp_path: Path) -> None:
    text = write_prompts(tmp_path / "stories.txt")
    ppo = (
        'gamma = 0.99\nlam = 0.9\nvalue_clip_range = 0.3\nwhiten_rewards = true\nscore_placement = "n_plus"\n'
        "critic_warmup_steps = 1\nclip_range = 0.1\nclip_range_high = 0.3\ndual_clip = 3.0\ntarget_kl = 0.1\n"
        'kl_in = "loss"\nkl_target = 6.0\nkl_horizon = 1000.0\nmissing_eos = "replace"\nmissing_eos_value = -1.0\n'
        f'sampler_low = 0.5\nsampler_high = 3.0\nptx_coef = 0.5\nptx_text = "{text}"\nptx_rows = 2\n'
    )
    check_run_config(run_config(tmp_path, ppo=ppo, trainer="critic_learning_rate = 1e-3\nwarmup_steps = 2"))


CONTRADICTIONS = [
    ("responses_per_prompt = 1", GROUPS, "", "responses_per_prompt"),
    ("responses_per_prompt = 1", 'advantage = "rloo"', "", "responses_per_prompt"),
    ("", "", "warmup_steps = 3", "trainer.warmup_steps"),
    ("", "critic_warmup_steps = 3", "", "ppo.critic_warmup_steps"),
    ("", "sampler_low = 3.0", "", "ppo.sampler_low"),
    ("", "sampler_low = 2.0\nsampler_high = 3.0", "", "ppo.sampler_low"),
    ("", "sampler_high = 0.5", "", "ppo.sampler_high"),
    ("", 'sampler_correction = "icepop"\nsampler_low = 0.1\nsampler_high = 0.4', "", "ppo.sampler_high"),
    ("", 'missing_eos = "replace"', "", "ppo.missing_eos_value"),
    ("", "ptx_coef = 0.5", "", "ppo.ptx_text"),
]


@pytest.mark.parametrize(("extra", "ppo", "trainer", "field"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, extra: str, ppo: str, trainer: str, field: str
) -> None:
    config = run_config(tmp_path, extra, ppo=ppo, trainer=trainer)  # of 3 steps
    assert set(fields_of(lambda: check_run_settings(config))) == {field}


def test_what_just_fits_is_accepted(tmp_path: Path) -> None:
    check_run_settings(run_config(tmp_path, "responses_per_prompt = 2", ppo='advantage = "rloo"'))
    check_run_settings(run_config(tmp_path, "responses_per_prompt = 1"))
    check_run_settings(run_config(tmp_path, ppo="critic_warmup_steps = 2", trainer="warmup_steps = 2"))
    check_run_settings(run_config(tmp_path, ppo="sampler_low = 1.0\nsampler_high = 1.0"))
    check_run_settings(run_config(tmp_path, ppo='missing_eos = "subtract"'))


def test_the_pretraining_text_must_be_readable(tmp_path: Path) -> None:
    config = run_config(tmp_path, ppo='ptx_coef = 0.5\nptx_text = "/no/stories.txt"')
    check_run_settings(config)
    assert "/no/stories.txt" in fields_of(lambda: check_run_config(config))["ppo.ptx_text"]
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    config = run_config(tmp_path, ppo=f'ptx_coef = 0.5\nptx_text = "{empty}"')
    assert set(fields_of(lambda: check_run_config(config))) == {"ppo.ptx_text"}
    check_run_config(run_config(tmp_path, ppo=f'ptx_coef = 0.5\nptx_text = "{write_prompts(tmp_path / "some.txt")}"'))


# What is refused as idle is idle: the trainer learns the very same with any value of it, and not where it is not idle.

Settings: TypeAlias = tuple[tuple[str, object], ...]


def ppo(**settings: object) -> Settings:
    return tuple(settings.items())


RLOO, SINGLE, PLAIN = ppo(advantage="rloo"), ppo(epochs=1, minibatches=1), ppo()
EFFECTS = [
    (RLOO, PLAIN, ppo(gamma=0.5)),
    (RLOO, PLAIN, ppo(lam=0.1)),
    (RLOO, PLAIN, ppo(value_clip_range=1e-3)),
    (RLOO, PLAIN, ppo(whiten_rewards=True)),
    (RLOO, PLAIN, ppo(score_placement="n_plus")),
    (SINGLE, PLAIN, ppo(clip_range=1e-3)),
    (SINGLE, PLAIN, ppo(clip_range_high=1e-3)),
    (SINGLE, ppo(clip_range_high=5.0), ppo(dual_clip=1.01)),
    (SINGLE, PLAIN, ppo(value_clip_range=1e-3)),
    (SINGLE, PLAIN, ppo(target_kl=1e-9)),
    (PLAIN, ppo(kl_target=1.0), ppo(kl_horizon=10.0)),
    (ppo(kl_coef=0.0), PLAIN, ppo(kl_in="loss")),
    (PLAIN, ppo(missing_eos="replace"), ppo(missing_eos_value=-3.0)),
    (ppo(sampler_correction="none"), PLAIN, ppo(sampler_low=1.0, sampler_high=1.0)),
]
"""(settings with which the change is idle, settings with which it is not, the change)."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1)


@functools.cache
def learn(base: Path, settings: Settings) -> Tensor:
    """Return all weights after two updates with samples of a generator that is a little off."""
    ppo = PpoConfig.model_validate(dict(settings))
    trainer = new_trainer(base, ppo=ppo)
    for seed in (0, 1):
        batch = score_samples(trainer, random_samples(6, seed=seed))
        off = [[x + 0.02 for x in row] for row in batch.logprobs]
        stopped = [True, False, True, True, False, True]
        trainer.update(replace(batch, logprobs=off, groups=[0, 0, 1, 1, 2, 2], stopped=stopped, max_response_tokens=12))
    adapters: tuple[AdapterName, ...] = ("policy", "critic") if ppo.has_critic else ("policy",)
    parameters = [p for name in adapters for p in trainer._model.trained_parameters(name).values()]
    return torch.cat([p.detach().flatten() for p in parameters])


def same(first: Tensor, second: Tensor) -> bool:
    """Return whether weights are equal but for the order of additions."""
    return torch.allclose(first, second, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(("idle", "active", "change"), EFFECTS, ids=[change[0][0] for _, _, change in EFFECTS])
def test_an_idle_setting_changes_no_weight_and_an_active_one_does(
    base: Path, tmp_path: Path, idle: Settings, active: Settings, change: Settings
) -> None:
    config = run_config(tmp_path).model_copy(update={"ppo": PpoConfig.model_validate(dict(idle + change))})
    assert {f"ppo.{key}" for key, _ in change} == {violation.field for violation in find_idle(config)}
    assert same(learn(base, idle + change), learn(base, idle))
    assert not same(learn(base, active + change), learn(base, active))


@pytest.mark.parametrize("preset", ['preset = "nplus"\n', ""])
def test_d12_a_penalty_that_would_reward_cut_responses_is_refused(tmp_path: Path, preset: str) -> None:
    value = "" if preset else "missing_eos_value = -1.0\n"
    config = run_config(tmp_path, preset, ppo=f'missing_eos = "subtract"\n{value}')
    assert list(fields_of(lambda: check_run_settings(config))) == ["ppo.missing_eos_value"]


def test_held_out_prompts_of_a_run_that_is_not_evaluated_are_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, 'evaluation = false\nevaluation_prompts = "q.txt"\n')
    assert "evaluation_prompts" in fields_of(lambda: check_run_settings(config))
