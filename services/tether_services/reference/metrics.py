"""Prometheus families of the reference service beside those that all services share."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Info

from tether_services.runtime.metrics import QueueMetrics


class ReferenceMetrics:
    """Queue, batches, tokens and the identity of the model."""

    def __init__(self, registry: CollectorRegistry, *, queue_limit: int) -> None:
        self.queue = QueueMetrics("reference", registry, queue_limit=queue_limit, counts_padding=True)
        self.tokens = Counter(
            "tether_reference_tokens_total", "Tokens evaluated, by part of the item.", ["part"], registry=registry
        )
        for part in ("prompt", "response"):
            self.tokens.labels(part)
        self.model = Info("tether_reference_model", "The reference model.", registry=registry)

    def count_tokens(self, *, prompt: int, response: int) -> None:
        """Count the tokens of evaluated items; their rate over time is tokens per second."""
        self.tokens.labels("prompt").inc(prompt)
        self.tokens.labels("response").inc(response)
