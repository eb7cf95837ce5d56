"""From a finished step to its record: counts, times and means."""

from __future__ import annotations

import errno
import math
import time
from collections import Counter

import pytest

from tests.unit.run_inputs import scored_sample
from tether.errors import FailedPreconditionError, ResourceExhaustedError
from tether_services.orchestrator.loop import check_update, warn_of_mismatch
from tether_services.orchestrator.publishing import PushFigures
from tether_services.orchestrator.records import StepNumbers
from tether_services.orchestrator.rollouts import Rollout, Span
from tether_services.orchestrator.step_metrics import DROP_REASONS, OPTIONAL_METRICS, STEP_METRICS
from tether_services.orchestrator.step_record import StepClock, name_phase, summarise_push, summarise_step
from tether_services.orchestrator.trainer import UpdateReport

PUSHED = PushFigures(
    transfer_seconds=0.1, verify_seconds=0.2, load_seconds=0.3, activate_seconds=0.4, probe_mean_abs_dlogp=1e-6
)
SECONDS = {
    "step_seconds": 20.0,
    "rollout_seconds": 6.0,
    "train_seconds": 9.0,
    "checkpoint_seconds": 0.5,
    "push_seconds": 2.0,
    "push_serialize_seconds": 0.25,
}


def update_report(**figures: float) -> UpdateReport:
    values = dict.fromkeys(UpdateReport.__dataclass_fields__, 0.25)
    return UpdateReport(**(values | figures))  # type: ignore[arg-type]


def rollout() -> Rollout:
    samples = [
        scored_sample(token_ids=(5, 6), score=1.0),
        scored_sample(token_ids=(7,), logprobs=(-0.5,), ref_logprobs=(-0.25,), score=4.0, stopped=True),
        scored_sample(token_ids=(8, 9), score=-2.0, stopped=True),
    ]
    return Rollout(
        samples,
        Counter(not_scored=1),
        num_asked=6,
        num_generated=4,
        num_not_generated=2,
        num_abandoned=7,
        generated_tokens=10,
        generate=Span(100.0, 104.0),
        score=Span(101.0, 105.5),
        reference=Span(101.0, 106.0),
    )


NUMBERS = StepNumbers(3, 5, 6, 1)


def test_the_figures_of_a_step_are_counted_from_its_samples() -> None:
    metrics = summarise_step(NUMBERS, rollout(), update_report(), SECONDS, adapter_bytes=77).metrics
    assert (metrics["samples_generated"], metrics["samples_trained"], metrics["samples_dropped"]) == (4, 3, 1)
    assert [metrics[f"dropped_{reason}"] for reason in DROP_REASONS] == [0, 0, 0, 0, 1, 0]
    assert [metrics[f"samples_{state}"] for state in ("asked", "not_generated", "abandoned")] == [6, 2, 7]
    assert (metrics["generated_tokens"], metrics["effective_tokens"], metrics["tokens_per_second"]) == (10, 5, 2.5)
    assert metrics["score_mean"] == 1.0
    assert metrics["score_std"] == pytest.approx(math.sqrt(6.0))
    assert metrics["response_length_mean"] == pytest.approx(5 / 3)
    assert metrics["truncated_ratio"] == pytest.approx(1 / 3)
    assert metrics["adapter_bytes"] == 77


def test_overlapping_phases_have_their_own_spans_and_waits() -> None:
    metrics = summarise_step(NUMBERS, rollout(), update_report(), SECONDS, adapter_bytes=1).metrics
    assert (metrics["rollout_seconds"], metrics["score_seconds"], metrics["ref_seconds"]) == (4.0, 4.5, 5.0)
    assert metrics["score_wait_seconds"] == 1.0
    assert metrics["train_wait_seconds"] == 2.0, "6 s of rollout phase, 4 s of generation"
    assert metrics["push_serialize_seconds"] == 0.25


def test_a_push_adds_its_stages_and_the_whole_time() -> None:
    figures = summarise_push(PUSHED, SECONDS | {"step_seconds": 23.0})
    assert [figures[f"push_{stage}_seconds"] for stage in ("transfer", "verify", "load", "activate")] == [
        *(0.1, 0.2, 0.3, 0.4)
    ]
    assert figures["push_seconds"] == 2.25, "with the serialisation, which comes before the commit"
    assert (figures["step_seconds"], figures["probe_mean_abs_dlogp"]) == (23.0, 1e-6)


def test_figures_of_a_push_that_were_not_measured_are_left_out() -> None:
    figures = summarise_push(PushFigures(activate_seconds=0.4), SECONDS)
    assert set(figures) == {"push_seconds", "step_seconds", "push_activate_seconds"}


def test_a_record_has_every_name_of_the_list_and_no_other() -> None:
    before_push = {name: value for name, value in SECONDS.items() if name != "push_seconds"}
    record = summarise_step(NUMBERS, rollout(), update_report(), before_push, adapter_bytes=1)
    assert (record.step, record.policy_version) == (3, 5)
    names = {*record.metrics, *summarise_push(PUSHED, SECONDS)}
    assert set(STEP_METRICS) - names <= OPTIONAL_METRICS
    assert names <= set(STEP_METRICS)
    assert record.distributions == {"score": [1.0, 4.0, -2.0], "response_length": [2, 1, 2]}


def test_a_figure_that_is_undefined_is_left_out() -> None:
    report = update_report(explained_variance=math.nan)
    assert "explained_variance" not in summarise_step(NUMBERS, rollout(), report, SECONDS, adapter_bytes=1).metrics


def test_the_clock_times_phases_and_the_step() -> None:
    clock = StepClock()
    with clock.phase("train", 0):
        time.sleep(0.02)
    seconds = clock.finish()
    assert 0.02 <= seconds["train_seconds"] <= seconds["step_seconds"] < 5


def test_an_error_says_in_which_step_and_phase_it_happened() -> None:
    clock = StepClock()
    with pytest.raises(FailedPreconditionError) as caught, clock.phase("push", 4):
        raise FailedPreconditionError("adapter at x: refused", reason="PROOF_FAILED")
    assert caught.value.message == "step 4, push: adapter at x: refused"
    assert caught.value.reason == "PROOF_FAILED"
    with pytest.raises(ZeroDivisionError), name_phase("anywhere"):
        raise ZeroDivisionError


def test_a_full_disk_is_named_with_the_step_and_phase() -> None:
    with pytest.raises(ResourceExhaustedError) as caught, StepClock().phase("checkpoint", 4):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/demo/checkpoints")
    assert caught.value.reason == "STORAGE_FULL"
    assert caught.value.message.startswith("step 4, checkpoint: The disk of /runs/demo/checkpoints is full")
    with pytest.raises(FileNotFoundError), name_phase("anywhere"):
        raise FileNotFoundError


def test_d1_a_first_step_whose_policy_is_not_the_reference_is_refused() -> None:
    check_update(update_report(kl_per_token=1e-6, kl_k3_per_token=0.0), 0, limit=0.05)
    check_update(update_report(kl_per_token=0.3, kl_k3_per_token=0.2), 1, limit=0.05)
    for figures in ({"kl_per_token": 0.06}, {"kl_per_token": -0.06}, {"kl_k3_per_token": 0.06}):
        with pytest.raises(FailedPreconditionError) as caught:
            check_update(update_report(**({"kl_per_token": 0.0, "kl_k3_per_token": 0.0} | figures)), 0, limit=0.05)
        assert caught.value.reason == "REFERENCE_MISMATCH"


def test_a_generator_that_drifts_from_the_trainer_is_warned_of_by_the_figures_that_show_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    usual = {"mean_abs_dlogp": 0.02, "mult_prob_error": 1.02, "gen_kl": 5e-3}
    warn_of_mismatch(update_report(**usual), 3, run_id="run-1")
    assert not caplog.records
    warn_of_mismatch(update_report(**usual | {"mult_prob_error": 1.03, "gen_kl": 6e-3}), 3, run_id="run-1")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.__dict__["fields"] == {"run_id": "run-1", "step": 3, "mult_prob_error": 1.03, "gen_kl": 6e-3}


def test_every_figure_has_a_meaning_and_stands_in_the_readme() -> None:
    from pathlib import Path

    import tether_services.orchestrator as package

    readme = (Path(next(iter(package.__path__))) / "README.md").read_text()
    assert [name for name in STEP_METRICS if f"`{name}`" not in readme] == []
    assert all(STEP_METRICS.values())
