"""The pure function behind the fake generator and the fake reference, so that both are the same policy."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

FAKE_BASE_SHA256 = hashlib.sha256(b"tether fake base model").hexdigest()
"""Content hash that the fake base model claims."""
FAKE_MAX_MODEL_LEN = 2048


class FakeContext:
    """The tokens so far under a policy version; what follows is a function of their hash."""

    def __init__(self, token_ids: Sequence[int], version: int) -> None:
        self._hash = hashlib.sha256(struct.pack(f"<q{len(token_ids)}i", version, *token_ids))

    def append(self, token: int) -> None:
        """Go on by one token."""
        self._hash.update(struct.pack("<i", token))

    def draw(self, salt: bytes) -> int:
        """Return a number in [0, 2^64) that depends on the context and the salt."""
        state = self._hash.copy()
        state.update(salt)
        return int.from_bytes(state.digest()[:8], "big")

    def logprob(self, token: int) -> float:
        """Return the log-probability of a token here: -(1 + u) with u in [0, 1)."""
        return -1.0 - self.draw(b"logprob" + struct.pack("<i", token)) / 2**64
