from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from tether_services.ppo.schedules import Schedule, learning_rate_factor

KINDS: tuple[Schedule, ...] = ("linear", "cosine", "constant")


def test_d27_linear_decays_to_0_over_the_run() -> None:
    got = [learning_rate_factor(step, kind="linear", total_steps=4) for step in range(6)]
    assert got == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_d27_linear_decay_ends_at_the_minimum_and_stays_there() -> None:
    got = [learning_rate_factor(step, kind="linear", total_steps=4, minimum=0.2) for step in range(6)]
    assert got == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_d27_warm_up_rises_from_0_and_the_decay_starts_at_its_end() -> None:
    got = [learning_rate_factor(step, kind="linear", total_steps=6, warmup_steps=2) for step in range(8)]
    assert got == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_d27_cosine_matches_its_closed_form() -> None:
    got = [learning_rate_factor(s, kind="cosine", total_steps=12, warmup_steps=2, minimum=0.1) for s in range(2, 13)]
    expected = [0.1 + 0.9 * math.cos(math.pi * s / 20) ** 2 for s in range(11)]
    assert got == pytest.approx(expected, abs=1e-15)


def test_d27_cosine_stays_at_its_minimum_and_does_not_rise_again() -> None:
    for step in (12, 13, 17, 22):
        assert learning_rate_factor(step, kind="cosine", total_steps=12, minimum=0.1) == pytest.approx(0.1)


def test_d27_constant_only_warms_up() -> None:
    got = [learning_rate_factor(s, kind="constant", total_steps=4, warmup_steps=2, minimum=0.3) for s in range(7)]
    assert got == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_d27_without_warm_up_the_first_step_has_the_full_rate(kind: Schedule) -> None:
    assert learning_rate_factor(0, kind=kind, total_steps=1) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_d27_the_factor_never_leaves_0_to_1(kind: Schedule) -> None:
    for total in (1, 2, 9):
        for warmup in range(total):
            factors = [learning_rate_factor(s, kind=kind, total_steps=total, warmup_steps=warmup) for s in range(12)]
            assert max(factors) == 1.0
            assert min(factors) >= 0.0
            assert factors[warmup] == 1.0


def test_d27_the_linear_factor_equals_that_of_pytorch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.25, total_iters=7)
    for step in range(10):
        got = learning_rate_factor(step, kind="linear", total_steps=7, minimum=0.25)
        assert got == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("step", [0, 3, 9])
def test_an_unknown_schedule_is_refused_at_every_step(step: int) -> None:
    with pytest.raises(ValueError, match="'exponential'"):
        learning_rate_factor(step, kind=cast(Schedule, "exponential"), total_steps=5, warmup_steps=2)
