"""When calls are due, and what they carry: fixed by the plan alone."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.unit.bench_inputs import PLAN
from tether.errors import InvalidArgumentError
from tether_services.bench.items import ItemSource, read_items
from tether_services.bench.plan import BenchItem, CallerPlan, ItemPlan, LoadPlan, check_plan
from tether_services.bench.schedule import arrival_offsets


def constant(rate: float, duration: float, *, phase: float = 0.0) -> list[float]:
    return list(arrival_offsets(rate, duration_seconds=duration, arrivals="constant", seed="", phase=phase))


def poisson(rate: float, duration: float, *, seed: str) -> list[float]:
    return list(arrival_offsets(rate, duration_seconds=duration, arrivals="poisson", seed=seed))


def test_constant_arrivals_are_due_at_whole_multiples_of_the_gap_and_never_drift() -> None:
    assert constant(4, 1) == [0.0, 0.25, 0.5, 0.75]
    assert constant(4, 1, phase=0.5) == [0.125, 0.375, 0.625, 0.875]
    offsets = constant(3000, 60)
    assert len(offsets) == 180_000
    assert all(offset == index / 3000 for index, offset in enumerate(offsets))  # a sum of gaps would be off by now


def test_a_rate_below_one_in_the_duration_still_calls_once() -> None:
    assert constant(0.1, 5) == [0.0]


def test_poisson_arrivals_are_seeded_ascending_and_exponential() -> None:
    offsets = poisson(1000, 20, seed="7 arrivals 0")
    assert offsets == poisson(1000, 20, seed="7 arrivals 0") != poisson(1000, 20, seed="8 arrivals 0")
    assert offsets == sorted(offsets) and offsets[0] > 0 and offsets[-1] < 20
    assert abs(len(offsets) - 20_000) < 5 * 20_000**0.5
    gaps = [after - before for before, after in pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 / mean == pytest.approx(1.0, abs=0.05)  # constant gaps would give 0


def source(plan: ItemPlan, *, caller: int = 0, vocab_size: int = 259, seed: str = "0") -> ItemSource:
    return ItemSource(plan, seed=seed, caller=caller, vocab_size=vocab_size)


@pytest.mark.parametrize("form", ["tokens", "text"])
def test_synthetic_items_differ_from_all_others_also_of_other_callers(form: str) -> None:
    plan = ItemPlan(per_call=50, min_tokens=8, max_tokens=8, form=form)  # type: ignore[arg-type]
    sources = [source(plan, caller=caller) for caller in (0, 1, 63)]
    items = [item for made in sources for _ in range(100) for item in made.next_call()]
    assert len(set(items)) == len(items) == 15_000
    assert sum(made.num_repeats for made in sources) == 0


@pytest.mark.parametrize("form", ["tokens", "text"])
def test_lengths_fill_their_range_and_every_response_has_some(form: str) -> None:
    made = source(ItemPlan(min_tokens=8, max_tokens=20, form=form))  # type: ignore[arg-type]
    items = [made.next_call()[0] for _ in range(500)]
    parts = [(i.prompt, i.response) if form == "text" else (i.prompt_token_ids, i.response_token_ids) for i in items]
    assert {len(prompt) + len(response) for prompt, response in parts} == set(range(8, 21))
    assert min(len(response) for _, response in parts) >= 4


@pytest.mark.parametrize("vocab_size", [0, 10, 50_000])
def test_token_ids_fit_the_vocabulary(vocab_size: int) -> None:
    made = source(ItemPlan(), vocab_size=vocab_size)
    ids = {i for _ in range(50) for item in made.next_call() for i in item.prompt_token_ids + item.response_token_ids}
    assert min(ids) >= 0 and max(ids) < min(vocab_size or 64, 64)


def test_the_same_seed_makes_the_same_items() -> None:
    plan = ItemPlan(repeat_share=0.5)
    first, again, other = source(plan), source(plan), source(plan, seed="1")
    items = [first.next_call() for _ in range(200)]
    assert items == [again.next_call() for _ in range(200)] != [other.next_call() for _ in range(200)]


def test_a_share_of_items_repeats_a_recent_one() -> None:
    made = source(ItemPlan(per_call=10, repeat_share=0.3))
    items = [item for _ in range(500) for item in made.next_call()]
    assert made.num_repeats == len(items) - len(set(items))
    assert made.num_repeats / len(items) == pytest.approx(0.3, abs=0.03)


def test_given_items_come_in_turn_and_count_as_repeats_the_second_time() -> None:
    given = (BenchItem(response="a"), BenchItem(response="b"))
    made = source(ItemPlan(per_call=3, given=given))
    assert [item.response for item in made.next_call()] == ["a", "b", "a"]
    assert made.num_repeats == 1


def test_a_file_of_items_is_read_in_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    rows = [
        {"prompt": "p", "response": "r"},
        {"prompt_token_ids": [1], "response_token_ids": [2, 3]},
        {"response": "x"},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert read_items(path) == (
        BenchItem("p", "r"),
        BenchItem(prompt_token_ids=(1,), response_token_ids=(2, 3)),
        BenchItem(response="x"),
    )


BAD_LINES = [
    "nonsense secret",
    "[]",
    '"secret"',
    "{}",
    '{"prompt": "secret"}',
    '{"response": 3}',
    '{"response": "r", "prompt": 1}',
    '{"response_token_ids": [1.5]}',
    '{"response_token_ids": [-1]}',
    '{"response_token_ids": 7}',
    '{"response_token_ids": [true]}',
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_no_item_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"response": "good"}\n' + line)
    with pytest.raises(InvalidArgumentError, match=r"items.jsonl:2 is no item") as caught:
        read_items(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n", None])
def test_a_file_without_items_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidArgumentError):
        read_items(path)


def violations(plan: LoadPlan) -> list[str]:
    with pytest.raises(InvalidArgumentError) as caught:
        check_plan(plan)
    assert caught.value.reason == "INVALID_CONFIG"
    return [violation.field for violation in caught.value.violations]


def test_a_sound_plan_passes() -> None:
    check_plan(PLAN)


def test_every_bad_field_of_a_plan_is_named() -> None:
    callers = (CallerPlan("a", -1), CallerPlan("a", float("nan")))
    items = ItemPlan(per_call=0, min_tokens=7, max_tokens=6, repeat_share=1.0)
    plan = LoadPlan("", callers, float("inf"), concurrency=0, deadline_seconds=0, max_calls=0, items=items)
    assert violations(plan) == [
        "target", "duration_seconds", "deadline_seconds", "concurrency", "max_calls", "callers.a.rate", "callers.name",
        "callers.a.rate", "items.per_call", "items.min_tokens", "items.max_tokens",
        "items.repeat_share",
    ]  # fmt: skip


def test_no_callers_and_too_many_are_refused() -> None:
    assert violations(LoadPlan("t", (), 1)) == ["callers"]
    assert violations(LoadPlan("t", tuple(CallerPlan(f"c{i}", 1) for i in range(65)), 1)) == ["callers"]


def test_more_calls_than_allowed_are_refused_before_the_first() -> None:
    assert violations(LoadPlan("t", (CallerPlan("a", 100), CallerPlan("b", 50)), 10, max_calls=1499)) == ["max_calls"]
    check_plan(LoadPlan("t", (CallerPlan("a", 100), CallerPlan("b", 50)), 10, max_calls=1500))


def test_a_token_is_not_in_the_repr_of_a_plan() -> None:
    assert "hush" not in repr(LoadPlan("t", (CallerPlan("a", 1, "hush"),), 1))
