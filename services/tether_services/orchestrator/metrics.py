"""Prometheus families of the training loop, fed from committed steps.

Families of device memory exist only once a step has reported some.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tether_services.orchestrator.alarms import ALARMS
from tether_services.orchestrator.records import FINAL_STATES, Rollback, RunRecord, RunState, StepRecord
from tether_services.orchestrator.remote import SERVICE_NAMES, BreakerStates
from tether_services.orchestrator.step_metrics import PUSH_STAGES

__all__ = ["OrchestratorMetrics"]

PHASES = ("rollout", "score", "ref", "train", "checkpoint", "push")
PHASE_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920, 7680)
PUSH_BUCKETS = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NATS_BUCKETS = tuple(round(10 ** (exponent / 2), 7) for exponent in range(-10, 3))
REWARD_BUCKETS = tuple(range(-10, 11))
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STALENESS_BUCKETS = (0, 1, 2, 3, 5, 8, 16)

GAUGES = {
    "tether_reward_mean": ("score_mean", "Mean score of the last step."),
    "tether_reward_std": ("score_std", "Standard deviation of the scores of the last step."),
    "tether_kl_coef": ("kl_coef", "Weight of the KL."),
    "tether_entropy_nats": ("entropy", "Policy entropy per token."),
    "tether_ppo_clip_ratio": ("clip_fraction", "Share of tokens whose clipped side counts."),
    "tether_value_explained_variance": ("explained_variance", "Of the returns by the values."),
    "tether_advantage_std": ("advantage_std", "Before whitening."),
    "tether_truncated_ratio": ("truncated_ratio", "Share of responses that reached the length limit."),
    "tether_importance_ratio_max": ("ratio_max", "Largest policy ratio of the last update."),
    "tether_adapter_bytes": ("adapter_bytes", "Size of the last adapter."),
    "tether_tokens_per_second": ("tokens_per_second", "Generated tokens per second of the last step."),
    "tether_trainer_memory_bytes": ("process_memory_bytes", "Resident memory of the worker."),
}
"""Family to (figure of the step, meaning)."""
LABELLED_GAUGES = {
    "tether_kl_nats": ("estimator", {"k1": "kl_per_token", "k3": "kl_k3_per_token"}, "KL to the reference per token."),
    "tether_grad_norm": (
        "adapter",
        {"policy": "policy_grad_norm", "critic": "critic_grad_norm"},
        "Before clipping.",
    ),
    "tether_lr": (
        "adapter",
        {"policy": "policy_learning_rate", "critic": "critic_learning_rate"},
        "Learning rate.",
    ),
}
"""Family to (label, label value to figure, meaning)."""


class OrchestratorMetrics:
    """Everything the orchestrator exports beside its calls. All label combinations exist from the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.active = Gauge("tether_run_active", "1 while a run is in progress.", registry=registry)
        self.resumes = Counter("tether_resume_total", "Runs resumed.", registry=registry)
        self._steps = _counter("tether_step_total", "Steps.", "outcome", ("committed", "failed", "skipped"), registry)
        states = ("generated", "not_generated", "scored", "trained", "dropped_stale", "dropped_invalid", "abandoned")
        self._samples = _counter("tether_samples_total", "Samples by state.", "state", states, registry)
        self._unaccounted = Gauge(
            "tether_samples_unaccounted",
            "Samples of committed steps that by their rows in the ledger are neither trained on nor dropped; always 0.",
            registry=registry,
        )
        self._alarms = _counter("tether_alarms_total", "Alarms of runs.", "alarm", ALARMS, registry)
        self._rollbacks = Counter("tether_rollbacks_total", "Rollbacks of runs.", registry=registry)
        self._counted_rollbacks: dict[str, int] = {}
        self._breakers = Gauge(
            "tether_breaker_open", "1 while the run does not call a service.", ["service"], registry=registry
        )
        self.show_breakers({})
        self._lagging = Gauge(
            "tether_lagging_generators",
            "Generators that get no prompt, as they do not answer or have lost the version.",
            registry=registry,
        )
        self._generated = Counter("tether_generated_tokens_total", "Response tokens generated.", registry=registry)
        self._effective = Counter("tether_effective_tokens_total", "Response tokens learned from.", registry=registry)
        self._non_finite = Counter(
            "tether_nan_total", "Updates refused for a value that is not finite.", registry=registry
        )
        self._pushes = _counter("tether_adapter_push_total", "Adapter pushes.", "result", ("ok", "failed"), registry)
        # The generators export theirs: an alert compares them, and this process cannot speak for them.
        self._version = Gauge("tether_policy_version", "Version in use.", ["role"], registry=registry)
        self._version.labels("trainer").set(0)
        self._build_histograms()
        self._gauges = {name: Gauge(name, meaning, registry=registry) for name, (_, meaning) in GAUGES.items()}
        self._labelled = {
            name: Gauge(name, meaning, [label], registry=registry)
            for name, (label, _, meaning) in LABELLED_GAUGES.items()
        }
        for name, (_, figures, _) in LABELLED_GAUGES.items():
            for value in figures:
                self._labelled[name].labels(value)
        self._torch_memory: Gauge | None = None

    def _build_histograms(self) -> None:
        self._phases = self._histogram(
            "tether_step_duration_seconds", "Time in a phase.", PHASE_BUCKETS, "phase", PHASES
        )
        self._waits = self._histogram(
            "tether_phase_wait_seconds", "Time a phase waited for input.", PHASE_BUCKETS, "phase", ("score", "train")
        )
        self._push_stages = self._histogram(
            "tether_adapter_push_duration_seconds", "Time in a stage of a push.", PUSH_BUCKETS, "stage", PUSH_STAGES
        )
        self._rewards = self._histogram("tether_reward", "Score of a sample.", REWARD_BUCKETS)
        self._lengths = self._histogram("tether_response_length_tokens", "Tokens of a response.", TOKEN_BUCKETS)
        self._staleness = self._histogram(
            "tether_rollout_staleness_versions", "Trainer version minus sample version.", STALENESS_BUCKETS
        )
        self._mismatch = self._histogram(
            "tether_logprob_mismatch_nats",
            "Mean |trainer - generator log-probability| of a sample batch.",
            NATS_BUCKETS,
        )

    def _histogram(
        self, name: str, meaning: str, buckets: tuple[float, ...], label: str = "", values: tuple[str, ...] = ()
    ) -> Histogram:
        labels = [label] if label else []
        histogram = Histogram(name, meaning, labels, buckets=buckets, registry=self._registry)
        for value in values:
            histogram.labels(value)
        return histogram

    def observe_step(self, record: StepRecord) -> None:
        """Show a committed step."""
        figures = record.metrics
        self._steps.labels("committed").inc()
        self._count_samples(figures)
        self._observe_durations(figures)
        for name, (figure, _) in GAUGES.items():
            if figure in figures:
                self._gauges[name].set(figures[figure])
        for name, (_, by_value, _) in LABELLED_GAUGES.items():
            for value, figure in by_value.items():
                if figure in figures:
                    self._labelled[name].labels(value).set(figures[figure])
        for score in record.distributions.get("score", ()):
            self._rewards.observe(score)
        for length in record.distributions.get("response_length", ()):
            self._lengths.observe(length)
        self._mismatch.observe(figures["mean_abs_dlogp"])
        self._show_torch_memory(figures)
        if "push_seconds" in figures:
            self._pushes.labels("ok").inc()
        self._version.labels("trainer").set(record.new_version)

    def observe_state(self, run: RunRecord) -> None:
        """Show whether a run is active, and count its failure: to be called once at its start and once at its end."""
        self.active.set(run.state not in FINAL_STATES)
        if run.state is RunState.FAILED:
            self._steps.labels("failed").inc()
            if "NON_FINITE" in run.error:
                self._non_finite.inc()
            if ", push:" in run.error:
                self._pushes.labels("failed").inc()
            self._count_alarm(run.error)

    def observe_rollbacks(self, run_id: str, rollbacks: Sequence[Rollback], *, before: int) -> None:
        """Count the rollbacks of a run that were not counted yet, and the alarms that they were made for.

        Args:
            run_id: The run.
            rollbacks: All that it has had.
            before: How many of them are older than this process.
        """
        counted = self._counted_rollbacks.setdefault(run_id, before)
        for rollback in rollbacks[counted:]:
            self._rollbacks.inc()
            self._count_alarm(rollback.reason)
        self._counted_rollbacks[run_id] = max(counted, len(rollbacks))

    def _count_alarm(self, text: str) -> None:
        for name in ALARMS:
            if f"alarm {name}:" in text:
                self._alarms.labels(name).inc()

    def show_unaccounted(self, count: int) -> None:
        """Show how many samples of the steps that a run has committed are unaccounted for."""
        self._unaccounted.set(count)

    def show_breakers(self, states: BreakerStates) -> None:
        """Show which services the run does not call now, because they do not answer; a missing one is called."""
        for service in SERVICE_NAMES:
            self._breakers.labels(service).set(states.get(service, False))

    def show_lagging(self, targets: Collection[str]) -> None:
        """Show how many of several generators lag, by their addresses."""
        self._lagging.set(len(targets))

    def _count_samples(self, figures: Mapping[str, float]) -> None:
        stale = figures["dropped_wrong_version"]
        self._samples.labels("generated").inc(figures["samples_generated"])
        self._samples.labels("scored").inc(figures["samples_trained"])
        self._samples.labels("trained").inc(figures["samples_trained"])
        self._samples.labels("dropped_stale").inc(stale)
        self._samples.labels("dropped_invalid").inc(figures["samples_dropped"] - stale)
        missing, abandoned = figures.get("samples_not_generated", 0.0), figures.get("samples_abandoned", 0.0)
        self._samples.labels("not_generated").inc(missing)
        self._samples.labels("abandoned").inc(abandoned)
        self._generated.inc(figures["generated_tokens"])
        self._effective.inc(figures["effective_tokens"])
        for _ in range(int(figures["samples_trained"])):
            self._staleness.observe(0)  # a sample of another version is never trained on

    def _observe_durations(self, figures: Mapping[str, float]) -> None:
        for phase in PHASES:
            if f"{phase}_seconds" in figures:  # of a step whose push failed there is none
                self._phases.labels(phase).observe(figures[f"{phase}_seconds"])
        for phase in ("score", "train"):
            self._waits.labels(phase).observe(figures[f"{phase}_wait_seconds"])
        for stage in PUSH_STAGES:
            if f"push_{stage}_seconds" in figures:
                self._push_stages.labels(stage).observe(figures[f"push_{stage}_seconds"])

    def _show_torch_memory(self, figures: Mapping[str, float]) -> None:
        kinds = {
            k: figures[f"torch_{k}_bytes"]
            for k in ("allocated", "reserved", "peak_allocated")
            if f"torch_{k}_bytes" in figures
        }
        if kinds and self._torch_memory is None:
            self._torch_memory = Gauge(
                "tether_torch_memory_bytes", "Memory of torch's allocator.", ["gpu", "kind"], registry=self._registry
            )
        for kind, size in kinds.items():
            assert self._torch_memory is not None
            self._torch_memory.labels("0", kind).set(size)


def _counter(name: str, meaning: str, label: str, values: tuple[str, ...], registry: CollectorRegistry) -> Counter:
    counter = Counter(name, meaning, [label], registry=registry)
    for value in values:
        counter.labels(value)
    return counter
