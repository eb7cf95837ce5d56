"""Prometheus families of the generator."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from tether_services.generator.engine import EngineCompletion, EngineDescription
from tether_services.runtime.metrics import QueueMetrics

PUSH_STAGES = ("hash", "header", "tensors", "store", "load", "prove")
PUSH_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PUSH_RESULTS = ("ok", "refused", "failed")
RESTORE_RESULTS = ("ok", "refused")


class GeneratorMetrics:
    """What the generator counts besides calls."""

    def __init__(self, registry: CollectorRegistry, *, queue_limit: int) -> None:
        self.queue = QueueMetrics("generator", registry, queue_limit=queue_limit)
        self.tokens = Counter("tether_generator_tokens_total", "Tokens sampled.", registry=registry)
        self.prompt_tokens = Counter("tether_generator_prompt_tokens_total", "Prompt tokens read.", registry=registry)
        self.completions = Counter(
            "tether_generator_completions_total", "Completions by finish reason.", ["finish_reason"], registry=registry
        )
        self.in_flight = Gauge(
            "tether_generator_completions_in_flight", "Completions admitted and not finished.", registry=registry
        )
        self.info = Info("tether_generator_engine", "Engine and base model.", registry=registry)
        policy_version = Gauge("tether_policy_version", "Policy version in use.", ["role"], registry=registry)
        self.policy_version = policy_version.labels("generator")
        self.pushes = Counter("tether_adapter_push_total", "Commits by result.", ["result"], registry=registry)
        self.push_seconds = Histogram(
            "tether_adapter_push_duration_seconds",
            "Duration of the stages of a commit.",
            ["stage"],
            buckets=PUSH_BUCKETS,
            registry=registry,
        )
        self.adapter_bytes = Gauge("tether_adapter_bytes", "Size of the last adapter.", registry=registry)
        self.restores = Counter(
            "tether_adapter_restore_total", "Stored adapters at a start, by result.", ["result"], registry=registry
        )
        self.rollbacks = Counter("tether_adapter_rollback_total", "Rollbacks.", registry=registry)
        for reason in ("stop", "length"):
            self.completions.labels(reason)
        for result in PUSH_RESULTS:
            self.pushes.labels(result)
        for result in RESTORE_RESULTS:
            self.restores.labels(result)
        for stage in PUSH_STAGES:
            self.push_seconds.labels(stage)

    def describe(self, description: EngineDescription) -> None:
        """Publish what is served."""
        self.info.info(
            {
                "engine": description.engine,
                "base_model_sha256": description.base_model_sha256,
                "dtype": description.dtype,
            }
        )

    def observe(self, *, prompt_tokens: int, completions: list[EngineCompletion]) -> None:
        """Count one answered prompt."""
        self.prompt_tokens.inc(prompt_tokens)
        for completion in completions:
            self.tokens.inc(len(completion.token_ids))
            self.completions.labels(completion.finish_reason).inc()
