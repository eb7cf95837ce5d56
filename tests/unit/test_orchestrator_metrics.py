"""The exposition of the orchestrator: which families there are, and what a step and a run's end do to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.unit.run_inputs import step_record
from tether_services.orchestrator.metrics import OrchestratorMetrics
from tether_services.orchestrator.records import Rollback, RunRecord, RunState
from tether_services.orchestrator.remote import SERVICE_NAMES

FAMILIES = {
    "tether_run_active",
    "tether_step_total",
    "tether_step_duration_seconds",
    "tether_phase_wait_seconds",
    "tether_generated_tokens_total",
    "tether_effective_tokens_total",
    "tether_samples_total",
    "tether_samples_unaccounted",
    "tether_breaker_open",
    "tether_lagging_generators",
    "tether_policy_version",
    "tether_rollout_staleness_versions",
    "tether_adapter_push_duration_seconds",
    "tether_adapter_push_total",
    "tether_adapter_bytes",
    "tether_reward",
    "tether_reward_mean",
    "tether_reward_std",
    "tether_kl_coef",
    "tether_kl_nats",
    "tether_entropy_nats",
    "tether_ppo_clip_ratio",
    "tether_value_explained_variance",
    "tether_grad_norm",
    "tether_lr",
    "tether_advantage_std",
    "tether_response_length_tokens",
    "tether_truncated_ratio",
    "tether_logprob_mismatch_nats",
    "tether_importance_ratio_max",
    "tether_nan_total",
    "tether_resume_total",
    "tether_alarms_total",
    "tether_rollbacks_total",
    "tether_tokens_per_second",
    "tether_trainer_memory_bytes",
}


class Exported:
    """Metrics and a way to read them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = OrchestratorMetrics(self.registry)

    def value(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(name, labels)
        assert value is not None, f"{name} {labels} is not exported"
        return value

    def families(self) -> set[str]:
        text = generate_latest(self.registry).decode()
        names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
        return {name for name in names if not name.endswith("_created")}


def run_record(state: RunState, error: str = "") -> RunRecord:
    return RunRecord("demo", state, 1, 0, 3, 0, error, False, 0.0, None, "")


def test_all_families_and_label_combinations_exist_from_the_start() -> None:
    exported = Exported()
    assert exported.families() == FAMILIES
    for outcome in ("committed", "failed", "skipped"):
        assert exported.value("tether_step_total", outcome=outcome) == 0
    for state in ("generated", "scored", "trained", "dropped_stale", "dropped_invalid"):
        assert exported.value("tether_samples_total", state=state) == 0
    for alarm in ("kl_max", "entropy_min", "score_drop", "mismatch_max"):
        assert exported.value("tether_alarms_total", alarm=alarm) == 0
    for phase in ("rollout", "score", "ref", "train", "checkpoint", "push"):
        assert exported.value("tether_step_duration_seconds_count", phase=phase) == 0
    for stage in ("serialize", "transfer", "verify", "load", "activate"):
        assert exported.value("tether_adapter_push_duration_seconds_count", stage=stage) == 0
    assert exported.value("tether_policy_version", role="trainer") == 0


def test_a_step_moves_counters_gauges_and_histograms() -> None:
    exported = Exported()
    exported.metrics.observe_step(
        step_record(2, score_mean=0.125, kl_per_token=-0.01, mean_abs_dlogp=1e-6, critic_grad_norm=2.5)
    )
    assert exported.value("tether_step_total", outcome="committed") == 1
    assert exported.value("tether_generated_tokens_total") == 32
    assert exported.value("tether_reward_mean") == 0.125
    assert exported.value("tether_kl_nats", estimator="k1") == -0.01
    assert exported.value("tether_grad_norm", adapter="critic") == 2.5
    assert exported.value("tether_reward_count") == 4
    assert exported.value("tether_reward_bucket", le="1.0") == 2, "-3.0 and 0.5 of -3.0, 0.5, 1.5, 2.0"
    assert exported.value("tether_response_length_tokens_sum") == 32
    assert exported.value("tether_logprob_mismatch_nats_bucket", le="1e-05") == 1
    assert exported.value("tether_step_duration_seconds_sum", phase="train") == 2.5
    assert exported.value("tether_adapter_push_total", result="ok") == 1
    assert exported.value("tether_policy_version", role="trainer") == 3


def test_i1_the_sample_counters_add_up() -> None:
    exported = Exported()
    dropped = {"dropped_wrong_version": 2.0, "dropped_not_scored": 1.0, "samples_dropped": 3.0}
    exported.metrics.observe_step(step_record(0, samples_generated=7.0, **dropped))
    count = {s: exported.value("tether_samples_total", state=s) for s in ("generated", "trained", "dropped_stale")}
    assert count == {"generated": 7, "trained": 4, "dropped_stale": 2}
    assert count["generated"] == sum((4, 2, exported.value("tether_samples_total", state="dropped_invalid")))


def test_a_rollback_counts_with_the_alarm_that_it_was_made_for() -> None:
    exported = Exported()
    first = Rollback(1, 5, 4, "step 5, alarm kl_max: kl_per_sequence is 9, above 5", 0.0)
    for _ in range(2):  # told twice, counted once
        exported.metrics.observe_rollbacks("demo", [first], before=0)
    exported.metrics.observe_rollbacks("demo", [first, Rollback(2, 5, 4, "RollbackRun", 0.0)], before=0)
    assert exported.value("tether_rollbacks_total") == 2
    assert exported.value("tether_alarms_total", alarm="kl_max") == 1
    assert exported.value("tether_alarms_total", alarm="entropy_min") == 0


def test_rollbacks_from_before_this_process_do_not_count() -> None:
    exported = Exported()
    old, new = Rollback(1, 5, 4, "RollbackRun", 0.0), Rollback(2, 5, 4, "RollbackRun", 0.0)
    exported.metrics.observe_rollbacks("demo", [old, new], before=1)
    assert exported.value("tether_rollbacks_total") == 1


def test_an_alarm_that_stops_a_run_counts() -> None:
    exported = Exported()
    error = "[ALARM] step 5, alarm entropy_min: entropy is 0.1, below 0.5; the step is not committed"
    exported.metrics.observe_state(run_record(RunState.FAILED, error))
    assert exported.value("tether_alarms_total", alarm="entropy_min") == 1
    assert exported.value("tether_rollbacks_total") == 0


def test_the_version_shown_is_the_one_that_the_step_made() -> None:
    exported = Exported()
    exported.metrics.observe_step(replace(step_record(2), new_version=7))
    assert exported.value("tether_policy_version", role="trainer") == 7


def test_an_undefined_figure_keeps_the_last_value() -> None:
    exported = Exported()
    exported.metrics.observe_step(step_record(0, explained_variance=0.75))
    exported.metrics.observe_step(step_record(1))
    assert exported.value("tether_value_explained_variance") == 0.75


def test_device_memory_is_exported_only_where_a_step_reports_it() -> None:
    exported = Exported()
    exported.metrics.observe_step(step_record(0))
    assert "tether_torch_memory_bytes" not in exported.families()
    exported.metrics.observe_step(step_record(1, torch_allocated_bytes=5.0, torch_reserved_bytes=9.0))
    assert exported.value("tether_torch_memory_bytes", gpu="0", kind="allocated") == 5
    assert exported.value("tether_torch_memory_bytes", gpu="0", kind="reserved") == 9


@pytest.mark.parametrize(
    ("error", "pushes", "non_finite"),
    [
        ("[UNAVAILABLE] step 1, rollout: reward at x: UNAVAILABLE", 0, 0),
        ("[PROOF_FAILED] step 1, push: adapter at x: refused", 1, 0),
        ("[NON_FINITE] step 1, train: value_loss is nan", 0, 1),
    ],
)
def test_the_end_of_a_run_is_counted_by_its_cause(error: str, pushes: int, non_finite: int) -> None:
    exported = Exported()
    exported.metrics.observe_state(run_record(RunState.RUNNING))
    assert exported.value("tether_run_active") == 1
    exported.metrics.observe_state(run_record(RunState.FAILED, error))
    assert exported.value("tether_run_active") == 0
    assert exported.value("tether_step_total", outcome="failed") == 1
    assert exported.value("tether_adapter_push_total", result="failed") == pushes
    assert exported.value("tether_nan_total") == non_finite


def test_no_series_carries_a_run_id(tmp_path: Path) -> None:
    exported = Exported()
    exported.metrics.observe_state(run_record(RunState.RUNNING))
    exported.metrics.observe_step(step_record(0))
    assert b"demo" not in generate_latest(exported.registry)


def test_i1_what_nobody_accounts_for_is_exported() -> None:
    exported = Exported()
    exported.metrics.observe_step(
        step_record(0, samples_asked=9.0, samples_not_generated=2.0, samples_dropped=3.0, samples_abandoned=5.0)
    )
    assert exported.value("tether_samples_total", state="not_generated") == 2
    assert exported.value("tether_samples_total", state="abandoned") == 5
    assert exported.value("tether_samples_unaccounted") == 0
    exported.metrics.show_unaccounted(1)
    assert exported.value("tether_samples_unaccounted") == 1


def test_a_step_of_a_version_that_did_not_count_what_it_asked_for_is_shown() -> None:
    exported, old = Exported(), step_record(0)
    new = ("samples_asked", "samples_not_generated", "samples_abandoned")
    exported.metrics.observe_step(replace(old, metrics={k: v for k, v in old.metrics.items() if k not in new}))
    assert exported.value("tether_samples_total", state="generated") == 4
    assert exported.value("tether_samples_total", state="abandoned") == 0


def test_breakers_are_closed_until_a_run_says_otherwise() -> None:
    exported = Exported()
    for service in SERVICE_NAMES:
        assert exported.value("tether_breaker_open", service=service) == 0
    exported.metrics.show_breakers({"reward": True, "generator": False})
    open_now = {service for service in SERVICE_NAMES if exported.value("tether_breaker_open", service=service)}
    assert open_now == {"reward"}
    exported.metrics.show_breakers({})
    assert exported.value("tether_breaker_open", service="reward") == 0
