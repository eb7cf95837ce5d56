"""What happens over the steps of an update and the updates of a run: early stop, warm-ups, schedules, adaptive KL."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, weights_of, write_tiny_llama
from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Trainer, UpdateReport

SAMPLES = random_samples(8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1)


def learn(trainer: Trainer, updates: int = 1) -> list[UpdateReport]:
    return [trainer.update(score_samples(trainer, SAMPLES)) for _ in range(updates)]


def assert_same(one: Trainer, two: Trainer) -> None:
    first, second = weights_of(one), weights_of(two)
    assert [name for name in first if not first[name].equal(second[name])] == []


def test_d25_target_kl_ends_an_update_before_the_step_that_would_go_further(base: Path) -> None:
    """The weights are those of an update that was planned with as few epochs."""
    slow: dict[str, Any] = {"schedule": "constant", "learning_rate": 3e-3}
    early = new_trainer(base, ppo=PpoConfig(epochs=6, target_kl=0.02), **slow)
    (report,) = learn(early)
    taken = report.num_optimizer_steps
    assert 1 < taken < 6
    planned, further = (new_trainer(base, ppo=PpoConfig(epochs=n), **slow) for n in (taken, taken + 1))
    total, total_further = (n * learn(t)[0].approx_kl for n, t in ((taken, planned), (taken + 1, further)))
    assert total_further - total > 0.02, "the step that was not taken had moved too far"
    assert total == pytest.approx(taken * report.approx_kl)
    assert_same(early, planned)
    assert {name: o.num_steps for name, o in early._optimisers.items()} == {"policy": taken, "critic": taken}


def test_d25_an_update_that_ended_early_shifts_neither_schedule_nor_random_state(base: Path) -> None:
    early = new_trainer(base, ppo=PpoConfig(epochs=6, minibatches=2, target_kl=0.01))
    whole = new_trainer(base, ppo=PpoConfig(epochs=6, minibatches=2))
    first, _ = learn(early)[0], learn(whole)
    assert first.num_optimizer_steps < 12
    assert first.policy_learning_rate == pytest.approx(1e-2 * (1 - (first.num_optimizer_steps - 1) / 120))
    assert early._generator.get_state().equal(whole._generator.get_state())
    assert early.num_updates == whole.num_updates == 1
    second = learn(early)[0]
    assert second.policy_learning_rate == pytest.approx(1e-2 * (1 - (12 + second.num_optimizer_steps - 1) / 120))
    assert second.first_ratio_deviation == 0.0


def test_d25_nothing_of_the_step_that_was_not_taken_is_left_in_the_gradients(base: Path, tmp_path: Path) -> None:
    ppo = PpoConfig(epochs=6, target_kl=0.01)
    trainer, resumed = new_trainer(base, ppo=ppo), new_trainer(base, ppo=ppo)
    assert learn(trainer)[0].num_optimizer_steps < 6
    trainer.save_checkpoint(tmp_path / "1")
    resumed.load_checkpoint(tmp_path / "1")
    learn(trainer)
    learn(resumed)
    assert_same(trainer, resumed)


def parts(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """The weights by adapter."""
    found: dict[str, dict[str, torch.Tensor]] = {"policy": {}, "critic": {}}
    for name, tensor in weights_of(trainer).items():
        found[name.partition("/")[0]][name] = tensor
    return found


def test_the_critic_learns_alone_during_its_warm_up(base: Path) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(epochs=2, critic_warmup_steps=2))
    states = [parts(trainer)]
    reports = []
    for _ in range(3):
        reports += learn(trainer)
        states.append(parts(trainer))
    for before, after, report in zip(states[:2], states[1:3], reports[:2], strict=True):
        assert all(tensor.equal(after["policy"][name]) for name, tensor in before["policy"].items())
        assert any(not tensor.equal(after["critic"][name]) for name, tensor in before["critic"].items())
        assert math.isnan(report.policy_loss)
        assert math.isnan(report.policy_grad_norm)
        assert math.isnan(report.policy_learning_rate)
        assert report.critic_grad_norm > 0.0
        assert report.critic_learning_rate > 0.0
    assert any(not tensor.equal(states[3]["policy"][name]) for name, tensor in states[2]["policy"].items())
    assert reports[2].policy_grad_norm > 0.0
    assert reports[2].first_ratio_deviation == 0.0
    steps = {name: o.num_steps for name, o in trainer._optimisers.items()}
    assert steps == {"policy": 2, "critic": 6}


def test_the_critic_learns_the_same_in_its_warm_up_as_without_one(base: Path) -> None:
    warming, plain = (new_trainer(base, ppo=PpoConfig(epochs=2, critic_warmup_steps=n)) for n in (1, 0))
    learn(warming)
    learn(plain)
    expected = parts(plain)["critic"]
    assert all(tensor.equal(expected[name]) for name, tensor in parts(warming)["critic"].items())


def distant_batch(trainer: Trainer) -> RolloutBatch:
    """A batch whose reference is 0.1 nats per token away."""
    batch = score_samples(trainer, SAMPLES)
    return replace(batch, ref_logprobs=[[x - 0.1 for x in row] for row in batch.logprobs])


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize(("target", "error"), [(0.1, 0.2), (100.0, -0.2), (None, 0.0)])
def test_d11_the_kl_coefficient_changes_for_the_next_batch_only(
    base: Path, kl_in: str, target: float | None, error: float
) -> None:
    settings: dict[str, Any] = {"epochs": 1, "kl_coef": 0.3, "kl_target": target, "kl_horizon": 80.0, "kl_in": kl_in}
    trainer = new_trainer(base, ppo=PpoConfig.model_validate(settings))
    fixed = new_trainer(base, ppo=PpoConfig.model_validate(settings | {"kl_target": None}))
    first, other = trainer.update(distant_batch(trainer)), fixed.update(distant_batch(fixed))
    tokens = sum(len(s.response_token_ids) for s in SAMPLES)
    assert first.kl_per_sequence == pytest.approx(0.1 * tokens / 8, rel=1e-4)
    assert first.kl_coef == pytest.approx(0.3)
    assert first.reward_per_sequence == other.reward_per_sequence
    assert_same(trainer, fixed)
    second = trainer.update(distant_batch(trainer))
    assert second.kl_coef == pytest.approx(0.3 * (1.0 + error * 8 / 80))
    if kl_in == "reward":
        expected = second.score_mean - second.kl_coef * second.kl_per_sequence
        assert second.reward_per_sequence == pytest.approx(expected, abs=1e-6)


def test_d11_an_adaptive_coefficient_weights_the_kl_loss_of_the_next_batch(base: Path) -> None:
    """Equal scores leave nothing but the KL loss, whose gradient is in proportion to its weight."""
    norms = []
    for target in (0.1, None):
        ppo = PpoConfig(advantage="dr_grpo", epochs=1, kl_in="loss", kl_coef=0.3, kl_target=target, kl_horizon=80.0)
        trainer = new_trainer(base, ppo=ppo)
        for _ in range(2):
            batch = replace(distant_batch(trainer), scores=[1.0] * 8, groups=[0] * 8)
            norms.append(trainer.update(batch).policy_grad_norm)
    assert norms[0] == norms[2] > 0.0
    assert norms[1] == pytest.approx(norms[3] * (1.0 + 0.2 * 8 / 80), rel=1e-5)


def test_d11_a_kl_between_the_bounds_moves_the_coefficient_in_proportion(base: Path) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(epochs=1, kl_coef=0.3, kl_target=0.5, kl_horizon=80.0))
    kl = trainer.update(distant_batch(trainer)).kl_per_sequence
    assert 0.8 < kl / 0.5 < 1.2
    assert trainer.update(distant_batch(trainer)).kl_coef == pytest.approx(0.3 * (1.0 + (kl / 0.5 - 1.0) * 8 / 80))


def last_rates(base: Path, updates: int, **config: Any) -> list[float]:
    """The rate of the last optimiser step of each update; two steps an update, five updates a run."""
    trainer = new_trainer(base, ppo=PpoConfig(epochs=2), total_steps=5, **({"learning_rate": 1e-3} | config))
    return [report.policy_learning_rate / 1e-3 for report in learn(trainer, updates)]


def test_d27_a_linear_schedule_falls_to_0_over_the_run(base: Path) -> None:
    assert last_rates(base, 5) == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])


def test_d27_a_cosine_schedule_rises_over_the_warm_up_and_falls_after(base: Path) -> None:
    expected = [0.25, 0.75, *((1.0 + math.cos(math.pi * k / 6)) / 2 for k in (1, 3, 5))]
    assert last_rates(base, 5, schedule="cosine", warmup_steps=2) == pytest.approx(expected)


def test_d27_a_constant_schedule_stays_and_goes_on_past_the_run(base: Path) -> None:
    assert last_rates(base, 6, schedule="constant") == pytest.approx([1.0] * 6)
    assert last_rates(base, 3, schedule="constant", warmup_steps=1) == pytest.approx([0.5, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_d27_an_update_past_the_end_of_the_schedule_is_refused(base: Path, schedule: str) -> None:
    trainer = new_trainer(base, total_steps=1, ppo=PpoConfig(epochs=1), schedule=schedule)
    learn(trainer)
    before = weights_of(trainer)
    with pytest.raises(FailedPreconditionError) as caught:
        learn(trainer)
    assert caught.value.reason == "SCHEDULE_ENDED"
    assert all(tensor.equal(before[name]) for name, tensor in weights_of(trainer).items())
