"""Prometheus families of the reward service beside those that all services share."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from tether_services.runtime.metrics import QueueMetrics

DIFFERENCE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class CacheMetrics:
    """What the score cache holds, and how often it helps: hits over lookups is the hit rate."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.lookups = Counter(
            "tether_reward_cache_lookups_total", "Items looked up in the cache.", ["result"], registry=registry
        )
        for result in ("hit", "miss"):
            self.lookups.labels(result)
        self.evictions = Counter(
            "tether_reward_cache_evictions_total", "Scores that made room for others.", registry=registry
        )
        self.items = Gauge("tether_reward_cache_items", "Scores in the cache.", registry=registry)
        self.bytes = Gauge("tether_reward_cache_bytes", "Memory of the cache, estimated.", registry=registry)


class ShadowMetrics:
    """How a candidate differs from its base. Only `which` has names as labels, those of the present shadow."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.items = Counter(
            "tether_reward_shadow_items_total",
            "Items of the shadow: scored by both, dropped because the service was busy, or failed by the candidate.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("scored", "dropped", "failed"):
            self.items.labels(outcome)
        self.difference = Histogram(
            "tether_reward_shadow_difference",
            "Absolute difference of the scores of candidate and base.",
            buckets=DIFFERENCE_BUCKETS,
            registry=registry,
        )
        self.mean_difference = Gauge(
            "tether_reward_shadow_mean_difference",
            "Mean of candidate minus base since the shadow was set.",
            registry=registry,
        )
        self.pairs = Counter(
            "tether_reward_shadow_pairs_total",
            "Pairs of responses to one prompt, by whether candidate and base put them in the same order.",
            ["order"],
            registry=registry,
        )
        for order in ("same", "different"):
            self.pairs.labels(order)
        self.which = Gauge(
            "tether_reward_shadow_fraction", "Share of the calls to base.", ["base", "candidate"], registry=registry
        )


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
        self.scored, self.refused, self.failed = map(self.items.labels, ("scored", "refused", "failed"))
        self.tokens = Counter("tether_reward_tokens_total", "Tokens of scored items.", registry=registry)
        self.model = Info("tether_reward_model", "A reward model in use.", ["model", "version"], registry=registry)
        self.loads = Counter(
            "tether_reward_model_loads_total", "Models loaded while serving, by result.", ["result"], registry=registry
        )
        for result in ("ok", "failed"):
            self.loads.labels(result)
        self.cache = CacheMetrics(registry)
        self.shadow = ShadowMetrics(registry)
