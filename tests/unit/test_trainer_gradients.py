"""Identities of the gradient: how a step is cut, padded and ordered decides nothing; each part counts as it should."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.unit.tiny_llama import (
    in_float64,
    new_trainer,
    random_samples,
    randomise_adapters,
    score_samples,
    trained_parameters,
    write_tiny_llama,
)
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import RolloutBatch, Sample, Trainer
from tether_services.orchestrator.trainer.batch import MicroBatch, value_samples
from tether_services.orchestrator.trainer.experience import Experience, Layout, prepare_experience
from tether_services.orchestrator.trainer.plan import loss_denominator, plan_epoch, plan_pretraining
from tether_services.orchestrator.trainer.update import PolicyStep

SAMPLES = random_samples(12)
TEXT = [[(7 * i + 3 * k) % 48 for k in range(3 + i % 7)] for i in range(9)]
WHOLE = 10_000
"""Tokens of a micro-batch that holds everything."""
AGGREGATIONS = ["token_mean", "sequence_mean", "token_sum"]
EVERYTHING = {"entropy_coef": 0.1, "kl_in": "loss", "dual_clip": 1.2, "clip_range_high": 0.3, "ptx_coef": 0.5}
"""Every term that a policy loss can have."""
FLAT = ("old_logprobs", "ref_logprobs", "advantages", "weights", "old_values", "returns")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base")


@dataclass(frozen=True, slots=True)
class Scene:
    """A trainer, a batch, and an experience away from the first step: clipped on both sides."""

    trainer: Trainer
    batch: RolloutBatch
    experience: Experience
    tolerance: float
    """What rounding may do to a gradient, as a share of its largest entry."""


@pytest.fixture(scope="module")
def exact(base: Path) -> Scene:
    return new_scene(in_float64(new_trainer(base)), tolerance=1e-6)


@pytest.fixture(scope="module")
def single(base: Path) -> Scene:
    return new_scene(new_trainer(base), tolerance=1e-5)


def new_scene(trainer: Trainer, tolerance: float) -> Scene:
    batch = score_samples(randomise_adapters(trainer), SAMPLES)
    experience = prepare_experience(trainer._model, batch, [layout_of(batch, PpoConfig(), WHOLE)], PpoConfig())
    generator = torch.Generator().manual_seed(1)
    moved = {
        n: getattr(experience, n) + noise(getattr(experience, n), generator) for n in ("old_logprobs", "old_values")
    }
    return Scene(trainer, batch, replace(experience, **moved), tolerance)


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return 0.3 * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def layout_of(batch: RolloutBatch, ppo: PpoConfig, max_tokens: int) -> Layout:
    return plan_epoch(batch, torch.arange(len(batch.samples)), ppo, max_tokens=max_tokens)[0]


def gradient_of(
    scene: Scene, ppo: PpoConfig, layout: Layout, text: Sequence[MicroBatch] = ()
) -> tuple[Tensor, dict[str, float]]:
    """The gradients of policy and critic in one optimiser step, and its figures."""
    learner = replace(scene.trainer._learner, config=ppo)
    step = PolicyStep(0.2, loss_denominator(layout, ppo, response_limit=9), text)
    figures = learner.accumulate(scene.experience, layout, step)
    parameters = trained_parameters(scene.trainer).values()
    gradient = torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return gradient, figures


def assert_equal(scene: Scene, got: tuple[Tensor, dict[str, float]], expected: tuple[Tensor, dict[str, float]]) -> None:
    largest = float(expected[0].abs().max())
    assert largest > 1e-3
    torch.testing.assert_close(got[0], expected[0], atol=scene.tolerance * largest, rtol=0.0)
    losses = [name for name in expected[1] if name.endswith(("_loss", "_bonus"))]
    assert {"policy_loss", "value_loss"} <= set(losses)
    for name in losses:
        assert got[1][name] == pytest.approx(expected[1][name], rel=scene.tolerance, abs=scene.tolerance)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("max_tokens", [1, 30, 50])
def test_d21_accumulation_over_micro_batches_equals_one_batch(exact: Scene, aggregation: str, max_tokens: int) -> None:
    ppo = PpoConfig.model_validate(EVERYTHING | {"aggregation": aggregation})
    results = []
    for tokens in (WHOLE, max_tokens):
        layout = layout_of(exact.batch, ppo, tokens)
        (text,) = plan_pretraining([Sample(row[:1], row[1:]) for row in TEXT], num_steps=1, max_tokens=tokens)
        assert (len(layout.policy) == len(text) == 1) == (tokens == WHOLE)
        results.append(gradient_of(exact, ppo, layout, text))
    whole, split = results
    assert {"kl_loss", "entropy_bonus", "ptx_loss"} <= split[1].keys()
    assert 0.1 < split[1]["clip_fraction"] < 0.9
    assert split[1]["dual_clip_fraction"] > 0.0
    assert_equal(exact, split, whole)
    for name in ("approx_kl", "clip_fraction", "dual_clip_fraction", "value_clip_fraction", "ratio_max"):
        assert split[1][name] == pytest.approx(whole[1][name], rel=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("max_tokens", [1, 40])
def test_d21_the_size_of_micro_batches_changes_nothing_in_float32(
    single: Scene, aggregation: str, max_tokens: int
) -> None:
    ppo = PpoConfig.model_validate(EVERYTHING | {"aggregation": aggregation})
    whole, split = (gradient_of(single, ppo, layout_of(single.batch, ppo, tokens)) for tokens in (WHOLE, max_tokens))
    assert_equal(single, split, whole)


def widen(micro: MicroBatch, columns: int) -> MicroBatch:
    """The same micro-batch with more padding to the right of its ids and of its mask."""
    length = micro.token_ids.shape[1]
    states = micro.states // length * (length + columns) + micro.states % length
    ids, mask = pad(micro.token_ids, (0, columns), value=5), pad(micro.mask, (0, columns))
    return replace(micro, token_ids=ids, mask=mask, states=states)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_d3_more_padding_changes_neither_losses_nor_gradients(single: Scene, aggregation: str) -> None:
    ppo = PpoConfig.model_validate(EVERYTHING | {"aggregation": aggregation})
    layout = layout_of(single.batch, ppo, 40)
    wide = Layout(*([widen(micro, 7) for micro in part] for part in (layout.policy, layout.critic)))
    assert_equal(single, gradient_of(single, ppo, wide), gradient_of(single, ppo, layout))


def reorder(batch: RolloutBatch, order: Sequence[int]) -> RolloutBatch:
    rows = ("samples", "logprobs", "ref_logprobs", "scores")
    changed: dict[str, Any] = {name: [getattr(batch, name)[i] for i in order] for name in rows}
    return replace(batch, **changed)


def reorder_flat(experience: Experience, order: Sequence[int]) -> Experience:
    lengths = [len(s.response_token_ids) for s in SAMPLES]
    tensors: dict[str, Any] = {}
    for name in FLAT:
        parts = torch.split(getattr(experience, name), lengths)
        tensors[name] = torch.cat([parts[i] for i in order])
    return replace(experience, **tensors)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_d21_the_order_of_the_batch_changes_neither_losses_nor_gradients(single: Scene, aggregation: str) -> None:
    ppo = PpoConfig.model_validate(EVERYTHING | {"aggregation": aggregation})
    order = torch.randperm(len(SAMPLES), generator=torch.Generator().manual_seed(4)).tolist()
    other = replace(single, batch=reorder(single.batch, order), experience=reorder_flat(single.experience, order))
    results = [gradient_of(s, ppo, layout_of(s.batch, ppo, 40)) for s in (other, single)]
    assert_equal(single, *results)


def test_the_order_of_the_batch_changes_no_advantage(exact: Scene) -> None:
    order = torch.randperm(len(SAMPLES), generator=torch.Generator().manual_seed(4)).tolist()
    model, ppo, shuffled = exact.trainer._model, PpoConfig(whiten_rewards=True), reorder(exact.batch, order)
    plain = prepare_experience(model, exact.batch, [layout_of(exact.batch, ppo, 40)], ppo)
    other = prepare_experience(model, shuffled, [layout_of(shuffled, ppo, 40)], ppo)
    expected = reorder_flat(plain, order)
    for name in FLAT:
        torch.testing.assert_close(getattr(other, name), getattr(expected, name), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize(
    "settings", [{}, {"whiten_rewards": True}, {"score_placement": "n_plus", "whiten_rewards": True}]
)
@pytest.mark.parametrize(("minibatches", "max_tokens"), [(1, 20), (3, WHOLE), (5, 30)])
def test_d19_whitening_statistics_are_those_of_the_whole_batch(
    exact: Scene, settings: dict[str, Any], minibatches: int, max_tokens: int
) -> None:
    order = torch.randperm(len(SAMPLES), generator=torch.Generator().manual_seed(5))
    ppo = PpoConfig.model_validate({"minibatches": minibatches} | settings)
    layouts = plan_epoch(exact.batch, order, ppo, max_tokens=max_tokens)
    model, whole = exact.trainer._model, layout_of(exact.batch, PpoConfig.model_validate(settings), WHOLE)
    sharded = prepare_experience(model, exact.batch, layouts, ppo)
    together = prepare_experience(model, exact.batch, [whole], ppo)
    for name in FLAT:
        torch.testing.assert_close(getattr(sharded, name), getattr(together, name), atol=1e-6, rtol=0.0)
    advantages = sharded.advantages
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantages.var(unbiased=False)) == pytest.approx(1.0, abs=1e-6)
    if minibatches > 1:
        parts = [advantages[torch.cat([micro.tokens for micro in layout.policy])] for layout in layouts]
        assert max(abs(float(part.mean())) for part in parts) > 0.05, "no minibatch is whitened by itself"


def test_d21_the_policy_gradient_at_ratio_1_is_that_of_the_weighted_logprobs(exact: Scene) -> None:
    model, ppo = exact.trainer._model, PpoConfig()
    layout = layout_of(exact.batch, ppo, WHOLE)
    experience = prepare_experience(model, exact.batch, [layout], ppo)
    got, _ = gradient_of(replace(exact, experience=experience), ppo, layout)
    parameters = list(model.adapter_parameters("policy").values())
    logprobs = torch.cat([full_logprobs(exact.trainer, sample) for sample in SAMPLES])
    gradients = torch.autograd.grad(-(experience.advantages * logprobs).mean(), parameters)
    expected = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(got[: len(expected)], expected, atol=1e-6, rtol=1e-6)


def full_logprobs(trainer: Trainer, sample: Sample) -> Tensor:
    """Through the whole transformers model, one unpadded sample at a time."""
    text, first = torch.tensor([[*sample.prompt_token_ids, *sample.response_token_ids]]), len(sample.prompt_token_ids)
    with trainer._model.using("policy"):
        logits: Tensor = trainer._model._peft(input_ids=text).logits[0, first - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, text[0, first:, None]).squeeze(-1)


def test_importance_weights_scale_the_policy_gradient_and_leave_the_critic_alone(exact: Scene) -> None:
    ppo, experience = PpoConfig(), exact.experience
    layout = layout_of(exact.batch, ppo, WHOLE)
    halved = replace(exact, experience=replace(experience, weights=experience.weights / 2))
    full, half = (gradient_of(scene, ppo, layout)[0] for scene in (exact, halved))
    size = sum(p.numel() for p in exact.trainer._model.trained_parameters("policy").values())
    torch.testing.assert_close(half[:size], full[:size] / 2, atol=1e-9, rtol=1e-6)
    assert half[size:].equal(full[size:])
    assert full[:size].abs().max() > 1e-3


def test_each_network_learns_from_its_own_loss_only(exact: Scene) -> None:
    layout, learner, model = layout_of(exact.batch, PpoConfig(), WHOLE), exact.trainer._learner, exact.trainer._model
    learner.accumulate_policy(exact.experience, layout, PolicyStep(0.0, 60.0))
    assert all(p.grad is None for p in model.trained_parameters("critic").values())
    learner.policy.clear()
    learner.accumulate_critic(exact.experience, layout)
    assert all(p.grad is None for p in model.trained_parameters("policy").values())
    exact.trainer._optimisers["critic"].clear()


def test_d21_denominators_are_those_of_the_whole_optimiser_step(exact: Scene) -> None:
    batch, tokens = exact.batch, sum(len(s.response_token_ids) for s in SAMPLES)
    for max_tokens in (WHOLE, 30):
        for aggregation, expected in (("token_mean", tokens), ("sequence_mean", 12), ("token_sum", 12 * 20)):
            ppo = PpoConfig.model_validate({"aggregation": aggregation})
            assert loss_denominator(layout_of(batch, ppo, max_tokens), ppo, response_limit=20) == expected


def test_d6_the_extra_states_of_n_plus_reach_the_value_loss_only(exact: Scene) -> None:
    ppo = PpoConfig(score_placement="n_plus")
    batch = replace(exact.batch, max_response_tokens=20)
    layout, model = layout_of(batch, ppo, 40), exact.trainer._model
    experience = prepare_experience(model, batch, [layout], ppo)
    extra = len(SAMPLES)
    assert len(value_samples(batch, "n_plus")) == extra
    assert experience.returns.numel() == experience.advantages.numel() + extra
    _, figures = gradient_of(replace(exact, experience=experience), ppo, layout)
    expected = 0.5 * float(((experience.old_values - experience.returns) ** 2).mean())
    assert figures["value_loss"] == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(figures["policy_loss"])
