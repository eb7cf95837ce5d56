"""Runs a service: server, health, metrics, engine start, liveness, drain.

The four services differ only in what they pass in.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from tether.errors import InvalidArgumentError
from tether_services.runtime.access import Access, describe_security
from tether_services.runtime.auth import check_bind_address, is_loopback
from tether_services.runtime.health import Health
from tether_services.runtime.interceptor import Chain
from tether_services.runtime.limits import Guard, deadline_guard, readiness_guard
from tether_services.runtime.logging import log_event, setup_logging
from tether_services.runtime.metrics import (
    MetricsServer,
    RequestMetrics,
    new_registry,
    start_metrics_server,
    watch_tasks,
)
from tether_services.runtime.pipeline import Pipeline
from tether_services.runtime.settings import CONFIG_ERROR_EXIT_CODE, ServerSettings
from tether_services.runtime.thread_clock import ThreadClock
from tether_services.runtime.threads import prepare_process
from tether_services.runtime.tls import ServerCertificates

if TYPE_CHECKING:
    from tether_services.runtime.http.port import HttpPort

log = logging.getLogger(__name__)

DATA_MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest message sent: 64 sequences of 8192 tokens with log-probabilities are 3.5 MiB packed."""
HEALTH_MESSAGE_BYTES = 4096
"""Largest message accepted on a port that serves health alone."""
METADATA_BYTES = 16 * 1024
"""Largest metadata accepted unless the settings say otherwise."""


@dataclass(frozen=True, slots=True)
class Port:
    """One listening address and the gRPC services on it."""

    setting: str
    """Name of the setting that holds the address, for errors."""
    address: str
    """host:port."""
    service_names: Sequence[str]
    """Full names of its services, for health and reflection."""
    register: Callable[[grpc.aio.Server], None]
    """Adds the servicers."""
    max_message_bytes: int = DATA_MESSAGE_BYTES
    """Largest message accepted on this port."""


@runtime_checkable
class Fallible(Protocol):
    """What has a part that can die for good while the process lives."""

    def on_failure(self, report: Callable[[BaseException], None]) -> None:
        """Have the report called, on the event loop, as soon as such a part has died."""
        ...


@runtime_checkable
class Parted(Protocol):
    """What has parts that can be missing while the rest serves, each with a health name of its own."""

    def parts(self) -> Sequence[str]:
        """Return the health names of the parts."""
        ...

    def on_part(self, report: Callable[[str, bool], None]) -> None:
        """Have the report called, on the event loop, whenever a part may have come or gone."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """What has streams that go on for as long as their readers like."""

    def end_streams(self) -> None:
        """End them, those that begin later too: a server does not stop before its last call has ended.

        One whose reader does not read is out of reach; it is cut off after `drain_seconds`.
        """
        ...


class Service(Protocol):
    """What a service folder hands to the chassis."""

    name: str
    """"generator", "reward", "reference" or "orchestrator"."""

    def ports(self) -> Sequence[Port]:
        """Return the addresses to serve; the first one is the data port."""
        ...

    def methods(self) -> Sequence[str]:
        """Return the names of all methods, for metrics."""
        ...

    async def start(self) -> None:
        """Load the engine and have it answer one warm-up request; the service is ready when this returns."""
        ...

    async def check(self) -> None:
        """Have the engine answer a tiny request, on the way that calls take; raise if it does not."""
        ...

    async def close(self) -> None:
        """Stop the engine and flush."""
        ...


def server_options(max_message_bytes: int, max_metadata_bytes: int = METADATA_BYTES) -> list[tuple[str, int]]:
    """Return the channel arguments of a server. gRPC ignores unknown keys, so the tests assert the effect of these."""
    return [
        ("grpc.so_reuseport", 0),  # on by default: a second server would share the port without an error
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", DATA_MESSAGE_BYTES),
        ("grpc.max_metadata_size", max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", max_metadata_bytes),  # between the two gRPC would refuse at random
        ("grpc.keepalive_time_ms", 20_000),  # a caller that is gone without a word gives its calls up, and their leases
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_age_ms", 30 * 60 * 1000),
        ("grpc.max_connection_age_grace_ms", 10 * 60 * 1000),
    ]


def shows_reflection(settings: ServerSettings, address: str) -> bool:
    """Return whether a port lists its methods: as the setting says, else on loopback only."""
    return is_loopback(address, field="address") if settings.reflection is None else settings.reflection


def run_service(settings: ServerSettings, build: Callable[[CollectorRegistry], Service]) -> int:
    """Run a service until SIGTERM or SIGINT and return the exit status.

    Args:
        settings: The service's settings.
        build: Makes the service; its engine is loaded later, by `start`.
    """
    prepare_process(settings.threads)
    registry = new_registry()
    service = build(registry)
    setup_logging(service.name, settings.log_level)
    _use_uvloop()
    try:
        return asyncio.run(ServiceRunner(settings, service, registry).run())
    except InvalidArgumentError as error:
        for violation in error.violations or ():
            log_event(log, "invalid setting", level=logging.ERROR, field=violation.field, error=violation.description)
        return CONFIG_ERROR_EXIT_CODE


def _use_uvloop() -> None:
    if sys.platform != "win32":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


class ServiceRunner:
    """One run of a service on the current event loop. Tests use it directly to serve in their own process."""

    def __init__(self, settings: ServerSettings, service: Service, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._service = service
        self._registry = registry
        self._servers: list[grpc.aio.Server] = []
        self._http: HttpPort | None = None
        self._metrics: MetricsServer | None = None
        self._stop = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._file_watch: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shared_threads = ThreadClock()
        self.health = Health(
            [name for port in service.ports() for name in port.service_names],
            parts=service.parts() if isinstance(service, Parted) else (),
        )
        self.bound_ports: list[int] = []
        """Port numbers in use, in the order of `Service.ports`."""
        self.http_port: int | None = None
        """Port number in use for HTTP; None where it is not served."""
        self.health_port: int | None = None
        """Port number of `health_address`; None without one."""
        self.metrics_port: int | None = None
        """Port number of the metrics, once there is one."""

    async def run(self) -> int:
        """Serve until a signal arrives; return 0, or 1 if the engine could not start."""
        loop = asyncio.get_running_loop()
        self.share_threads()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        starting = asyncio.create_task(self.start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
        try:
            await starting
            await stopping
        except asyncio.CancelledError:
            log_event(log, "stopped while starting")
        finally:
            stopping.cancel()
            await self.close()
        return 0

    def share_threads(self) -> ThreadPoolExecutor:
        """Give the event loop its threads for short jobs, such that liveness sees them work, and return them."""
        threads = ThreadPoolExecutor(thread_name_prefix="shared", initializer=self._shared_threads.attach)
        asyncio.get_running_loop().set_default_executor(threads)
        return threads

    async def start(self) -> None:
        """Listen, then load the engine, then report SERVING.

        Raises:
            InvalidArgumentError: An address is refused or taken, or a file of credentials cannot be used.
        """
        self._settings.check_addresses()
        self._warn_of_open_ports()
        access = Access(self._settings, self._service.name, self._registry)
        metrics = RequestMetrics(self._service.name, self._service.methods(), self._registry)
        guards: list[Guard] = [
            readiness_guard(lambda: self.health.not_ready_reason),
            deadline_guard(self._settings.max_deadline_seconds),
        ]
        pipeline = Pipeline(guards, metrics, access.identify, access.hold)
        for port in self._service.ports():
            self.bound_ports.append(await self._listen(port, Chain(pipeline), access))
        if self._settings.http_address:
            self.http_port = await self._listen_http(self._service.ports()[0], pipeline, access)
        if self._settings.health_address:
            self.health_port = await self._listen_for_health()
        self._metrics = start_metrics_server(self._settings.metrics_address, self._registry)
        self.metrics_port = self._metrics.port
        watch_tasks(self._service.name, self._registry)
        others = {"http_port": self.http_port, "health_port": self.health_port, "metrics_port": self.metrics_port}
        ports = {"ports": self.bound_ports, **others}
        log_event(log, "listening", level=logging.INFO, **ports, **describe_security(self._settings))
        self._file_watch = asyncio.create_task(access.watch_files())
        if isinstance(self._service, Fallible):
            self._service.on_failure(self._engine_failed)
        if isinstance(self._service, Parted):
            self._service.on_part(lambda name, there: self._begin(self.health.set_part(name, there)))
        await self._service.start()
        await self.health.ready()
        self._watch = asyncio.create_task(
            self.health.watch_engine(self._check, every_seconds=self._settings.liveness_seconds)
        )
        log_event(log, "serving", services=list(self.health.names[1:]))

    async def _check(self) -> None:
        """Have the threads for short jobs take one or be at work, then the engine answer; raise if it does not."""
        await self._shared_threads.wait_for_life(asyncio.to_thread(int))
        await self._service.check()

    def _engine_failed(self, error: BaseException) -> None:
        """Take the service out of use at once; `watch_engine` would notice only later."""
        log_event(log, "engine failed", level=logging.CRITICAL, error=f"{type(error).__name__}: {error}")
        self._begin(self.health.engine_failed(for_good=True))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, port: Port, chain: Chain, access: Access) -> int:
        settings = self._settings  # checked once more: what is opened here, whichever setting it comes from
        lacking = settings.lacking_protections
        check_bind_address(port.address, insecure=settings.insecure, field=port.setting, lacking=lacking)
        server = grpc.aio.server(interceptors=[chain], options=self._options(port))
        port.register(server)
        await self.health.attach(server)
        if shows_reflection(settings, port.address):
            reflection.enable_server_reflection([*port.service_names, reflection.SERVICE_NAME], server)
        return await self._begin_serving(server, port.address, field=port.setting, certificates=access.certificates)

    async def _listen_for_health(self) -> int:
        """Serve health and nothing else; it tells nothing that needs protection, and probes have no credentials."""
        server = grpc.aio.server(options=server_options(HEALTH_MESSAGE_BYTES))
        await self.health.attach(server)
        return await self._begin_serving(server, self._settings.health_address, field="health_address")

    async def _begin_serving(
        self, server: grpc.aio.Server, address: str, *, field: str, certificates: ServerCertificates | None = None
    ) -> int:
        try:
            if certificates is None:
                number = server.add_insecure_port(address)
            else:
                number = server.add_secure_port(address, certificates.grpc_credentials())
        except RuntimeError as error:
            raise InvalidArgumentError(
                f"Cannot listen on {address}: it is taken or not an address of this machine.", field=field
            ) from error
        await server.start()
        self._servers.append(server)
        return number

    async def _listen_http(self, port: Port, pipeline: Pipeline, access: Access) -> int:
        """Serve the methods of a port, the data port, over HTTP as well, and return the number."""
        from tether_services.runtime.http.port import HttpOptions, HttpPort  # only where it is asked for
        from tether_services.runtime.http.serving import ConnectionLimits

        settings = self._settings
        options = HttpOptions(
            pipeline,
            default_seconds=min(settings.http_timeout_seconds, settings.max_deadline_seconds),
            is_serving=lambda: self.health.not_ready_reason is None and not self.health.is_draining,
            tls=None if access.certificates is None else access.certificates.server_context(),
            limits=ConnectionLimits(
                max_age_seconds=settings.max_connection_age_seconds, max_head_bytes=settings.max_metadata_bytes
            ),
        )
        self._http = HttpPort(port, options)
        return await self._http.start(settings.http_address)

    def _options(self, port: Port) -> list[tuple[str, int]]:
        age = {"grpc.max_connection_age_ms": int(1000 * self._settings.max_connection_age_seconds)}
        given = server_options(port.max_message_bytes, self._settings.max_metadata_bytes)
        return list((dict(given) | age).items())

    def _warn_of_open_ports(self) -> None:
        lacking = self._settings.lacking_protections
        for name, address in self._settings.listening_addresses().items():
            if lacking and not is_loopback(address, field=name):
                about = {"setting": name, "address": address, "lacking": lacking}
                message = "INSECURE: other machines can reach this address"
                log_event(log, message, level=logging.WARNING, **about)

    async def close(self) -> None:
        """Drain: not ready, then no new calls, those in flight finish within `drain_seconds`, then the engine stops."""
        is_sent_calls = self.health.not_ready_reason is None
        notice_seconds = self._settings.drain_notice_seconds if is_sent_calls else 0.0
        log_event(log, "draining", notice_seconds=notice_seconds)
        await self.health.draining()
        await asyncio.sleep(notice_seconds)
        for watch in (self._watch, self._file_watch):
            if watch is not None:
                watch.cancel()
        self.health.end_watches()
        if isinstance(self._service, Streaming):
            self._service.end_streams()
        grace = self._settings.drain_seconds
        await asyncio.gather(*(server.stop(grace) for server in (*self._servers, self._http) if server is not None))
        await self._service.close()
        if self._metrics is not None:
            self._metrics.stop()
        log_event(log, "stopped")
