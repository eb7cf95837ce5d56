"""Prometheus families that all services share, on a port of their own.

Families of a service are named `tether_<service>_<noun>_<unit>`. GPU families exist only where a GPU is.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from tether.errors import BY_CODE, InvalidArgumentError, TetherError
from tether_services.runtime.auth import split_address

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def new_registry() -> CollectorRegistry:
    """Return a registry with the process, garbage-collector and (where there is one) GPU families."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    registry.register(GpuCollector())
    return registry


def start_metrics_server(address: str, registry: CollectorRegistry) -> int:
    """Serve /metrics on host:port from a thread and return the port in use.

    Raises:
        InvalidArgumentError: The address is taken or not one of this machine.
    """
    host, port = split_address(address, field="metrics_address")
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InvalidArgumentError(f"Cannot listen on {address}: {error.strerror}.", field="metrics_address") from error
    return int(server.server_port)


def watch_tasks(service: str, registry: CollectorRegistry) -> None:
    """Export how many tasks the running event loop has: a number that only grows is a leak."""
    loop = asyncio.get_running_loop()
    tasks = Gauge(f"tether_{service}_tasks", "Tasks on the event loop.", registry=registry)
    tasks.set_function(lambda: len(asyncio.all_tasks(loop)))


class RequestMetrics:
    """Requests by method and code, their latency, and how many are in flight."""

    def __init__(self, service: str, methods: Iterable[str], registry: CollectorRegistry) -> None:
        self.requests = Counter(
            f"tether_{service}_requests_total",
            "Calls by method and status code.",
            ["method", "code"],
            registry=registry,
        )
        self.seconds = Histogram(
            f"tether_{service}_request_seconds",
            "Duration of calls.",
            ["method"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge(f"tether_{service}_calls_in_flight", "Calls that have no answer yet.", registry=registry)
        for method in methods:
            self.seconds.labels(method)
            for code in ("OK", *(code.name for code in BY_CODE)):
                self.requests.labels(method, code)

    def observe(self, method: str, error: TetherError | None, seconds: float) -> None:
        """Count one finished call."""
        self.requests.labels(method, error.code.name if error else "OK").inc()
        self.seconds.labels(method).observe(seconds)


class QueueMetrics:
    """The queue and the executed batches of an engine."""

    def __init__(self, service: str, registry: CollectorRegistry, *, queue_limit: int) -> None:
        prefix = f"tether_{service}"
        self.depth = Gauge(f"{prefix}_queue_depth", "Items waiting.", registry=registry)
        self.limit = Gauge(f"{prefix}_queue_limit", "Items that may wait.", registry=registry)
        self.limit.set(queue_limit)
        self.wait = Histogram(
            f"{prefix}_queue_wait_seconds", "Time an item waited.", buckets=LATENCY_BUCKETS, registry=registry
        )
        self.batch_items = Histogram(
            f"{prefix}_batch_size", "Items per executed batch.", buckets=SIZE_BUCKETS, registry=registry
        )
        self.batch_tokens = Histogram(
            f"{prefix}_batch_tokens", "Tokens per executed batch.", buckets=TOKEN_BUCKETS, registry=registry
        )
        self.rejected = Counter(
            f"{prefix}_rejected_total", "Items refused or dropped unexecuted.", ["reason"], registry=registry
        )
        for reason in ("queue_full", "deadline", "cancelled"):
            self.rejected.labels(reason)


class GpuCollector(Collector):
    """Device view (NVML) and allocator view (torch) of GPU memory. Yields nothing where there is no GPU."""

    def __init__(self) -> None:
        self._nvml = _load_nvml()

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Return nothing, so that registration does not read the device."""
        return ()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield the current figures."""
        if self._nvml is not None:
            yield self._device_family(self._nvml)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            yield _allocator_family(torch)

    def _device_family(self, nvml: Any) -> GaugeMetricFamily:
        family = GaugeMetricFamily("tether_gpu_memory_bytes", "Device memory by NVML.", labels=["gpu", "kind"])
        for index in range(nvml.nvmlDeviceGetCount()):
            memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index), version=nvml.nvmlMemory_v2)
            for kind in ("used", "reserved", "total"):
                family.add_metric([str(index), kind], getattr(memory, kind))
        return family


def _allocator_family(torch: Any) -> GaugeMetricFamily:
    family = GaugeMetricFamily("tether_torch_memory_bytes", "Memory of torch's allocator.", labels=["gpu", "kind"])
    keys = {
        "allocated": "allocated_bytes.all.current",
        "reserved": "reserved_bytes.all.current",
        "peak_allocated": "allocated_bytes.all.peak",
        "inactive_split": "inactive_split_bytes.all.current",
    }
    for index in range(torch.cuda.device_count()):
        stats = torch.cuda.memory_stats(index)
        for kind, key in keys.items():
            family.add_metric([str(index), kind], stats.get(key, 0))
    return family


def _load_nvml() -> Any | None:
    """Return the initialised NVML module, or None where there is no driver or no library."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
