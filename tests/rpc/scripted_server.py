"""A real gRPC server whose servicers the tests write, for what a healthy service never does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager

import grpc
import grpc.aio

from tether_services.runtime.interceptor import Chain
from tether_services.runtime.limits import deadline_guard
from tether_services.runtime.metrics import RequestMetrics, new_registry
from tether_services.runtime.pipeline import Pipeline
from tether_services.runtime.server import DATA_MESSAGE_BYTES, server_options

Add = Callable[[grpc.aio.Server], None]


@asynccontextmanager
async def serving(*adders: Add, methods: Sequence[str] = (), port: int = 0) -> AsyncIterator[str]:
    """Serve on the running loop, with the error mapping and deadline guard of every service; yield host:port."""
    chain = Chain(Pipeline([deadline_guard(600)], RequestMetrics("scripted", methods, new_registry())))
    server = grpc.aio.server(interceptors=[chain], options=server_options(DATA_MESSAGE_BYTES))
    for add in adders:
        add(server)
    number = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{number}"
    finally:
        await server.stop(None)


@contextmanager
def in_thread(serve: Callable[[], AbstractAsyncContextManager[str]]) -> Iterator[str]:
    """Serve from another thread, for clients that block; yield host:port."""
    ready = threading.Event()
    targets: list[str] = []
    stops: list[Callable[[], object]] = []

    async def run() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(stopped.set))
        async with serve() as target:
            targets.append(target)
            ready.set()
            await stopped.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(20)
    try:
        yield targets[0]
    finally:
        stops[0]()
        thread.join(20)


def serving_in_thread(*adders: Add) -> AbstractContextManager[str]:
    """Serve from another thread; yields host:port."""
    return in_thread(lambda: serving(*adders))
