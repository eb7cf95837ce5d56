"""Whether answers are right: against the oracle of the fake engine, else against earlier answers to the same item."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tether.status import BY_NUMBER
from tether.v1 import reward_pb2
from tether_services.bench.plan import BenchItem
from tether_services.reward.engines.fake import FAKE_REWARD_SHA256, fake_score, fake_text_score

TOLERANCE: Final = 1e-5
"""Between answers to the same item: what sharing a batch may change a score by, absolute or relative."""
ORACLE_TOLERANCE: Final = 1e-9
"""Between an answer and the oracle: rounding of the weighted sum."""
REMEMBERED_ITEMS: Final = 65_536
"""Scores remembered for comparison; the oldest make room."""
MAX_EXAMPLES: Final = 5
FAKE_MODEL_SHA256: Final = hashlib.sha256(f"score 1.0 1.0 0.0 {FAKE_REWARD_SHA256}\n".encode()).hexdigest()
"""Content hash of a model that is the fake engine alone, without a salt: `hash_components` of the reward service."""

Oracle = Callable[[BenchItem], float]
"""The raw value that an item must get from each component."""


def find_oracle(model: reward_pb2.RewardModel) -> Oracle | None:
    """Return the oracle of a model; None where its scores cannot be foretold, as those of a fake with a salt."""
    return fake_oracle if model.engine == "fake" and model.model_sha256 == FAKE_MODEL_SHA256 else None


def fake_oracle(item: BenchItem) -> float:
    """Return what the fake engine answers."""
    if item.response_token_ids:
        return fake_score(item.prompt_token_ids, item.response_token_ids)
    return fake_text_score(item.prompt, item.response)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a response that arrived was worth."""

    refusal: tuple[str, str] | None = None
    """Code and reason of the first item that carries an error; None if all were scored."""
    wrong: str = ""
    """What is wrong with it; empty if nothing is. Names places and numbers, never contents."""


class AnswerChecker:
    """Checks responses and counts what it compared them with."""

    def __init__(self, models: Iterable[reward_pb2.RewardModel]) -> None:
        """Remember the models that the service lists; of others, only repeats are compared."""
        self._oracles = {(model.name, model.version): find_oracle(model) for model in models}
        self._remembered: OrderedDict[int, float] = OrderedDict()
        self.num_by_oracle = 0
        """Scores compared with the oracle."""
        self.num_by_repeat = 0
        """Scores compared with an earlier one of the same item and model."""
        self.num_unforeseen = 0
        """Scores that could be compared with nothing, only seen to be finite."""
        self.examples: list[str] = []
        """What was wrong with the first wrong answers."""

    def check(self, items: Sequence[BenchItem], response: reward_pb2.ScoreResponse) -> Verdict:
        """Return what a response is worth."""
        if len(response.scores) != len(items):
            return self._wrong(f"{len(response.scores)} scores for {len(items)} items")
        oracle = self._oracles.get((response.model, response.version))
        for index, (item, score) in enumerate(zip(items, response.scores, strict=True)):
            if score.HasField("error"):
                return Verdict(refusal=(code_name(score.error.code), score.error.reason or "UNKNOWN"))
            fault = self._fault(item, score, oracle, response.model_sha256)
            if fault:
                return self._wrong(f"item {index} of {len(items)}: {fault}")
        return Verdict()

    def _wrong(self, text: str) -> Verdict:
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(text)
        return Verdict(wrong=text)

    def _fault(self, item: BenchItem, score: reward_pb2.ItemScore, oracle: Oracle | None, sha256: str) -> str:
        """Return what is wrong with one score; empty if nothing is."""
        parts = score.components
        if not all(map(math.isfinite, (score.score, score.raw_score, *(part.value for part in parts)))):
            return "not finite"
        total = sum(part.value * part.weight for part in parts)
        if parts and not is_close(score.score, total, ORACLE_TOLERANCE):
            return f"score {score.score!r} is not the weighted sum of its components, {total!r}"
        if oracle is None or score.truncated:
            return self._compare(item, score.score, sha256)
        self.num_by_oracle += 1
        expected = oracle(item) * sum(part.weight for part in parts)
        if not is_close(score.raw_score, expected, ORACLE_TOLERANCE):
            return f"raw score {score.raw_score!r}, the oracle says {expected!r}"
        return ""

    def _compare(self, item: BenchItem, score: float, sha256: str) -> str:
        """Return how a score differs from that of the same item before; empty if it does not."""
        key = hash((sha256, item))  # 64 bits: the items themselves would fill the memory
        earlier = self._remembered.get(key)
        if earlier is None:
            self.num_unforeseen += 1
            self._remembered[key] = score
            if len(self._remembered) > REMEMBERED_ITEMS:
                self._remembered.popitem(last=False)
            return ""
        self.num_by_repeat += 1
        return "" if is_close(score, earlier, TOLERANCE) else f"score {score!r}, the same item had {earlier!r} before"


def is_close(value: float, other: float, tolerance: float) -> bool:
    """Return whether two scores are the same within a tolerance, relative above 1 and absolute below."""
    return math.isclose(value, other, rel_tol=tolerance, abs_tol=tolerance)


def code_name(number: int) -> str:
    """Return the name of a gRPC status code number."""
    code = BY_NUMBER.get(number)
    return code.name if code else "UNKNOWN"
