from __future__ import annotations

from prometheus_client import CollectorRegistry

from tether_services.reward.cache import ScoreCache, digest_item, estimate_bytes
from tether_services.reward.config import CacheSettings
from tether_services.reward.engine import ScoreTask
from tether_services.reward.items import PreparedItem
from tether_services.reward.metrics import CacheMetrics
from tether_services.reward.models import ComponentValue, Judgement


def cache(**limits: int) -> ScoreCache:
    return ScoreCache(CacheSettings.model_validate(limits), CacheMetrics(CollectorRegistry()))


def judgement(score: float = 1.0, *, parts: int = 1) -> Judgement:
    values = tuple(ComponentValue(f"part-{number}", score, 1.0) for number in range(parts))
    return Judgement(score, score, values, 3, False)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_memory_is_bounded_and_counted_exactly_through_replacement() -> None:
    size = estimate_bytes(judgement())
    kept = cache(max_items=100, max_bytes=max(1024, 5 * size))
    for number in range(50):
        kept.put(key(number), judgement(float(number)))
        assert kept.num_bytes <= 5 * size and kept.num_bytes == len(kept) * size
    assert len(kept) == 5
    for _ in range(3):
        kept.put(key(49), judgement(-1.0))
    assert len(kept) == 5 and kept.num_bytes == 5 * size
    found = kept.get(key(49))
    assert found is not None and found.score == -1.0
    assert kept.get(key(1)) is None


def test_what_is_too_large_alone_is_not_kept_and_makes_no_room() -> None:
    kept = cache(max_items=10, max_bytes=1024)
    kept.put(key(1), judgement())
    kept.put(key(2), judgement(parts=16))
    assert kept.get(key(2)) is None and kept.get(key(1)) is not None


def test_a_cache_of_no_items_is_off() -> None:
    kept = cache()
    kept.put(key(1), judgement())
    assert not kept.is_on and len(kept) == 0


def test_the_digest_tells_apart_all_that_an_engine_reads() -> None:
    tasks = [
        ScoreTask(),
        ScoreTask(prompt="a"),
        ScoreTask(response="a"),
        ScoreTask(prompt="a", response="b"),
        ScoreTask(prompt="ab"),
        ScoreTask(prompt_token_ids=(1, 2), response_token_ids=(3,)),
        ScoreTask(prompt_token_ids=(1,), response_token_ids=(2, 3)),
        ScoreTask(response_token_ids=(1, 2, 3)),
        ScoreTask(response_token_ids=(97,)),
        ScoreTask(prompt="a", response_token_ids=(1,)),
    ]
    digests = {
        digest_item(who, PreparedItem(task, cut)) for task in tasks for cut in (False, True) for who in (b"m", b"n")
    }
    assert len(digests) == 4 * len(tasks)
    assert {len(digest) for digest in digests} == {32}
    again = PreparedItem(ScoreTask(prompt="a", response="b"), False)
    assert digest_item(b"m", again) == digest_item(b"m", PreparedItem(ScoreTask("a", "b"), False))
