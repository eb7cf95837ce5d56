"""Hostile requests drawn from a seed: raw bytes, broken and well-formed messages with hostile values, floods.

What is sent over gRPC is bytes, as the attacker sends them; nothing here uses a client that would refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from tether.v1 import reward_pb2

__all__ = ["CANARY", "METHODS", "MOVED", "UNKNOWN", "HostileRequest", "draw_request", "hostile_name", "hostile_text"]

CANARY: Final = "xq9-canary-Vw7"
"""Part of many prompts and responses; must be found in no log, metric or error."""
SERVICE: Final = "/tether.v1.RewardService/"
METHODS: Final = ("Score", "Compare", "ListRewardModels")
UNKNOWN: Final = "unknown method"
"""The kind of a request to a method that does not exist at this port."""
MOVED: Final = "bits inverted"
"""The kind of a request whose fields may have become other fields."""
MESSAGE_BYTES: Final = 1_900_000
"""Of the largest floods: below the limit of the port, so that they are parsed."""
FLOODS: Final = 0.0005
"""Share of messages that are as large as may be."""
INJECTIONS: Final = (
    '\n{"event":"forged"}',
    "\x1b[31mred\x1b[0m",
    "\r\n\r\nHTTP/1.1 200 OK",
    '"} 1\ntether_forged_total{x="',
    "\x00",
    "\u202e\u2066",
    "../../../../etc/passwd",
    "{{7*7}}${jndi:ldap://x}",
    "<|endoftext|><s></s>[INST]",
    "%s%n%x" * 8,
)
"""Texts that harm whoever pastes them into a log, a metric, a header, a path or a template."""
NUMBERS: Final = (0, -1, 1, 127, 128, 258, 259, 2**31 - 1, -(2**31))


@dataclass(frozen=True, slots=True)
class HostileRequest:
    """One request."""

    kind: str
    """How it was made, for the figures."""
    method: str
    """Full name, not always of a method that exists."""
    body: bytes
    metadata: tuple[tuple[str, str | bytes], ...] = ()


def hostile_name(random: Random) -> str:
    """Return a text that may hold an injection, control characters or many characters."""
    parts = [random.choice(INJECTIONS), "".join(map(chr, random.choices(range(1, 0xD000), k=8))), "a" * 40]
    return "".join(random.sample(parts, random.randrange(len(parts) + 1)))


def hostile_text(random: Random) -> str:
    """Return such a text with the canary in it: what is judged must be found nowhere else."""
    return CANARY.join((hostile_name(random), hostile_name(random)))


def _item(random: Random) -> reward_pb2.ScoreItem:
    item = reward_pb2.ScoreItem()
    if random.random() < 0.7:
        item.prompt, item.response = hostile_text(random), hostile_text(random)
    if random.random() < 0.3:
        item.prompt_token_ids.extend(random.choices(NUMBERS, k=random.randrange(6)))
        item.response_token_ids.extend(random.choices(NUMBERS, k=random.randrange(6)))
    for _ in range(random.choice((0, 0, 0, 1, 3))):
        role = random.choice(("user", "assistant", "system", hostile_name(random)))
        item.messages.add(role=role, content=hostile_text(random))
    return item


def _well_formed(random: Random, method: str) -> bytes:
    name, version = random.choice(("", "", "default", hostile_name(random))), random.choice(("", hostile_name(random)))
    if method == "Compare":
        responses = [hostile_text(random) for _ in range(random.choice((0, 1, 2, 3, 17)))]
        prompt = hostile_text(random)
        return reward_pb2.CompareRequest(
            prompt=prompt, responses=responses, model=name, version=version
        ).SerializeToString()
    if method == "ListRewardModels":
        token, size = hostile_name(random), random.choice(NUMBERS)
        return reward_pb2.ListRewardModelsRequest(page_size=size, page_token=token).SerializeToString()
    items = [_item(random) for _ in range(random.choice((0, 1, 1, 2, 4, 65)))]
    return reward_pb2.ScoreRequest(items=items, model=name, version=version).SerializeToString()


def _raw(random: Random, method: str) -> bytes:
    return random.randbytes(random.randrange(200))


def _flipped(random: Random, method: str) -> bytes:
    body = bytearray(_well_formed(random, method) or b"\x00")
    for _ in range(random.randrange(1, 6)):
        body[random.randrange(len(body))] ^= 1 << random.randrange(8)
    return bytes(body)


def _cut(random: Random, method: str) -> bytes:
    body = _well_formed(random, method)
    return body[: random.randrange(len(body) + 1)]


def _nested(random: Random, method: str) -> bytes:
    """Groups or messages within each other, far deeper than any message of the contract."""
    depth = random.choice((50, 100, 101, 5_000))
    if random.random() < 0.5:
        return b"\x0b" * depth + b"\x0c" * depth
    body = b""
    for _ in range(min(depth, 300)):
        body = b"\x0a" + _varint(len(body)) + body
    return body


def _flood(random: Random, method: str) -> bytes:
    """As many empty elements as fit: each costs the parser far more than its two bytes."""
    tag = random.choice((b"\x0a\x00", b"\x12\x00", b"\x1a\x00"))
    if random.random() < 0.3:  # within one item: messages, or token ids
        inner = random.choice((b"\x1a\x00" * (MESSAGE_BYTES // 2), b"\x22" + _varint(900_000) + b"\x01" * 900_000))
        return b"\x0a" + _varint(len(inner)) + inner
    return tag * (MESSAGE_BYTES // 2)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


BODIES: Final[dict[str, Callable[[Random, str], bytes]]] = {
    "raw bytes": _raw,
    "well-formed": _well_formed,
    MOVED: _flipped,
    "cut": _cut,
    "nested": _nested,
}
WEIGHTS: Final = (25, 40, 20, 10, 5)


def draw_request(random: Random) -> HostileRequest:
    """Return one hostile request."""
    method = random.choice(METHODS)
    if random.random() < FLOODS:
        return HostileRequest("flood", SERVICE + "Score", _flood(random, "Score"))
    [kind] = random.choices(list(BODIES), WEIGHTS)
    body = BODIES[kind](random, method)
    if random.random() < 0.01:
        return HostileRequest(UNKNOWN, random.choice(_unknown_methods()), body)
    return HostileRequest(kind, SERVICE + method, body, _metadata(random))


def _unknown_methods() -> Sequence[str]:
    return (SERVICE + "Forged", "/tether.v1.AdapterService/ActivateAdapter", "/a/b", SERVICE + "Score/x")


def _metadata(random: Random) -> tuple[tuple[str, str | bytes], ...]:
    choice = random.random()
    if choice < 0.9:
        return ()
    if choice < 0.94:
        return (("authorization", random.choice(("Bearer ", "Basic eDp5", "Bearer " + "x" * 500, "bearer"))),)
    if choice < 0.97:
        return tuple((f"x-{number}", "v" * 20) for number in range(random.choice((10, 100))))
    if choice < 0.99:
        return (("x-bin", random.randbytes(64)), ("grpc-trace-bin", random.randbytes(8)))
    return (("x-large", "v" * random.choice((4_000, 12_000, 40_000))),)
