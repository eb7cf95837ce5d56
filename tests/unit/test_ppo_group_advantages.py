from __future__ import annotations

import math
import statistics
from typing import cast

import pytest
import torch

from tests.unit.golden_vectors import assert_within, float64
from tests.unit.random_rows import normal
from tether_services.ppo.advantages import GroupKind, group_advantages

KINDS: tuple[GroupKind, ...] = ("grpo", "dr_grpo", "rloo", "reinforce_baseline")
SCORES = normal(0, 12) * 2.0 + 3.0
GROUPS = torch.tensor([7, 2, 7, 5, 2, 5, 7, 7, 5, 2, 5, 5])
"""Groups of 4, 3 and 5, mixed, with ids that are not 0, 1, 2."""


def slow_advantage(i: int, kind: GroupKind) -> float:
    """The definition, from the scores of the others and of the whole group."""
    group = [float(SCORES[j]) for j in range(len(SCORES)) if GROUPS[j] == GROUPS[i]]
    others = [float(SCORES[j]) for j in range(len(SCORES)) if GROUPS[j] == GROUPS[i] and j != i]
    own = float(SCORES[i])
    if kind == "rloo":
        return own - statistics.fmean(others)
    centred = own - statistics.fmean(group)
    return centred / (statistics.stdev(group) + 1e-6) if kind == "grpo" else centred


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_d37_d38_group_advantages_match_a_slow_loop(kind: GroupKind, dtype: torch.dtype) -> None:
    got = group_advantages(SCORES.to(dtype), GROUPS, kind=kind)
    assert got.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_within(got, [slow_advantage(i, kind) for i in range(len(SCORES))], tolerance)


def test_d37_grpo_matches_the_public_group_numbers() -> None:
    # CS336 assignment 5, test_grpo: unbiased deviation, 1e-6.
    scores = float64([0.2, 0.5, 0.0, 0.4, 0.9, 0.7, 0.2, 0.0])
    groups = torch.tensor([0] * 4 + [1] * 4)
    expected = [-0.3382392, 1.0147176, -1.2402104, 0.56373197, 1.0706171, 0.5947873, -0.5947872, -1.0706171]
    assert_within(group_advantages(scores, groups, kind="grpo"), expected, 1e-6)
    centred = [-0.075, 0.225, -0.275, 0.125, 0.45, 0.25, -0.25, -0.45]
    assert_within(group_advantages(scores, groups, kind="dr_grpo"), centred, 1e-12)
    assert_within(group_advantages(scores, groups, kind="reinforce_baseline"), centred, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d37_grpo_divides_nearly_equal_rewards_by_their_deviation_plus_1e_6(dtype: torch.dtype) -> None:
    # verl's low-variance case: the floor of 1e-6 is an eighth of the deviation and must not be lost or magnified.
    scores = torch.tensor([1.0, 1.00001, 2.0, 2.00001], dtype=dtype)
    got = group_advantages(scores, torch.tensor([0, 0, 1, 1]), kind="grpo")
    for first in (0, 2):
        gap = float(scores[first + 1].double() - scores[first].double())
        half = gap / 2 / (gap / math.sqrt(2) + 1e-6)
        assert got[first : first + 2].tolist() == pytest.approx([-half, half], rel=1e-4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, -7.3])
@pytest.mark.parametrize("kind", KINDS)
def test_d37_d38_equal_rewards_have_exactly_no_advantage(kind: GroupKind, value: float) -> None:
    scores = torch.full((7,), value)
    assert group_advantages(scores, torch.tensor([0, 0, 0, 1, 1, 1, 1]), kind=kind).eq(0.0).all()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "reinforce_baseline"])
def test_d37_a_group_of_one_has_no_advantage(kind: GroupKind) -> None:
    got = group_advantages(float64([5.0, 1.0, 3.0]), torch.tensor([4, 0, 0]), kind=kind)
    assert got[0] == 0.0
    assert got[1] == -got[2] != 0.0
    assert group_advantages(float64([5.0]), torch.tensor([0]), kind=kind).tolist() == [0.0]


def test_d38_rloo_of_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two responses"):
        group_advantages(float64([5.0, 1.0, 3.0]), torch.tensor([4, 0, 0]), kind="rloo")
    with pytest.raises(ValueError, match="at least two responses"):
        group_advantages(
            float64([5.0, 1.0, 3.0]), torch.tensor([0, 0, 0]), kind="rloo", mask=torch.tensor([True, False, False])
        )


def test_d38_rloo_matches_hand_calculation() -> None:
    scores = float64([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0])
    got = group_advantages(scores, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]), kind="rloo")
    assert_within(got, [-0.5, 1.0, -0.5, 0.0, 0.0, 0.0, -0.75, 0.0, 0.75], 1e-12)


def test_d38_rloo_is_n_over_n_minus_1_times_the_centred_reward() -> None:
    rloo = group_advantages(SCORES, GROUPS, kind="rloo")
    centred = group_advantages(SCORES, GROUPS, kind="dr_grpo")
    factor = float64([{7: 4 / 3, 2: 3 / 2, 5: 5 / 4}[int(g)] for g in GROUPS])
    torch.testing.assert_close(rloo, centred * factor)


@pytest.mark.parametrize("kind", KINDS)
def test_d37_d38_the_advantages_of_a_group_add_up_to_0(kind: GroupKind) -> None:
    got = group_advantages(SCORES, GROUPS, kind=kind)
    for group in (2, 5, 7):
        assert float(got[GROUPS.eq(group)].sum()) == pytest.approx(0.0, abs=1e-12)
        assert got[GROUPS.eq(group)].abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [999.0, math.nan, math.inf, -math.inf])
def test_d38_a_masked_response_counts_neither_in_the_sum_nor_in_the_divisor(kind: GroupKind, garbage: float) -> None:
    mask = torch.ones(12, dtype=torch.bool)
    mask[[0, 3, 8]] = False
    got = group_advantages(torch.where(mask, SCORES, garbage), GROUPS, kind=kind, mask=mask)
    torch.testing.assert_close(got[mask], group_advantages(SCORES[mask], GROUPS[mask], kind=kind))
    assert got[~mask].eq(0.0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_d37_d38_a_group_that_is_masked_entirely_is_0_and_harms_nobody(kind: GroupKind) -> None:
    mask = (GROUPS != 2).long()
    got = group_advantages(SCORES, GROUPS, kind=kind, mask=mask)
    assert got[GROUPS == 2].eq(0.0).all()
    whole = group_advantages(SCORES, GROUPS, kind=kind)
    assert got[GROUPS != 2].equal(whole[GROUPS != 2])


@pytest.mark.parametrize("kind", KINDS)
def test_d37_d38_the_order_of_responses_and_the_names_of_groups_do_not_matter(kind: GroupKind) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    whole = group_advantages(SCORES, GROUPS, kind=kind)
    torch.testing.assert_close(group_advantages(SCORES[order], GROUPS[order], kind=kind), whole[order])
    torch.testing.assert_close(group_advantages(SCORES, 1000 - 3 * GROUPS, kind=kind), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_d37_d38_a_constant_added_to_a_group_changes_nothing(kind: GroupKind) -> None:
    shifted = SCORES + torch.where(GROUPS == 5, 100.0, -3.0)
    torch.testing.assert_close(
        group_advantages(shifted, GROUPS, kind=kind), group_advantages(SCORES, GROUPS, kind=kind)
    )


def test_d37_only_grpo_is_independent_of_the_scale_of_the_rewards() -> None:
    for kind in KINDS:
        ratio = group_advantages(100.0 * SCORES, GROUPS, kind=kind) / group_advantages(SCORES, GROUPS, kind=kind)
        assert ratio.tolist() == pytest.approx([1.0 if kind == "grpo" else 100.0] * 12, rel=1e-5)


def test_d38_rewards_of_very_different_size_keep_their_precision_in_float32() -> None:
    # NeMo-RL test_utils: 1e-8 and 1e8 in one batch.
    scores = torch.tensor([1e-8, 2e-8, 3e-8, 1e8, 2e8, 3e8])
    got = group_advantages(scores, torch.tensor([0, 0, 0, 1, 1, 1]), kind="rloo")
    assert got.tolist() == pytest.approx([-1.5e-8, 0.0, 1.5e-8, -1.5e8, 0.0, 1.5e8], rel=1e-5, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_d37_d38_no_gradient_flows_and_half_precision_becomes_float32(kind: GroupKind) -> None:
    scores = SCORES.half().requires_grad_()
    got = group_advantages(scores, GROUPS, kind=kind)
    assert not got.requires_grad
    assert got.dtype == torch.float32


def test_d37_d38_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'remax'"):
        group_advantages(SCORES, GROUPS, kind=cast(GroupKind, "remax"))
