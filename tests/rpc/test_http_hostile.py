"""The HTTP port under callers that send what no library would: nothing crashes, nothing waits, nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from tests.rpc.http_calls import post, talk
from tests.rpc.serving import run
from tether.v1 import reference_pb2, reference_pb2_grpc
from tether_services.runtime.http.answers import Refused
from tether_services.runtime.http.bodies import BodyLimits, Budget, Gone, read_body, unpack_gzip
from tether_services.runtime.http.port import HttpOptions, HttpPort
from tether_services.runtime.http.serving import ConnectionLimits
from tether_services.runtime.metrics import RequestMetrics
from tether_services.runtime.pipeline import Pipeline
from tether_services.runtime.server import Port

METHOD = "/tether.v1.ReferenceService/GetReference"
SENT = "/tether.v1.ReferenceService/ComputeLogprobs"
MAX_BYTES = 256 * 1024
SWEEP_SLACK = 2.0
HEAD = f"POST {METHOD} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
CANARY = "canary-51e0"


class Large(reference_pb2_grpc.ReferenceServiceServicer):
    """Answers with as many log-probabilities as the prompt has tokens, a thousand times over."""

    async def GetReference(self, request: Any, context: Any) -> reference_pb2.GetReferenceResponse:
        return reference_pb2.GetReferenceResponse(engine="large")

    async def ComputeLogprobs(self, request: Any, context: Any) -> reference_pb2.ComputeLogprobsResponse:
        assert context.time_remaining() > 0
        values = [-0.5] * (1000 * sum(len(item.prompt_token_ids) for item in request.items))
        return reference_pb2.ComputeLogprobsResponse(items=[reference_pb2.ItemLogprobs(ref_logprobs=values)])


@asynccontextmanager
async def large(limits: ConnectionLimits | None = None) -> AsyncIterator[tuple[HttpPort, int]]:
    """Serve until the block ends."""

    def register(server: grpc.aio.Server) -> None:
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(Large(), server)

    pipeline = Pipeline([], RequestMetrics("large", ["GetReference", "ComputeLogprobs"], CollectorRegistry()))
    options = HttpOptions(pipeline, 20.0, lambda: True, limits=limits or ConnectionLimits())
    served = HttpPort(Port("address", "", ["tether.v1.ReferenceService"], register, MAX_BYTES), options)
    number = await served.start("127.0.0.1:0")
    try:
        yield served, number
    finally:
        await served.stop(2.0)


def with_large(scenario: Callable[[int], Awaitable[None]], limits: ConnectionLimits | None = None) -> None:
    async def main() -> None:
        async with large(limits) as (_served, number):
            await scenario(number)
            assert (await post(number, METHOD, {})).body["engine"] == "large"  # and it serves on

    run(main())


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\x01\x02\x03\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # the beginning of TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"POST\r\n\r\n", 400),
        (HEAD.encode() + b"content-length: -5\r\n\r\n", 400),
        (HEAD.encode() + b"content-length: 2\r\ncontent-length: 7\r\n\r\n{}", 400),
        (HEAD.encode() + b"content-length: 2\r\ntransfer-encoding: gzip\r\n\r\n{}", 400),
        (HEAD.encode() + b"content-length: 12\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
        (HEAD.encode() + b"bad header\r\n\r\n", 400),
        (HEAD.encode() + b"a\x00b: c\r\n\r\n", 400),
        (HEAD.encode() + b"a: " + b"b" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431),
        (HEAD.encode() + b"".join(b"a%d: b\r\n" % i for i in range(80)) + b"\r\n", 431),
        (HEAD.encode() + b"content-length: 999999999999\r\n\r\n", 413),
        (HEAD.encode() + b"content-length: 99999999999999999999999999\r\n\r\n", 400),
    ],
)
def test_bytes_that_are_no_request_are_answered_in_json_and_the_connection_is_closed(data: bytes, status: int) -> None:
    async def scenario(number: int) -> None:
        answer = await talk(number, data)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status)
        assert b"connection: close" in head.lower() and b"content-type: application/json" in head
        assert body.startswith(b'{"code":"') and b"Traceback" not in body

    with_large(scenario)


def test_a_chunked_body_ends_the_reading_as_soon_as_it_is_too_large() -> None:
    async def scenario(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", number)
        writer.write(HEAD.encode() + b"transfer-encoding: chunked\r\n\r\n")
        chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 100 * MAX_BYTES and not reader.at_eof():
                writer.write(chunk)
                sent += 0x4000
                await writer.drain()
                if b"HTTP/1.1 413" in bytes(reader._buffer):  # type: ignore[attr-defined]
                    break
        assert b"HTTP/1.1 413" in await asyncio.wait_for(reader.read(100), 5)
        assert sent < 100 * MAX_BYTES
        writer.close()

    with_large(scenario)


def test_a_bad_chunk_is_refused() -> None:
    async def scenario(number: int) -> None:
        for chunk in (b"zz\r\n{}\r\n0\r\n\r\n", b"2\r\n{}garbage", b"ffffffffffffffffffffffff\r\n"):
            answer = await talk(number, HEAD.encode() + b"transfer-encoding: chunked\r\n\r\n" + chunk)
            assert answer.startswith(b"HTTP/1.1 400") or answer.startswith(b"HTTP/1.1 413")

    with_large(scenario)


def test_a_request_that_stops_halfway_is_dropped_when_its_sender_leaves() -> None:
    async def scenario(number: int) -> None:
        for data in (b"POST", HEAD.encode(), HEAD.encode() + b"content-length: 10\r\n\r\n{"):
            _reader, writer = await asyncio.open_connection("127.0.0.1", number)
            writer.write(data)
            await writer.drain()
            writer.close()

    with_large(scenario)


def test_two_requests_in_one_piece_are_answered_in_order() -> None:
    async def scenario(number: int) -> None:
        one = HEAD.encode() + b"content-length: 2\r\n\r\n{}"
        last = HEAD.encode() + b'connection: close\r\ncontent-length: 9\r\n\r\n{"bad":1}'
        answer = await talk(number, one + last)
        assert answer.count(b"HTTP/1.1 ") == 2
        assert answer.index(b"HTTP/1.1 200") < answer.index(b"HTTP/1.1 400")

    with_large(scenario)


SLOW = ConnectionLimits(head_seconds=0.3, keep_alive_seconds=0.3, write_seconds=0.5)


@pytest.mark.parametrize("data", [b"", b"POST ", HEAD.encode()])
def test_whoever_is_slow_with_the_head_of_a_request_is_cut_off(data: bytes) -> None:
    async def scenario(number: int) -> None:
        assert await talk(number, data, seconds=SLOW.head_seconds + SWEEP_SLACK) == b""

    with_large(scenario, SLOW)


def test_a_head_that_comes_byte_by_byte_has_no_more_time_than_one_that_stops() -> None:
    async def scenario(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", number)

        async def drip() -> None:
            for byte in HEAD.encode():
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), SLOW.head_seconds + SWEEP_SLACK) == b""
        dripping.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await dripping
        writer.close()

    with_large(scenario, SLOW)


def test_an_idle_connection_is_closed_after_its_time() -> None:
    async def scenario(number: int) -> None:
        answer = await talk(number, HEAD.encode() + b"content-length: 2\r\n\r\n{}", seconds=5)
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1

    with_large(scenario, SLOW)


def test_whoever_does_not_take_the_answer_is_cut_off() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        body = b'{"items":[{"prompt_token_ids":[' + b"1," * 2999 + b"1]}]}"  # 3 million numbers come back
        head = HEAD.replace(METHOD, SENT) + f"content-length: {len(body)}\r\n\r\n"
        async with large(SLOW) as (served, number):
            with socket.socket() as caller:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                caller.setblocking(False)
                await loop.sock_connect(caller, ("127.0.0.1", number))
                await loop.sock_sendall(caller, head.encode() + body)
                while not served.open_connections:
                    await asyncio.sleep(0.02)
                while served.open_connections:
                    await asyncio.sleep(0.02)
                received = 0
                with contextlib.suppress(ConnectionError):
                    while piece := await asyncio.wait_for(loop.sock_recv(caller, 1 << 20), 5):
                        received += len(piece)
                assert 0 < received < 10_000_000  # of fifteen: what the kernel held

    run(main())


def test_connections_beyond_the_limit_are_told_to_come_back() -> None:
    async def scenario(number: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", number) for _ in range(3)]
        answer = await talk(number, b"")
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer and b"TOO_MANY_CONNECTIONS" in answer
        for _reader, writer in held:
            writer.close()
        while b"TOO_MANY" in await talk(number, b"GET / HTTP/1.1\r\nconnection: close\r\nhost: a\r\n\r\n"):
            await asyncio.sleep(0.02)

    with_large(scenario, ConnectionLimits(max_connections=3))


def test_a_bomb_is_unpacked_no_further_than_the_limit() -> None:
    bomb = gzip.compress(bytes(200_000_000), 9)

    async def scenario(number: int) -> None:
        assert len(bomb) < MAX_BYTES
        reply = await post(number, METHOD, bomb, content_encoding="gzip")
        assert (reply.status, reply.reason) == (413, "MESSAGE_TOO_LARGE")
        for bad in (b"no gzip", gzip.compress(b"{}")[:-3], gzip.compress(b"{}") + b"more", b""):
            reply = await post(number, METHOD, bad, content_encoding="gzip")
            assert (reply.status, reply.reason) == (400, "MALFORMED_BODY")

    with_large(scenario)
    tracemalloc.start()
    with pytest.raises(Refused):
        unpack_gzip(bomb, MAX_BYTES)
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_BYTES
    tracemalloc.stop()


def test_bodies_in_flight_share_a_budget_and_give_it_back() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(60), "more_body": False}

    async def scenario() -> None:
        budget, limits = Budget(100), BodyLimits(80, 1, 1)
        with budget.share() as first:
            await read_body(receive, limits, first)
            with budget.share() as second, pytest.raises(Refused) as caught:
                await read_body(receive, limits, second)
            assert caught.value.status == 429 and caught.value.error.reason == "BODIES_FULL"
            assert caught.value.error.retry_after_seconds
        assert budget.held == 0

    run(scenario())


def test_a_body_that_comes_too_slowly_or_not_at_all_is_given_up() -> None:
    pieces = asyncio.Event()

    async def drip() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def hang() -> dict[str, Any]:
        await pieces.wait()
        raise AssertionError

    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def scenario() -> None:
        for receive, limits in ((drip, BodyLimits(1000, 0.1, 5)), (hang, BodyLimits(1000, 5, 0.1))):
            with Budget(1000).share() as share, pytest.raises(Refused) as caught:
                await asyncio.wait_for(read_body(receive, limits, share), 3)
            assert (caught.value.status, caught.value.error.reason) == (408, "BODY_TOO_SLOW")
        with Budget(1000).share() as share, pytest.raises(Gone):
            await read_body(leave, BodyLimits(1000, 1, 1), share)

    run(scenario())


def test_large_messages_are_converted_beside_the_event_loop() -> None:
    async def scenario(number: int) -> None:
        message = {"items": [{"prompt_token_ids": [1] * 500} for _ in range(4)]}  # 2 million values come back
        reply = await post(number, SENT, message)
        (item,) = reply.body["items"]
        assert item["ref_logprobs"] == [-0.5] * 2_000_000

    with_large(scenario)


def test_nothing_that_a_caller_wrote_is_in_the_log_or_in_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario(number: int) -> None:
        for raw in (f'{{"{CANARY} x":1}}', f'{{"{CANARY}', f"{CANARY}", f'["{CANARY}"]'):
            reply = await post(number, METHOD, raw.encode())
            assert reply.status == 400 and CANARY not in reply.content.decode()
        for head in (f"POST /{CANARY} HTTP/1.1\r\nhost: {CANARY}\r\n", f"{CANARY}\r\n", HEAD + f"{CANARY}\x1b[31m\r\n"):
            answer = await talk(number, head.encode() + b"connection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 4") and CANARY.encode() not in answer
        for name in ("content-type", "content-encoding", "connect-timeout-ms", "connect-protocol-version"):
            reply = await post(number, METHOD, b"{}", **{name: CANARY})
            assert reply.status >= 400 and CANARY not in reply.content.decode()

    with_large(scenario)
    assert CANARY not in caplog.text and "Traceback" not in caplog.text
