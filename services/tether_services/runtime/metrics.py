"""Prometheus families that all services share, on a port of their own.

Families of a service are named `tether_<service>_<noun>_<unit>`. GPU families exist only where a GPU is.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from tether.errors import BY_CODE, InvalidArgumentError, TetherError
from tether_services.runtime.auth import split_address
from tether_services.runtime.callers import ANONYMOUS
from tether_services.runtime.fair_queue import LANES
from tether_services.runtime.refusals import OTHER, CallerLabels

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ITEM_OUTCOMES = ("executed", "rejected", "dropped")
PASS_KINDS = ("real", "padding")


def new_registry() -> CollectorRegistry:
    """Return a registry with the process, garbage-collector and (where there is one) GPU families."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    registry.register(GpuCollector())
    return registry


@dataclass(frozen=True, slots=True)
class MetricsServer:
    """Serves /metrics from a thread."""

    port: int
    """Number in use."""
    _server: WSGIServer

    def stop(self) -> None:
        """Have the thread end and the port given back, within half a second; nobody needs to wait for that."""
        threading.Thread(target=self._end, name="metrics-end", daemon=True).start()

    def _end(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def start_metrics_server(address: str, registry: CollectorRegistry) -> MetricsServer:
    """Serve /metrics on host:port from a thread until it is stopped.

    Raises:
        InvalidArgumentError: The address is taken or not one of this machine.
    """
    host, port = split_address(address, field="metrics_address")
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InvalidArgumentError(f"Cannot listen on {address}: {error.strerror}.", field="metrics_address") from error
    return MetricsServer(int(server.server_port), server)


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
        self._requests_of, self._seconds_of = cache(self.requests.labels), cache(self.seconds.labels)
        for method in methods:
            self._seconds_of(method)
            for code in ("OK", *(code.name for code in BY_CODE)):
                self._requests_of(method, code)

    def observe(self, method: str, error: TetherError | None, seconds: float) -> None:
        """Count one finished call."""
        self._requests_of(method, error.code.name if error else "OK").inc()
        self._seconds_of(method).observe(seconds)


class QueueMetrics:
    """The queue and the executed batches of an engine, and whose items they are."""

    def __init__(
        self,
        service: str,
        registry: CollectorRegistry,
        *,
        queue_limit: int,
        counts_padding: bool = False,
    ) -> None:
        """Create the families.

        Args:
            service: Part of their names.
            registry: Where they are registered.
            queue_limit: Items that may wait in each lane.
            counts_padding: Whether the engine pads rows and counts it.
        """
        prefix = f"tether_{service}"
        self.depth = Gauge(f"{prefix}_queue_depth", "Items waiting.", registry=registry)
        self.lane_depth = Gauge(f"{prefix}_queue_lane_depth", "Items waiting, by lane.", ["lane"], registry=registry)
        self.limit = Gauge(f"{prefix}_queue_limit", "Items that may wait in each lane.", registry=registry)
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
        self.caller_items = Counter(
            f"{prefix}_caller_items_total",
            "Items by caller and outcome: executed, rejected (no room) or dropped (late or cancelled).",
            ["caller", "outcome"],
            registry=registry,
        )
        self.forward_tokens = (
            Counter(
                f"{prefix}_forward_tokens_total",
                "Tokens of forward passes: real ones, and padding up to the longest row of a pass.",
                ["kind"],
                registry=registry,
            )
            if counts_padding
            else None
        )
        self._passes = [self.forward_tokens.labels(kind) for kind in PASS_KINDS] if self.forward_tokens else []
        self._labels = CallerLabels()
        self._series: dict[str, dict[str, Counter]] = {}
        self._create_children()

    def count_items(self, caller: str, outcome: str, count: int = 1) -> None:
        """Count items of a caller; after many callers, further ones share their series."""
        self._series_of(self._labels.of(caller))[outcome].inc(count)

    def count_passes(self, *, real: int, padding: int) -> None:
        """Count the tokens of forward passes, where the engine tells them."""
        for counter, count in zip(self._passes, (real, padding), strict=False):
            counter.inc(count)

    def show_depth(self, sizes: Mapping[str, Callable[[], int]]) -> None:
        """Have the depth read from the queue whenever the metrics are read.

        Args:
            sizes: Gives how many items wait, by lane.
        """
        self.depth.set_function(lambda: sum(size() for size in sizes.values()))
        for lane, size in sizes.items():
            self.lane_depth.labels(lane).set_function(size)

    def _series_of(self, label: str) -> dict[str, Counter]:
        """Return the counters of a caller by outcome; all of them exist from its first item on."""
        found = self._series.get(label)
        if found is None:
            found = {outcome: self.caller_items.labels(label, outcome) for outcome in ITEM_OUTCOMES}
            self._series[label] = found
        return found

    def _create_children(self) -> None:
        """Have every series from the start, at 0: an absent one cannot raise an alert."""
        for lane in LANES:
            self.lane_depth.labels(lane)
        for reason in ("queue_full", "caller_full", "deadline", "cancelled"):
            self.rejected.labels(reason)
        for caller in (ANONYMOUS.name, OTHER):
            self._series_of(caller)


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
