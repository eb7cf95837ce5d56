from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.reliability.proxy import Fault, Flip, Proxy
from tests.rpc.serving import LOCAL, Served, run, serving
from tether.errors import DeadlineExceededError, UnavailableError
from tether.reward import RewardClient, ScoreItem
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService


@asynccontextmanager
async def echo(received: list[bytes] | None = None) -> AsyncIterator[str]:
    """A server that answers each byte with itself."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if received is not None:
                    received.append(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


class Caller:
    """A plain TCP client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def echo(self, data: bytes, *, seconds: float = 5.0) -> bytes:
        self.writer.write(data)
        return await asyncio.wait_for(self.reader.readexactly(len(data)), seconds)


@asynccontextmanager
async def caller(target: str) -> AsyncIterator[Caller]:
    host, _, port = target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()


def through_proxy(act: Callable[[Proxy, Caller], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with echo() as target, Proxy(target) as proxy, caller(proxy.target) as client:
            assert await client.echo(b"before") == b"before"
            await act(proxy, client)

    run(scenario(), timeout_seconds=20)


def test_without_a_fault_every_byte_passes_and_the_close_does_too() -> None:
    async def act(proxy: Proxy, client: Caller) -> None:
        data = bytes(range(256)) * 4096
        assert await client.echo(data) == data
        client.writer.write_eof()
        assert await client.reader.read() == b""
        assert [event.kind for event in proxy.log] == ["set", "opened"]
        await asyncio.sleep(0.1)
        assert proxy.log[-1].kind == "closed"

    through_proxy(act)


def test_latency_delays_each_way_by_its_own_and_does_not_limit_the_rate() -> None:
    async def act(proxy: Proxy, client: Caller) -> None:
        proxy.set(up=Fault(latency_seconds=0.2), down=Fault(latency_seconds=0.1))
        started = time.monotonic()
        await client.echo(bytes(2_000_000))  # 30 pieces; one after the other they would take 6 s
        assert 0.3 <= time.monotonic() - started < 3.0
        proxy.clear()
        started = time.monotonic()
        await client.echo(b"x")
        assert time.monotonic() - started < 0.2

    through_proxy(act)


def test_bandwidth_bounds_the_rate() -> None:
    async def act(proxy: Proxy, client: Caller) -> None:
        proxy.set(up=Fault(bytes_per_second=100_000))
        started = time.monotonic()
        await client.echo(bytes(50_000))
        assert 0.4 <= time.monotonic() - started < 3.0

    through_proxy(act)


def test_sliced_bytes_arrive_in_pieces_and_whole() -> None:
    async def scenario() -> None:
        received: list[bytes] = []
        async with echo(received) as target, Proxy(target) as proxy, caller(proxy.target) as client:
            proxy.set(up=Fault(slice_bytes=100))
            data = bytes(range(250)) * 8
            assert await client.echo(data) == data
            assert b"".join(received) == data
            assert len(received) >= 10

    run(scenario(), timeout_seconds=20)


def test_a_reset_comes_after_exactly_so_many_bytes_and_once() -> None:
    async def scenario() -> None:
        received: list[bytes] = []
        async with echo(received) as target, Proxy(target) as proxy:
            async with caller(proxy.target) as client:
                proxy.set(up=Fault(reset_at=70_001))
                client.writer.write(bytes(200_000))
                with pytest.raises(ConnectionResetError):
                    while await client.reader.read(65536):
                        pass
            assert sum(map(len, received)) == 70_001
            assert proxy.count("cut") == proxy.count("reset") == 1
            async with caller(proxy.target) as client:
                data = bytes(200_000)
                assert await client.echo(data) == data

    run(scenario(), timeout_seconds=20)


def test_a_cut_in_good_order_ends_the_stream_after_so_many_bytes() -> None:
    async def act(proxy: Proxy, client: Caller) -> None:
        proxy.set(down=Fault(close_at=10))
        client.writer.write(b"0123456789abcdef")
        assert await asyncio.wait_for(client.reader.read(), 5) == b"0123456789"

    through_proxy(act)


@pytest.mark.parametrize(("lane", "bit"), [("up", 0), ("up", 8 * 1000 + 7), ("down", 8 * 99_999)])
def test_exactly_one_bit_is_flipped_once_in_the_lane_named(lane: str, bit: int) -> None:
    async def act(proxy: Proxy, client: Caller) -> None:
        flip = Fault(flip=Flip(bit))
        proxy.set(up=flip) if lane == "up" else proxy.set(down=flip)
        data = bytes(100_000)
        got = await client.echo(data)
        assert [i for i in range(len(data)) if got[i]] == [bit // 8]
        assert got[bit // 8] == 1 << bit % 8
        assert await client.echo(data) == data
        assert [event.detail for event in proxy.log if event.kind == "flipped"] == [lane]

    through_proxy(act)


def test_a_flip_can_be_counted_from_a_marker_even_if_it_arrives_in_two_pieces() -> None:
    async def act(proxy: Proxy, client: Caller) -> None:
        proxy.set(up=Fault(flip=Flip(8 * 6, marker=b"MARKER")))
        assert await client.echo(b"...MAR") == b"...MAR"
        assert await client.echo(b"KERabc") == b"KER" + bytes([ord("a") ^ 1]) + b"bc"
        assert await client.echo(b"MARKERabc") == b"MARKERabc"

    through_proxy(act)


def test_a_stalled_lane_delivers_everything_once_it_is_lifted() -> None:
    async def act(proxy: Proxy, client: Caller) -> None:
        proxy.set(down=Fault(stall=True))
        with pytest.raises(TimeoutError):
            await client.echo(b"held", seconds=0.3)
        proxy.clear()
        assert await asyncio.wait_for(client.reader.readexactly(4), 5) == b"held"

    through_proxy(act)


def test_one_way_partition_lets_the_server_hear_a_client_that_hears_nothing() -> None:
    async def scenario() -> None:
        received: list[bytes] = []
        async with echo(received) as target, Proxy(target) as proxy, caller(proxy.target) as client:
            proxy.set(down=Fault(drop=True))
            with pytest.raises(TimeoutError):
                await client.echo(b"lost answer", seconds=0.3)
            assert received == [b"lost answer"]
            proxy.clear()
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(client.reader.read(1), 5)

    run(scenario(), timeout_seconds=20)


def test_a_half_open_connection_hides_the_clients_end_from_the_server() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.read(100):
                    pass
            except ConnectionError:
                pass
            finally:
                ended.set()
                writer.close()

        server = await asyncio.start_server(listen, "127.0.0.1", 0)
        target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, Proxy(target) as proxy:
            async with caller(proxy.target) as client:
                client.writer.write(b"x")
                await asyncio.sleep(0.1)
                proxy.set(up=Fault(drop=True), down=Fault(drop=True))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ended.wait(), 0.3)
            proxy.clear()
            await asyncio.wait_for(ended.wait(), 5)

    run(scenario(), timeout_seconds=20)


def test_refusing_resets_open_and_new_connections_until_it_is_lifted() -> None:
    async def act(proxy: Proxy, client: Caller) -> None:
        proxy.set(refuse=True)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(client.reader.read(1), 5)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            async with caller(proxy.target) as second:
                await second.echo(b"x")
        proxy.clear()
        async with caller(proxy.target) as third:
            assert await third.echo(b"x") == b"x"
        assert proxy.count("refused") == 1

    through_proxy(act)


def test_a_server_that_is_not_there_resets_the_caller() -> None:
    async def scenario() -> None:
        async with echo() as target:
            pass
        async with Proxy(target) as proxy:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                async with caller(proxy.target) as client:
                    await client.echo(b"x")
            assert proxy.count("unreachable") == 1

    run(scenario(), timeout_seconds=20)


@asynccontextmanager
async def scoring(timeout_seconds: float) -> AsyncIterator[tuple[Proxy, RewardClient, Served]]:
    settings = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    async with (
        serving(settings, lambda registry: RewardService(settings, registry)) as served,
        Proxy(served.target) as proxy,
        RewardClient(proxy.target, timeout_seconds=timeout_seconds) as client,
    ):
        yield proxy, client, served


async def score(client: RewardClient) -> float:
    return (await client.score([ScoreItem("a prompt", "a response")])).scores[0].score


def test_a_real_call_passes_and_meets_latency() -> None:
    async def scenario() -> None:
        async with scoring(10.0) as (proxy, client, _):
            first = await score(client)
            proxy.set(down=Fault(latency_seconds=0.3))
            started = time.monotonic()
            assert await score(client) == first
            assert time.monotonic() - started >= 0.3

    run(scenario(), timeout_seconds=30)


def test_a_real_call_whose_answer_is_dropped_ends_at_its_deadline_although_the_server_has_answered() -> None:
    async def scenario() -> None:
        async with scoring(1.0) as (proxy, client, served):
            await score(client)
            proxy.set(down=Fault(drop=True))
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                await score(client)
            assert 0.9 <= time.monotonic() - started <= 2.0
            labels = {"method": "Score", "code": "OK"}
            counted = [
                line for line in served.metrics().splitlines() if all(f'{k}="{v}"' in line for k, v in labels.items())
            ]
            assert any(line.endswith(" 2.0") for line in counted), counted
            proxy.clear()
            assert isinstance(await score(client), float)

    run(scenario(), timeout_seconds=30)


def test_a_real_call_survives_a_reset_by_its_retry_and_a_refusing_server_is_unavailable() -> None:
    async def scenario() -> None:
        async with scoring(5.0) as (proxy, client, _):
            first = await score(client)
            proxy.set(up=Fault(reset_at=10))
            assert await score(client) == first
            assert proxy.count("cut") == 1
            proxy.set(refuse=True)
            with pytest.raises((UnavailableError, DeadlineExceededError)):
                await score(client)
            proxy.clear()
            for _ in range(20):
                try:
                    assert await score(client) == first
                    return
                except UnavailableError:
                    await asyncio.sleep(0.3)
            raise AssertionError("the client never came back")

    run(scenario(), timeout_seconds=60)
