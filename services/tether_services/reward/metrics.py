"""Prometheus families of the reward service beside those that all services share."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Info

from tether_services.runtime.metrics import QueueMetrics


class RewardMetrics:
    """Queue, batches, items, tokens and the identity of the models."""

    def __init__(self, registry: CollectorRegistry, *, queue_limit: int) -> None:
        self.queue = QueueMetrics("reward", registry, queue_limit=queue_limit, counts_padding=True)
        self.items = Counter(
            "tether_reward_items_total",
            "Items by outcome: scored, refused (the caller's mistake) or failed (ours).",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("scored", "refused", "failed"):
            self.items.labels(outcome)
        self.tokens = Counter("tether_reward_tokens_total", "Tokens of scored items.", registry=registry)
        self.model = Info("tether_reward_model", "A reward model in use.", ["model"], registry=registry)
