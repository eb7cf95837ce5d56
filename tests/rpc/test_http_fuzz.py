"""Anything at all over HTTP: never a crash, never INTERNAL, always JSON."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rpc.http_calls import LOCAL_HTTP, take
from tests.rpc.serving import serving
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
PATHS = ["/tether.v1.RewardService/Score", "/tether.v1.RewardService/Compare", "/tether.v1.RewardService/Nothing"]
NAMES = ["items", "prompt", "response", "messages", "role", "content", "model", "version", "responses", "pageSize"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from([2**31, -(2**63), 1e308, "NaN", "Infinity", "\ud800", "\x00", "1e999999999"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner),
    max_leaves=20,
)
MESSAGES = st.fixed_dictionaries({"items": st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))})
LIKE_JSON = (VALUES | MESSAGES).map(lambda value: json.dumps(value, ensure_ascii=True).encode())
BODIES = LIKE_JSON | st.binary(max_size=200) | st.tuples(LIKE_JSON, st.binary(max_size=3)).map(b"".join)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "content-type",
            "content-encoding",
            "connect-timeout-ms",
            "connect-protocol-version",
            "expect",
            "authorization",
        ]
    ),
    st.sampled_from(
        ["application/json", "application/proto", "application/json; charset=latin-1", "gzip", "identity", "1", "50"]
    )
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20),
    max_size=3,
)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Serve in a thread of its own."""
    found: list[int] = []
    ready, done = threading.Event(), threading.Event()
    given_settings = RewardSettings.model_validate({**LOCAL_HTTP, "engine": "fake"})

    async def main() -> None:
        async with serving(given_settings, lambda registry: RewardService(given_settings, registry)) as served:
            assert served.runner.http_port is not None
            found.append(served.runner.http_port)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(20)
    yield found[0]
    done.set()
    thread.join(20)


def check(port: int, path: str, body: bytes, headers: dict[str, str]) -> int:
    """Send, and return the status of an answer that is in order."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        connection.request("POST", path, body, encoded)
        reply = take(connection.getresponse())
    finally:
        connection.close()
    assert reply.status < 500 or (reply.status == 504 and "connect-timeout-ms" in headers), reply
    assert reply.headers["content-type"] in ("application/json", "application/proto")
    if reply.status != 200:
        assert set(reply.body) == {"code", "message", "details"} and reply.reason.isupper()
        assert reply.body["code"] not in ("internal", "unknown")
    return reply.status


@given(BODIES)
@FUZZ
def test_any_body_is_answered(port: int, body: bytes) -> None:
    check(port, PATHS[0], body, {"content-type": "application/json"})


@given(st.sampled_from(PATHS), BODIES, HEADERS)
@FUZZ
def test_any_headers_are_answered(port: int, path: str, body: bytes, headers: dict[str, str]) -> None:
    check(port, path, body, {"content-type": "application/json", **headers})


@given(MESSAGES)
@FUZZ
def test_items_of_any_values_are_answered(port: int, message: Any) -> None:
    check(port, PATHS[0], json.dumps(message).encode(), {"content-type": "application/json"})


@given(st.binary(max_size=300))
@FUZZ
def test_any_binary_message_is_answered(port: int, body: bytes) -> None:
    check(port, PATHS[1], body, {"content-type": "application/proto"})
