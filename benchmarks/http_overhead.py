"""Compares JSON over HTTP with gRPC: the same calls to one reward service with the fake engine, in turns.

    python benchmarks/http_overhead.py --seconds 2 --rounds 5

Prints the median latency of one caller and the calls per second of several, and the ratio of both ways. The service is
a process of its own; judge the ratios, not the times, which are those of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc
import grpc.aio
from google.protobuf import json_format

from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.local.ports import free_ports

PATH = "/tether.v1.RewardService/"
CALLERS = 8
Request: TypeAlias = reward_pb2.ScoreRequest | reward_pb2.ListRewardModelsRequest


def message(num_items: int) -> Request:
    """Return a request for scores; for none of them one that needs no engine, such that only the transport counts."""
    item = reward_pb2.ScoreItem(prompt="Once upon a time", response=" there was a happy dog.")
    return reward_pb2.ScoreRequest(items=[item] * num_items) if num_items else reward_pb2.ListRewardModelsRequest()


def method(request: Request) -> str:
    return type(request).__name__.removesuffix("Request")


class HttpCaller:
    """One connection that is kept, with as little of a client as can be, so that the service is what is measured."""

    def __init__(self, address: str, request: Request) -> None:
        self._host, self._port = address.rsplit(":", 1)
        body = json_format.MessageToJson(request, indent=None).encode()
        head = f"POST {PATH}{method(request)} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
        self._data = f"{head}connect-timeout-ms: 20000\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))

    async def call(self) -> None:
        """Score once."""
        self._writer.write(self._data)
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await self._reader.readexactly(length))

    async def close(self) -> None:
        """Disconnect."""
        self._writer.close()
        await self._writer.wait_closed()


class GrpcCaller:
    """One channel."""

    def __init__(self, address: str, request: Request) -> None:
        self._address, self._request = address, request

    async def open(self) -> None:
        """Connect."""
        self._channel = grpc.aio.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._method = getattr(reward_pb2_grpc.RewardServiceStub(self._channel), method(self._request))

    async def call(self) -> None:
        """Score once."""
        assert (await self._method(self._request, timeout=20)).ByteSize()

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()


async def latency(call: Callable[[], Awaitable[None]], seconds: float) -> float:
    """Return the median time of a call in milliseconds."""
    times, end = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        await call()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


async def throughput(callers: list[HttpCaller] | list[GrpcCaller], seconds: float) -> float:
    """Return the calls per second of all callers together."""
    end = time.perf_counter() + seconds

    async def work(caller: HttpCaller | GrpcCaller) -> int:
        count = 0
        while time.perf_counter() < end:
            await caller.call()
            count += 1
        return count

    return sum(await asyncio.gather(*map(work, callers))) / seconds


@asynccontextmanager
async def service() -> AsyncIterator[tuple[str, str]]:
    """Serve in a process of its own and yield the addresses of gRPC and HTTP."""
    address, http, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    settings = {"engine": "fake", "address": address, "http_address": http, "metrics_address": metrics}
    settings |= {"batch.max_delay_seconds": "0"}  # no call waits for company
    command = [sys.executable, "-m", "tether_services", "serve", "reward", "--set", "log_level=WARNING"]
    process = subprocess.Popen([*command, *(part for key in settings for part in ("--set", f"{key}={settings[key]}"))])
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
            request = reward_pb2.ListRewardModelsRequest()
            while True:
                try:
                    await reward_pb2_grpc.RewardServiceStub(channel).ListRewardModels(request, timeout=60)
                    break
                except grpc.aio.AioRpcError as error:  # the engine is not ready yet
                    assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                    await asyncio.sleep(0.1)
        yield address, http
    finally:
        process.terminate()
        process.wait(20)


async def main(seconds: float, rounds: int) -> None:
    async with service() as (address, http):
        for num_items in (0, 1, 16, 64):
            request = message(num_items)
            plain = [GrpcCaller(address, request) for _ in range(CALLERS)]
            json_ones = [HttpCaller(http, request) for _ in range(CALLERS)]
            for caller in (*plain, *json_ones):
                await caller.open()
                await caller.call()
            figures: dict[str, list[float]] = {"gRPC": [], "HTTP": [], "gRPC/s": [], "HTTP/s": []}
            for _ in range(rounds):
                figures["gRPC"].append(await latency(plain[0].call, seconds))
                figures["HTTP"].append(await latency(json_ones[0].call, seconds))
                figures["gRPC/s"].append(await throughput(plain, seconds))
                figures["HTTP/s"].append(await throughput(json_ones, seconds))
            for caller in (*plain, *json_ones):
                await caller.close()
            typical = {name: statistics.median(values) for name, values in figures.items()}
            times = [b / a for a, b in zip(figures["gRPC"], figures["HTTP"], strict=True)]
            rates = [b / a for a, b in zip(figures["gRPC/s"], figures["HTTP/s"], strict=True)]
            print(
                f"{num_items:3} items: p50 gRPC {typical['gRPC']:.2f} ms, HTTP {typical['HTTP']:.2f} ms, "
                f"ratio {statistics.median(times):.2f}; {CALLERS} callers: gRPC {typical['gRPC/s']:.0f}/s, "
                f"HTTP {typical['HTTP/s']:.0f}/s, ratio {statistics.median(rates):.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="turns of both ways")
    known = parser.parse_args()
    asyncio.run(main(known.seconds, known.rounds))
