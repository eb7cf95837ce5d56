"""Loads and models for tests of the load generator."""

from __future__ import annotations

from tether.v1 import reward_pb2
from tether_services.bench.checking import FAKE_MODEL_SHA256
from tether_services.bench.plan import BenchItem, CallerPlan, LoadPlan
from tether_services.reward.engines.fake import fake_score

FAKE_MODEL = reward_pb2.RewardModel(
    name="default", version="1", engine="fake", gain=1.0, max_model_len=2048, max_items=64, default_model=True,
    vocab_size=259, model_sha256=FAKE_MODEL_SHA256,
)  # fmt: skip
RULES_MODEL = reward_pb2.RewardModel(name="rules", version="1", engine="rules", max_items=64)
PLAN = LoadPlan("127.0.0.1:1", callers=(CallerPlan("a", 10.0),), duration_seconds=2.0)


def tokens(*ids: int) -> BenchItem:
    """Return an item of these response ids."""
    return BenchItem(prompt_token_ids=(1, 2), response_token_ids=ids)


def right_score(item: BenchItem, *, weight: float = 1.0) -> reward_pb2.ItemScore:
    """Return what a sound fake service answers."""
    raw = fake_score(item.prompt_token_ids, item.response_token_ids)
    component = reward_pb2.ScoreComponent(name="score", value=raw, weight=weight)
    return reward_pb2.ItemScore(score=raw * weight, raw_score=raw * weight, components=[component], token_count=4)
