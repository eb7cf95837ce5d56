"""A deterministic engine with an exact oracle, for tests of programs that use the service."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Sequence

from tether.errors import TetherError
from tether_services.reward.engine import EngineDescription, ScoreTask
from tether_services.runtime.text import ByteCodec, TextCodec

FAKE_REWARD_SHA256 = hashlib.sha256(b"tether fake reward model").hexdigest()
"""Content hash that the fake reward model claims."""
FAKE_MAX_MODEL_LEN = 2048


def fake_sha256(salt: str = "") -> str:
    """Return the content hash that the fake reward model with a salt claims."""
    return hashlib.sha256(f"tether fake reward model {salt}".encode()).hexdigest() if salt else FAKE_REWARD_SHA256


def fake_score(prompt_token_ids: Sequence[int], response_token_ids: Sequence[int], *, salt: str = "") -> float:
    """Return what the fake engine answers for token ids: a number in [-1, 1) from the hash of them and a salt."""
    ids = [*prompt_token_ids, *response_token_ids]
    digest = hashlib.sha256(struct.pack(f"<q{len(ids)}i", len(prompt_token_ids), *ids) + salt.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**47 - 1.0


def fake_text_score(prompt: str, response: str, *, salt: str = "") -> float:
    """Return what the fake engine answers for text, which it reads as bytes; see `ByteCodec`."""
    codec = ByteCodec()
    ids = codec.encode(prompt, add_special_tokens=True), codec.encode(response, add_special_tokens=False)
    return fake_score(*ids, salt=salt)


class FakeRewardEngine:
    """Answers with `fake_score`."""

    def __init__(self, codec: TextCodec | None, *, salt: str = "") -> None:
        used = codec or ByteCodec()
        self._salt = salt
        self._is_closed = False
        self.description = EngineDescription(
            engine="fake",
            sha256=fake_sha256(salt),
            gain=1.0,
            bias=0.0,
            max_model_len=FAKE_MAX_MODEL_LEN,
            vocab_size=used.vocab_size,
            codec=used,
        )

    async def start(self) -> None:
        """Do nothing."""

    async def score(self, tasks: Sequence[ScoreTask]) -> list[float | TetherError]:
        """Return the oracle's answers; raise after `close`, as real engines do."""
        if self._is_closed:
            raise RuntimeError("the engine is closed")
        await asyncio.sleep(0)  # real engines compute in a thread: between batches the event loop has a turn
        return [fake_score(task.prompt_token_ids, task.response_token_ids, salt=self._salt) for task in tasks]

    async def check(self) -> None:
        """Do nothing: a fake is always alive."""

    async def close(self) -> None:
        """Score nothing from now on."""
        self._is_closed = True
