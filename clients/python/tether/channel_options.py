"""What gRPC is told about every channel: how it spreads and repeats calls, notices dead peers and bounds messages."""

from __future__ import annotations

import json
from typing import Any, Final

__all__ = ["EFFECT_FREE_METHODS", "MESSAGE_BYTES", "channel_options", "has_replicas", "service_config"]

MESSAGE_BYTES: Final = 8 * 1024 * 1024
"""Largest message sent or accepted; also the retry buffer, as gRPC silently does not retry what exceeds that buffer."""
EFFECT_FREE_METHODS: Final = {
    "tether.v1.GeneratorService": ("Generate", "GetGenerator"),
    "tether.v1.AdapterService": ("ListAdapters", "GetActiveAdapter"),
    "tether.v1.RewardService": ("Score", "Compare", "ListRewardModels"),
    "tether.v1.RewardModelService": ("ListLoadedRewardModels",),
    "tether.v1.ReferenceService": ("ComputeLogprobs", "GetReference"),
    "tether.v1.OrchestratorService": ("GetRun", "ListRuns", "ListSteps"),
}
"""The methods that gRPC may repeat on its own. Everything else has an effect or, as WatchRun, resumes by itself."""


def has_replicas(target: str) -> bool:
    """Return whether a target stands for several addresses, of which one may take the calls of another."""
    return target.startswith("dns:") or "," in target


def service_config(*, retries: bool = True, replicas: bool = False) -> dict[str, Any]:
    """Return the gRPC service config: spread over all addresses, repeat UNAVAILABLE where a call has no effect.

    Args:
        retries: False for callers that repeat calls themselves: nested repeats multiply.
        replicas: Watch the health of each address and send no calls to those that say they do not serve, so that one
            which drains or whose engine has died costs none. Of a single address the service itself says why.
    """
    balancing: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if replicas:
        balancing["healthCheckConfig"] = {"serviceName": ""}
    if not retries:
        return balancing
    names = [{"service": service, "method": name} for service, names in EFFECT_FREE_METHODS.items() for name in names]
    return {
        **balancing,
        "methodConfig": [
            {
                "name": names,
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }


def channel_options(*, retries: bool = True, replicas: bool = False) -> list[tuple[str, int | str]]:
    """Return the channel arguments of a client. gRPC ignores unknown keys, so the tests assert the effect of these."""
    return [
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # the one that detects a dead peer
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # how long a peer that accepts and then is silent holds an attempt
        ("grpc.max_reconnect_backoff_ms", 1_000),  # so that a service which is back is used again soon
        ("grpc.dns_min_time_between_resolutions_ms", 2_000),  # asked when a connection ends: finds new replicas
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.per_rpc_retry_buffer_size", MESSAGE_BYTES),
        ("grpc.service_config", json.dumps(service_config(retries=retries, replicas=replicas))),
    ]
