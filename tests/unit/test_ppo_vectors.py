"""The numbers of public test suites, computed by the project's functions under each vector's own convention.

Inputs are converted where tether has another convention, expected numbers never. Each test is named after its vector.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.golden_vectors import Vector, assert_vector, load_vector, vector_ids
from tether_services.ppo.advantages import compute_returns, estimate_advantages, group_advantages
from tether_services.ppo.kl import KlKind, estimate_kl
from tether_services.ppo.losses import (
    aggregate,
    dpo_loss,
    entropy,
    pairwise_loss,
    policy_loss,
    ranking_loss,
)
from tether_services.ppo.rewards import shape_rewards
from tether_services.ppo.schedules import learning_rate_factor
from tether_services.ppo.statistics import masked_mean, masked_var, masked_whiten

both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


class Inputs:
    """The inputs of a vector as tensors of a dtype, and its settings as they are."""

    def __init__(self, vector: Vector, dtype: torch.dtype) -> None:
        self.vector, self.dtype = vector, dtype

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.vector.inputs[name], dtype=self.dtype)

    def setting(self, name: str) -> Any:
        return self.vector.inputs[name]

    def check(self, got: Tensor, name: str = "") -> None:
        """Compare with the expected output, or with a named one of several."""
        expected = self.vector.expected[name] if name else self.vector.expected
        assert_vector(got, expected, tol=self.vector.tol, dtype=self.dtype)


def all_kept(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def episodes(inputs: Inputs, row: int) -> Tensor:
    """Advantages of a row with T + 1 values and a discount per step.

    Tether has one discount and a terminal end, so the row is cut where the discount is 0 and the last reward takes up
    the discounted bootstrap value.
    """
    rewards, values, discounts = inputs["rewards"][row], inputs["values"][row], inputs["discounts"][row]
    rewards[-1] += discounts[-1] * values[-1]
    cuts = [0, *(t + 1 for t, d in enumerate(discounts[:-1].tolist()) if d == 0.0), len(rewards)]
    parts = []
    for begin, end in pairwise(cuts):
        part, gamma = rewards[None, begin:end], max(inputs.setting("discounts")[row][begin:end])
        parts.append(
            estimate_advantages(part, values[None, begin:end], all_kept(part), gamma=gamma, lam=inputs.setting("lam"))[
                0
            ]
        )
    return torch.cat(parts)


def check_episodes(vector: Vector, dtype: torch.dtype) -> None:
    inputs = Inputs(vector, dtype)
    inputs.check(torch.stack([episodes(inputs, row) for row in range(len(inputs["rewards"]))]))


@both
def test_vector_gae_rlax_lambda0_7(dtype: torch.dtype) -> None:
    check_episodes(load_vector("gae_rlax_lambda0.7"), dtype)


@both
def test_vector_gae_tfagents(dtype: torch.dtype) -> None:
    check_episodes(load_vector("gae_tfagents"), dtype)


@both
def test_vector_gae_nemo_rl_lambda0(dtype: torch.dtype) -> None:
    check_episodes(load_vector("gae_nemo_rl_lambda0"), dtype)


@both
def test_vector_gae_tianshou_terminated(dtype: torch.dtype) -> None:
    # Three terminated episodes of four steps; the current values are the next values shifted right by one.
    inputs = Inputs(load_vector("gae_tianshou_terminated"), dtype)
    values = (inputs["next_values"] * (1 - inputs["terminated"])).roll(1).reshape(3, 4)
    rewards = inputs["rewards"].reshape(3, 4)
    mask, gamma, lam = all_kept(rewards), inputs.setting("gamma"), inputs.setting("lam")
    advantages = estimate_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    inputs.check(compute_returns(advantages, values, mask).flatten())


@both
def test_vector_returns_torchtune(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("returns_torchtune"), dtype)
    rewards, values = inputs["rewards"], inputs["values"][:, :-1]
    advantages = estimate_advantages(rewards, values, all_kept(rewards), gamma=0.9, lam=inputs.setting("lam"))
    inputs.check(compute_returns(advantages, values, all_kept(rewards)))


@both
def test_vector_discounted_return_rlax(dtype: torch.dtype) -> None:
    # A discount per step becomes gamma 1 on rewards scaled by the product of the discounts before them.
    inputs = Inputs(load_vector("discounted_return_rlax"), dtype)
    discounts = inputs["discounts"]
    before = torch.cat([torch.ones_like(discounts[:, :1]), discounts[:, :-1].cumprod(dim=1)], dim=1)
    rewards = before * inputs["rewards"]
    rewards[:, -1] += discounts.prod(dim=1) * inputs["bootstrap"]
    got = estimate_advantages(rewards, torch.zeros_like(rewards), all_kept(rewards), gamma=1.0, lam=1.0)
    inputs.check(got / before)


@both
def test_vector_ppo_reward_torchtune(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("ppo_reward_torchtune"), dtype)
    rows = inputs["scores"], inputs["logprobs"], inputs["ref_logprobs"]
    inputs.check(shape_rewards(*rows, all_kept(rows[1]), kl_coef=inputs.setting("beta")))


@both
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_vector_kl_estimators_nemo_rl(kind: KlKind, dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("kl_estimators_nemo_rl"), dtype)
    inputs.check(estimate_kl(inputs["logp"], inputs["ref_logp"], kind=kind), kind)


def check_clipped_loss(inputs: Inputs, *, dual_clip: float | None) -> None:
    new, old, advantages = (inputs[name][:, None] for name in ("logp", "old_logp", "adv"))
    options = {"clip_range": inputs.setting("eps"), "dual_clip": dual_clip}
    columns = list(zip(new, old, advantages, strict=True))
    runs = [policy_loss(new[None], old[None], adv[None], torch.ones(1, 1), **options) for new, old, adv in columns]
    inputs.check(torch.stack([loss for loss, _ in runs]), "per_token")
    inputs.check(torch.stack([metrics["ratio_mean"] for _, metrics in runs]), "ratio")
    inputs.check(policy_loss(new, old, advantages, all_kept(new), **options)[0], "loss")


@both
def test_vector_ppo_clip_nemo_rl(dtype: torch.dtype) -> None:
    check_clipped_loss(Inputs(load_vector("ppo_clip_nemo_rl"), dtype), dual_clip=None)


@both
def test_vector_ppo_dualclip_nemo_rl(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("ppo_dualclip_nemo_rl"), dtype)
    check_clipped_loss(inputs, dual_clip=inputs.setting("dual_clip"))


@both
def test_vector_reinforce_nemo_rl(dtype: torch.dtype) -> None:
    # At ratio 1 the gradient of the clipped loss is that of -A * logp, which is what this vector lists.
    inputs = Inputs(load_vector("reinforce_nemo_rl"), dtype)
    logp, advantages = inputs["logp"][None].requires_grad_(), inputs["adv"][None]
    loss, _ = policy_loss(logp, logp, advantages, all_kept(advantages), clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss, logp)
    inputs.check((gradient * logp)[0] * 3, "per_token")
    inputs.check((gradient * logp).sum(), "loss")


@both
def test_vector_loss_agg_verl(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("loss_agg_verl"), dtype)
    inputs.check(aggregate(inputs["loss"], inputs["mask"], aggregation="token_sum"))


@both
def test_vector_entropy_loss_rlax(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("entropy_loss_rlax"), dtype)
    weights, per_step = inputs["weights"], entropy(torch.stack([inputs["logits"], inputs["logits"] + 1.0]))
    inputs.check(masked_mean(-per_step * weights, dim=1))


@both
def test_vector_rso_hinge_torchtune(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("rso_hinge_torchtune"), dtype)
    pairs = zip(*(inputs[name][:, None] for name in ("pc", "pr", "rc", "rr")), strict=True)
    inputs.check(torch.stack([dpo_loss(*pair, beta=inputs.setting("gamma"), kind="hinge") for pair in pairs]))


@both
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_vector_dpo_zero_nemo_rl(beta: float, dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("dpo_zero_nemo_rl"), dtype)
    chosen, rejected = torch.tensor([-0.5, -9.0], dtype=dtype), torch.tensor([-3.0, -1.0], dtype=dtype)
    inputs.check(dpo_loss(chosen, rejected, chosen, rejected, beta=beta))


@both
def test_vector_rloo_nemo_rl(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("rloo_nemo_rl"), dtype)
    rewards, groups = inputs["rewards"], torch.tensor(inputs.setting("group"))
    inputs.check(rewards - group_advantages(rewards, groups, kind="rloo"), "baseline")
    others = (groups[:, None] == groups[None, :]) & ~torch.eye(len(groups), dtype=torch.bool)
    inputs.check(torch.stack([masked_var(rewards, mask, unbiased=True).sqrt() for mask in others]), "std")


@both
def test_vector_pairwise_logistic_tfr(dtype: torch.dtype) -> None:
    # A higher label is better, a smaller rank is better.
    inputs = Inputs(load_vector("pairwise_logistic_tfr"), dtype)
    lists = zip(inputs["scores"], -inputs["labels"], strict=True)
    inputs.check(torch.stack([ranking_loss(scores, ranks) for scores, ranks in lists]))


@both
def test_vector_listmle_allrank(dtype: torch.dtype) -> None:
    # With two items the likelihood of a list is that of one pair; for more they differ, and tether has no such loss.
    inputs = Inputs(load_vector("listmle_allrank"), dtype)
    scores = inputs["scores"]
    inputs.check(ranking_loss(scores, -inputs["labels"]))
    inputs.check(pairwise_loss(scores[:1], scores[1:]))


@both
def test_vector_masked_mean_torchtune(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("masked_mean_torchtune"), dtype)
    inputs.check(masked_mean(inputs["x"], inputs["mask"], dim=1))


@both
def test_vector_masked_whiten_trl(dtype: torch.dtype) -> None:
    inputs = Inputs(load_vector("masked_whiten_trl"), dtype)
    x, mask = inputs["x"], inputs["mask"]
    inputs.check(masked_mean(x, mask), "mean")
    inputs.check(masked_var(x, mask, unbiased=True), "var")
    inputs.check(masked_whiten(x, mask, unbiased=True)[mask.bool()], "whitened_at_mask")


def test_vector_lr_cosine_cs336() -> None:
    vector = load_vector("lr_cosine_cs336")
    peak, minimum, warmup, cycle = (vector.inputs[name] for name in ("max", "min", "warmup", "cycle"))
    factors = [
        learning_rate_factor(step, kind="cosine", total_steps=cycle, warmup_steps=warmup, minimum=minimum / peak)
        for step in range(25)
    ]
    got = peak * torch.tensor(factors, dtype=torch.float64)
    assert_vector(got, vector.expected, tol=vector.tol, dtype=torch.float64)


def test_every_vector_has_a_test_of_its_name_and_every_such_test_a_vector() -> None:
    # Each test is called test_vector_<id>, with _ for what a name cannot hold, and loads the vector of that id.
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*_vectors.py")]
    parts = [part for source in sources for part in re.split(r"^def test_vector_", source, flags=re.MULTILINE)[1:]]
    tests = {re.match(r"\w+", part)[0]: part for part in parts}  # type: ignore[index]
    ids = vector_ids()
    assert {re.sub(r"\W", "_", vector_id) for vector_id in ids} == set(tests)
    for vector_id in ids:
        assert f'load_vector("{vector_id}")' in tests[re.sub(r"\W", "_", vector_id)]
