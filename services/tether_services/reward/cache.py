"""Scores that are kept to answer the same item again: least recently used out first, bounded by number and memory."""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections import OrderedDict

from tether_services.reward.config import CacheSettings
from tether_services.reward.items import PreparedItem
from tether_services.reward.metrics import CacheMetrics
from tether_services.reward.models import Judgement, RewardModel

__all__ = ["ScoreCache", "digest_item", "identify_model"]

ENTRY_BYTES = 200
"""What an entry takes beside key and judgement: its place in the dictionary, in order."""


def identify_model(model: RewardModel) -> bytes:
    """Return the digest of what makes a model's scores its own: name, version and content."""
    return hashlib.sha256("\n".join((model.name, model.version, model.sha256)).encode()).digest()


def digest_item(identity: bytes, item: PreparedItem) -> bytes:
    """Return the key of an item: the SHA-256 of the model's identity and of all that its engines read.

    Lengths are part of it, and the text itself is not kept. Slow for long text: call it in a thread.
    """
    task = item.task
    hasher = hashlib.sha256(identity)
    parts = (
        task.prompt.encode(),
        task.response.encode(),
        array("i", task.prompt_token_ids).tobytes(),
        array("i", task.response_token_ids).tobytes(),
    )
    for part in parts:
        hasher.update(struct.pack("<q", len(part)))
        hasher.update(part)
    hasher.update(b"cut" if item.truncated else b"whole")
    return hasher.digest()


def estimate_bytes(judgement: Judgement) -> int:
    """Return roughly what an entry takes in memory."""
    parts = [judgement, judgement.score, judgement.raw_score, judgement.components, judgement.token_count]
    for component in judgement.components:
        parts += [component, component.value, component.weight]
    return ENTRY_BYTES + hashlib.sha256().digest_size + sum(map(sys.getsizeof, parts))


class ScoreCache:
    """The last scores by digest. Errors are never put in; with `max_items = 0` nothing is."""

    def __init__(self, settings: CacheSettings, metrics: CacheMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._entries: OrderedDict[bytes, tuple[Judgement, int]] = OrderedDict()
        self.num_bytes = 0
        """Memory in use, estimated."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_on(self) -> bool:
        """Return whether anything is kept."""
        return self._settings.max_items > 0

    def get(self, digest: bytes) -> Judgement | None:
        """Return what was put in under a digest, and take it for just used; None if it is not there."""
        entry = self._entries.get(digest)
        self._metrics.lookups.labels("miss" if entry is None else "hit").inc()
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        return entry[0]

    def put(self, digest: bytes, judgement: Judgement) -> None:
        """Keep a score, in place of the ones that were used least recently; one that is too large alone is not kept."""
        size = estimate_bytes(judgement)
        if not self.is_on or size > self._settings.max_bytes:
            return
        self._remove(digest)
        self._entries[digest] = (judgement, size)
        self.num_bytes += size
        while len(self._entries) > self._settings.max_items or self.num_bytes > self._settings.max_bytes:
            self._remove(next(iter(self._entries)))
            self._metrics.evictions.inc()
        self._metrics.items.set(len(self._entries))
        self._metrics.bytes.set(self.num_bytes)

    def _remove(self, digest: bytes) -> None:
        _, size = self._entries.pop(digest, (None, 0))
        self.num_bytes -= size
