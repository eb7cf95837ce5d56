"""Over HTTP the same callers may do the same as over gRPC: tokens, certificates, scopes, quotas."""

from __future__ import annotations

import asyncio
import http.client
import json
import secrets
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from tests.rpc.certificates import Pair, authority, service_files
from tests.rpc.http_calls import JSON, LOCAL_HTTP, Reply, get, post, take, talk
from tests.rpc.serving import Served, run, serving
from tests.rpc.token_inputs import add_token
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.scopes import METHOD_SCOPES, SCOPES

METHODS: Final = [method for method in METHOD_SCOPES if method.startswith("/tether.v1.RewardService/")]
SCORE: Final = "/tether.v1.RewardService/Score"
ITEMS: Final = {"items": [{"prompt": "Once", "response": " upon"}]}
REFUSED: Final = {
    "none": "TOKEN_MISSING",
    "wrong": "TOKEN_UNKNOWN",
    "expired": "TOKEN_EXPIRED",
    "revoked": "TOKEN_REVOKED",
}
SPIFFE: Final = "spiffe://prod/team"


def with_reward(scenario: Callable[[Served, int], Awaitable[None]], **values: Any) -> None:
    settings = RewardSettings.model_validate({**LOCAL_HTTP, "engine": "fake", **values})

    async def main() -> None:
        async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
            assert served.runner.http_port is not None
            await scenario(served, served.runner.http_port)

    run(main())


def expected(method: str, scope: str, state: str) -> tuple[int, str]:
    """Return status and reason of a call with an empty message; a caller that may call is told that it is empty."""
    if state in REFUSED:
        return 401, REFUSED[state]
    if METHOD_SCOPES[method] != scope:
        return 403, "SCOPE_MISSING"
    return (200, "") if method.endswith("ListRewardModels") else (400, "INVALID_FIELD")


def test_every_method_lets_in_its_own_scope_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    tokens: dict[tuple[str, str], str | None] = {}
    for scope in SCOPES:
        right = add_token(path, name=scope, scopes=[scope])
        tokens |= {(scope, "none"): None, (scope, "right"): right}
        tokens[scope, "wrong"] = right[:-43] + secrets.token_urlsafe(32)
        tokens[scope, "expired"] = add_token(path, name=scope, scopes=[scope], expired=True)
        tokens[scope, "revoked"] = add_token(path, name=scope, scopes=[scope], revoked=True)

    async def scenario(served: Served, port: int) -> None:
        for method in METHODS:
            for (scope, state), token in tokens.items():
                given = {} if token is None else {"authorization": f"Bearer {token}"}
                reply = await post(port, method, {}, **given)
                seen = reply.status, "" if reply.status == 200 else reply.reason
                assert seen == expected(method, scope, state), (method, scope, state)
                assert ("www-authenticate" in reply.headers) == (reply.status == 401)

    with_reward(scenario, tokens_file=str(path))


def test_a_refused_caller_costs_no_parsing_and_health_needs_no_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path)

    async def scenario(served: Served, port: int) -> None:
        reply = await post(port, SCORE, b"this is not JSON")
        assert (reply.status, reply.reason) == (401, "TOKEN_MISSING")
        assert (await get(port, "/healthz")).status == 200

    with_reward(scenario, tokens_file=str(path))


def test_a_quota_counts_calls_of_both_ways_together(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path, requests_per_second=0.01)

    async def scenario(served: Served, port: int) -> None:
        replies = [await post(port, SCORE, ITEMS, authorization=f"Bearer {token}") for _ in range(4)]
        refused = next(reply for reply in replies if reply.status == 429)
        assert replies[0].status == 200
        delay = refused.detail("RetryInfo").retry_delay.ToMilliseconds() / 1000
        assert delay <= int(refused.headers["retry-after"]) < delay + 1.001

    with_reward(scenario, tokens_file=str(path))


def caller(folder: Path, pair: Pair | None) -> ssl.SSLContext:
    """Return what a caller connects with."""
    context = ssl.create_default_context(cadata=authority().root.decode())
    if pair is not None:
        file = folder / "caller.pem"
        file.write_bytes(pair.chain + pair.key)
        context.load_cert_chain(file)
    return context


def call_secure(port: int, context: ssl.SSLContext) -> Reply:
    connection = http.client.HTTPSConnection("localhost", port, timeout=10, context=context)
    try:
        connection.request("POST", SCORE, json.dumps(ITEMS), JSON)
        return take(connection.getresponse())
    finally:
        connection.close()


def test_a_certificate_says_who_calls(tmp_path: Path) -> None:
    files = service_files(tmp_path)
    tls = files.settings(client_root=authority().root)
    known = {"name": "team", "scopes": ["score"], "spiffe": SPIFFE}
    reader = {"name": "reader", "scopes": ["run.read"], "common_name": "reader"}

    async def scenario(served: Served, port: int) -> None:
        async def attempt(pair: Pair | None) -> Reply:
            return await asyncio.to_thread(call_secure, port, caller(tmp_path, pair))

        assert (await attempt(authority().sign("team", uris=[SPIFFE]))).status == 200
        stranger = await attempt(authority().sign("stranger", uris=["spiffe://prod/other"]))
        assert (stranger.status, stranger.reason) == (401, "CERTIFICATE_UNKNOWN")
        narrow = await attempt(authority().sign("reader"))
        assert (narrow.status, narrow.reason) == (403, "SCOPE_MISSING")
        for bad in (None, authority("another").sign("team", uris=[SPIFFE])):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await attempt(bad)
        with pytest.raises((http.client.HTTPException, ConnectionError)):  # no transport security at all
            await post(port, SCORE, ITEMS)

    with_reward(scenario, tls=tls, identities=[known, reader])


def test_a_certificate_that_is_replaced_is_shown_to_new_connections_and_old_ones_go_on(tmp_path: Path) -> None:
    first, second = authority().sign(), authority().sign()
    files = service_files(tmp_path, first)

    def scenario_in_thread(port: int) -> list[str]:
        context = caller(tmp_path, None)
        old = http.client.HTTPSConnection("localhost", port, timeout=10, context=context)
        old.request("POST", SCORE, json.dumps(ITEMS), JSON)
        assert take(old.getresponse()).status == 200
        files.write(second)
        new = http.client.HTTPSConnection("localhost", port, timeout=10, context=context)
        for connection in (old, new):
            connection.request("POST", SCORE, json.dumps(ITEMS), JSON)
            assert take(connection.getresponse()).status == 200
        shown = []
        for connection in (old, new):
            assert isinstance(connection.sock, ssl.SSLSocket)
            shown.append(ssl.DER_cert_to_PEM_cert(connection.sock.getpeercert(binary_form=True) or b""))
            connection.close()
        return shown

    async def scenario(served: Served, port: int) -> None:
        assert await asyncio.to_thread(scenario_in_thread, port) == [first.chain.decode(), second.chain.decode()]

    with_reward(scenario, tls=files.settings())


def test_strangers_are_refused_before_their_body_arrives_and_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path)

    async def scenario(served: Served, port: int) -> None:
        head = f"POST {SCORE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
        answer = await talk(port, head.encode())
        assert answer.startswith(b"HTTP/1.1 401 ") and b"www-authenticate: Bearer" in answer
        assert b"TOKEN_MISSING" in answer
        labels = {"caller": "unknown", "reason": "TOKEN_MISSING"}
        assert served.value("tether_reward_refused_calls_total", **labels) == 1
        assert served.value("tether_reward_requests_total", method="Score", code="UNAUTHENTICATED") == 1
        assert served.value("tether_reward_calls_in_flight") == 0

    with_reward(scenario, tokens_file=str(path))


def test_a_caller_that_holds_bodies_back_leaves_room_for_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    greedy, polite = add_token(path, name="greedy"), add_token(path, name="polite")
    size = 60_000

    async def hold(port: int, stack: AsyncExitStack) -> None:
        """Send nearly all of a body, and nothing more."""
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        stack.callback(writer.close)
        head = f"POST {SCORE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"authorization: Bearer {greedy}\r\ncontent-length: {size}\r\n\r\n"
        writer.write(head.encode() + b" " * (size - 10))
        await writer.drain()

    async def scenario(served: Served, port: int) -> None:
        async with AsyncExitStack() as stack:
            for _ in range(100):
                await hold(port, stack)
            body = b'{"items": [{"prompt": "a", "response": "b"}]}'.ljust(size)
            head = f"POST {SCORE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n"
            answers = [
                await talk(port, f"{head}authorization: Bearer {token}\r\n\r\n".encode() + body)
                for token in (greedy, polite)
            ]
        assert answers[0].startswith(b"HTTP/1.1 429 ") and b"BODIES_FULL" in answers[0], "the control: no room is left"
        assert answers[1].startswith(b"HTTP/1.1 200 ")

    with_reward(scenario, tokens_file=str(path), max_message_bytes=65_536)
