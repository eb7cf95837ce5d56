"""Alarms: which figures of a step raise one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.run_inputs import fields_of, run_config
from tether_services.orchestrator.alarms import ALARMS, find_alarm
from tether_services.orchestrator.config import AlarmConfig
from tether_services.orchestrator.run_config import check_run_config, check_run_settings

CALM = {"kl_per_sequence": 1.0, "entropy": 2.0, "score_mean": 0.5, "score_std": 1.0, "mean_abs_dlogp": 1e-4}
LIMITS = {"kl_max": 5.0, "entropy_min": 0.5, "score_drop": 2.0, "mismatch_max": 0.01}


def found(limits: Mapping[str, Any], now: Mapping[str, float], *, steps: int = 10) -> str | None:
    """Return the name of the alarm that a step raises after so many calm ones."""
    alarm = find_alarm(AlarmConfig(**limits), [CALM] * steps, now)
    return alarm.name if alarm else None


def test_a_step_like_those_before_it_raises_no_alarm() -> None:
    assert found(LIMITS, CALM) is None


def test_without_limits_nothing_raises_an_alarm() -> None:
    assert found({}, dict.fromkeys(CALM, math.nan)) is None
    assert not AlarmConfig().is_set
    assert all(AlarmConfig.model_validate({name: limit}).is_set for name, limit in LIMITS.items())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kl_per_sequence": 5.001}, "kl_max"),
        ({"entropy": 0.499}, "entropy_min"),
        ({"score_mean": -1.501}, "score_drop"),
        ({"mean_abs_dlogp": 0.0101}, "mismatch_max"),
        ({"kl_per_sequence": 5.0, "entropy": 0.5, "score_mean": -1.5, "mean_abs_dlogp": 0.01}, None),
        ({"kl_per_sequence": -9.0, "entropy": 9.0, "score_mean": 9.0, "mean_abs_dlogp": 0.0}, None),
    ],
)
def test_a_figure_beyond_its_limit_raises_its_alarm(change: dict[str, float], name: str | None) -> None:
    assert found(LIMITS, CALM | change) == name
    if name:
        assert found({name: LIMITS[name]}, CALM | change) == name
        others = {other: limit for other, limit in LIMITS.items() if other != name}
        assert found(others, CALM | change) is None


@pytest.mark.parametrize("figure", ["kl_per_sequence", "entropy", "score_mean", "mean_abs_dlogp"])
def test_a_figure_that_is_not_a_number_or_absent_is_beyond_every_limit(figure: str) -> None:
    assert found(LIMITS, CALM | {figure: math.nan}) in ALARMS
    assert found(LIMITS, {name: value for name, value in CALM.items() if name != figure}) in ALARMS


def test_a_score_is_compared_with_three_steps_at_least_and_ten_at_most() -> None:
    low = CALM | {"score_mean": -9.0}
    assert [found({"score_drop": 2.0}, low, steps=steps) for steps in (0, 1, 2, 3)] == [None, None, None, "score_drop"]
    long_ago = [CALM | {"score_mean": 1000.0}] * 5
    assert find_alarm(AlarmConfig(score_drop=2.0), long_ago + [CALM] * 10, CALM) is None


def test_deviations_are_those_of_the_scores_within_a_step() -> None:
    spread = [CALM | {"score_std": 4.0, "score_mean": mean} for mean in (0.0, 2.0, 1.0)]
    limits = AlarmConfig(score_drop=2.0)
    assert find_alarm(limits, spread, CALM | {"score_mean": -7.0}) is None, "1 - 2 x 4"
    alarm = find_alarm(limits, spread, CALM | {"score_mean": -7.01})
    assert alarm is not None and "2 standard deviations (4 each) below 1, the mean of the last 3 steps" in alarm.text


def test_a_score_that_did_not_vary_is_compared_in_the_deviations_of_the_step_itself() -> None:
    perfect, limits = [CALM | {"score_mean": 1.0, "score_std": 0.0}] * 10, AlarmConfig(score_drop=2.0)
    one_of_64_wrong = CALM | {"score_mean": 63 / 64, "score_std": math.sqrt(63) / 64}
    assert find_alarm(limits, perfect, one_of_64_wrong) is None
    again = CALM | {"score_mean": 62 / 64, "score_std": math.sqrt(2 * 62) / 64}
    assert find_alarm(limits, [*perfect[1:], one_of_64_wrong], again) is None
    assert find_alarm(limits, perfect, CALM | {"score_mean": 0.0, "score_std": 0.0}) is not None
    assert find_alarm(limits, perfect, CALM | {"score_mean": math.nan, "score_std": math.nan}) is not None


def test_an_alarm_says_the_figure_and_its_limit() -> None:
    alarm = find_alarm(AlarmConfig(kl_max=5.0), [], CALM | {"kl_per_sequence": 12.3456})
    assert str(alarm) == "alarm kl_max: kl_per_sequence is 12.35, above 5"


def test_a_rollback_may_go_further_back_than_checkpoints_are_kept_for_else(tmp_path: Path) -> None:
    alarms = '[alarms]\nkl_max = 5.0\naction = "rollback"\n'
    check_run_config(run_config(tmp_path, "keep_checkpoints = 1", ppo=alarms + "rollback_steps = 2"))


def test_an_alarm_that_could_never_be_raised_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, ppo="mismatch_limit = 0.05\n[alarms]\nmismatch_max = 0.05")
    assert set(fields_of(lambda: check_run_settings(config))) == {"alarms.mismatch_max"}
    check_run_settings(run_config(tmp_path, ppo="mismatch_limit = 0.05\n[alarms]\nmismatch_max = 0.04"))


@pytest.mark.parametrize(
    ("alarms", "idle"),
    [
        ('action = "rollback"', {"alarms.action"}),
        ("rollback_steps = 1", {"alarms.rollback_steps"}),
        ("kl_max = 5.0\nmax_rollbacks = 2", {"alarms.max_rollbacks"}),
        ('action = "stop"', set()),
    ],
)
def test_what_to_do_at_an_alarm_that_cannot_come_is_refused(tmp_path: Path, alarms: str, idle: set[str]) -> None:
    config = run_config(tmp_path, ppo=f"[alarms]\n{alarms}")
    if not idle:
        check_run_settings(config)
        return
    assert set(fields_of(lambda: check_run_settings(config))) == idle
