"""Agreement of scores with rankings, against slow loops and closed forms."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import numpy.typing as npt
import pytest

from tether_services.recipes.ranking_metrics import (
    Judged,
    Pairs,
    calibration_error,
    evaluate_rankings,
    measure_agreement,
    measure_by_size,
    measure_quartiles,
    pairs_of,
    reliability_bins,
    top_share,
    win_share,
)

Numbers = npt.NDArray[np.float64]


def judged(scores: list[float], levels: list[float], lengths: list[int] | None = None) -> Judged:
    return Judged(np.array(scores), np.array(levels, dtype=float), np.array(lengths or [0] * len(levels), dtype=float))


def random_rankings(seed: int, *, count: int = 40) -> list[Judged]:
    """Return rankings of 2 to 9 answers with ties in levels, scores and lengths, none of only ties."""
    rng = np.random.default_rng(seed)
    found: list[Judged] = []
    while len(found) < count:
        size = int(rng.integers(2, 10))
        levels = rng.integers(0, 4, size).astype(float)
        if len(set(levels)) > 1:
            scores = np.round(rng.normal(size=size) + 0.3 * levels, 1)
            found.append(Judged(scores, levels, rng.integers(1, 30, size).astype(float)))
    return found


def slow_pairs(items: list[Judged]) -> list[tuple[float, float]]:
    """Return (score lead, length lead) of every pair with a better and a worse answer, by nested loops."""
    return [
        (item.scores[i] - item.scores[j], item.lengths[i] - item.lengths[j])
        for item in items
        for i, j in itertools.permutations(range(len(item.levels)), 2)
        if item.levels[i] > item.levels[j]
    ]


def slow_share(leads: list[float]) -> float:
    return sum(1.0 if lead > 0 else 0.5 if lead == 0 else 0.0 for lead in leads) / len(leads)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_and_shares_equal_a_slow_loop(seed: int) -> None:
    items = random_rankings(seed)
    slow, pairs = slow_pairs(items), pairs_of(items)
    assert sorted(zip(pairs.leads, pairs.length_leads, strict=True)) == sorted(slow)
    agreement = measure_agreement(items)
    assert agreement.num_pairs == len(slow)
    assert agreement.accuracy == pytest.approx(slow_share([lead for lead, _ in slow]), abs=1e-12)
    assert agreement.longer_wins == pytest.approx(slow_share([lead for _, lead in slow]), abs=1e-12)


def test_ties_are_left_out_and_counted() -> None:
    pairs = pairs_of([judged([2, 1, 1], [1, 0, 0], [5, 9, 2]), judged([0, 0], [3, 3])])
    assert (pairs.leads.tolist(), pairs.length_leads.tolist(), pairs.num_tied) == ([1, 1], [-4, 3], 2)


def test_pairs_are_formed_within_a_ranking_only() -> None:
    assert len(pairs_of([judged([1, 0], [1, 0]), judged([5, 4], [1, 0])]).leads) == 2


@pytest.mark.parametrize(
    ("scores", "expected"), [([3, 2, 1], 1.0), ([1, 2, 3], 0.0), ([1, 1, 1], 0.5), ([2, 2, 1], 5 / 6)]
)
def test_equal_scores_count_half(scores: list[float], expected: float) -> None:
    assert measure_agreement([judged(scores, [2, 1, 0])]).accuracy == pytest.approx(expected)


def test_a_share_of_no_pairs_is_an_error_not_a_number() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        win_share(np.empty(0))
    with pytest.raises(ValueError, match="no pairs"):
        measure_agreement([judged([1, 2], [0, 0])])


def test_the_length_baseline_takes_the_better_of_longer_and_shorter() -> None:
    shorter_wins = [judged([0, 0], [1, 0], [2, 9])] * 3 + [judged([0, 0], [1, 0], [9, 2])]
    agreement = measure_agreement(shorter_wins)
    assert (agreement.longer_wins, agreement.length_baseline) == (0.25, 0.75)


def slow_top_share(items: list[Judged], values: list[Numbers]) -> float:
    """Return the mean over rankings of the chance that a random one of the highest values is on a best answer."""
    shares: list[float] = []
    for item, value in zip(items, values, strict=True):
        first = [i for i in range(len(value)) if value[i] == max(value)]
        shares.append(float(sum(item.levels[i] == max(item.levels) for i in first)) / len(first))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("seed", range(3))
def test_top1_equals_a_slow_loop_and_equal_values_share(seed: int) -> None:
    items = random_rankings(seed)
    agreement = measure_agreement(items)
    assert agreement.top1 == pytest.approx(slow_top_share(items, [item.scores for item in items]))
    assert agreement.longest_top1 == pytest.approx(slow_top_share(items, [item.lengths for item in items]))
    assert top_share([judged([1, 1, 0], [2, 1, 0])], [np.array([1.0, 1.0, 0.0])]) == 0.5


def test_rankings_are_told_apart_by_size() -> None:
    items = random_rankings(7, count=60)
    by_size = measure_by_size(items)
    assert list(by_size) == sorted({len(item.levels) for item in items})
    assert sum(found.num_pairs for found in by_size.values()) == len(slow_pairs(items))
    three = [item for item in items if len(item.levels) == 3]
    assert by_size[3].accuracy == pytest.approx(slow_share([lead for lead, _ in slow_pairs(three)]))


def test_every_prompt_counts_once_in_the_prompt_accuracy() -> None:
    items = [judged([1, 0], [1, 0]), judged([0, 1, 2, 3], [3, 2, 1, 0])]
    found = evaluate_rankings(items)
    assert found.prompt_accuracy == 0.5
    assert found.overall.accuracy == pytest.approx(1 / 7)


@pytest.mark.parametrize("seed", range(3))
def test_quartiles_hold_every_pair_once_in_order_of_the_difference(seed: int) -> None:
    items = random_rankings(seed, count=100)
    slow, parts = slow_pairs(items), measure_quartiles(pairs_of(items))
    assert sum(part.num_pairs for part in parts) == len(slow)
    assert all(first.high < second.low for first, second in itertools.pairwise(parts))
    for part in parts:
        kept = [(lead, length) for lead, length in slow if part.low <= abs(length) <= part.high]
        assert part.num_pairs == len(kept)
        assert part.accuracy == pytest.approx(slow_share([lead for lead, _ in kept]))
        assert part.longer_wins == pytest.approx(slow_share([length for _, length in kept]))
        assert part.length_baseline == max(part.longer_wins, 1 - part.longer_wins)


def test_quartiles_of_distinct_differences_are_equally_large() -> None:
    differences = np.arange(1, 41).astype(np.float64)
    parts = measure_quartiles(Pairs(np.ones(40), differences, 0))
    assert [part.num_pairs for part in parts] == [10, 10, 10, 10]
    assert [(part.low, part.high) for part in parts] == [(1, 10), (11, 20), (21, 30), (31, 40)]


def test_equal_differences_stay_in_one_part() -> None:
    parts = measure_quartiles(Pairs(np.ones(10), np.full(10, 7.0), 0))
    assert [(part.low, part.high, part.num_pairs) for part in parts] == [(7, 7, 10)]


def test_bins_equal_a_slow_loop_over_both_orders() -> None:
    leads = np.random.default_rng(0).normal(0.3, 2.0, 500)
    predictions = [(1 / (1 + math.exp(-lead)), 1.0) for lead in leads]
    predictions += [(1 - p, 0.0) for p, _ in predictions]
    bins = reliability_bins(leads)
    assert len(bins) == 10
    for place, found in enumerate(bins):
        kept = [(p, y) for p, y in predictions if place / 10 <= p < (place + 1) / 10]
        assert found.num_predictions == len(kept)
        assert found.probability == pytest.approx(sum(p for p, _ in kept) / len(kept))
        assert found.preferred == pytest.approx(sum(y for _, y in kept) / len(kept))
    slow = sum(b.num_predictions * abs(b.preferred - b.probability) for b in bins) / 1000
    assert calibration_error(bins) == pytest.approx(slow)


def test_calibration_does_not_depend_on_which_answer_is_named_first() -> None:
    bins = reliability_bins(np.array([0.2, -0.7, 1.5, 3.0]))
    for low, high in zip(bins[:5], reversed(bins[5:]), strict=True):
        assert low.num_predictions == high.num_predictions
        if low.num_predictions:
            assert low.preferred == pytest.approx(1 - high.preferred)


def test_predictions_that_come_true_as_often_as_they_say_have_no_error() -> None:
    lead = math.log(0.75 / 0.25)
    leads = np.array([lead] * 6 + [-lead] * 2)
    assert calibration_error(reliability_bins(leads)) == pytest.approx(0.0, abs=1e-12)
    sure = math.log(0.99 / 0.01)
    assert calibration_error(reliability_bins(np.array([sure] * 8 + [-sure] * 2))) == pytest.approx(0.19, abs=1e-12)


def test_leads_far_outside_stay_finite_and_in_the_outer_bins() -> None:
    bins = reliability_bins(np.array([1e6, -1e6]))
    assert (bins[0].num_predictions, bins[-1].num_predictions) == (2, 2)
    assert calibration_error(bins) == pytest.approx(0.5)


def test_the_evaluation_is_json() -> None:
    content = json.loads(json.dumps(evaluate_rankings(random_rankings(1)).as_dict(), allow_nan=False))
    assert set(content["by_size"]) <= {str(size) for size in range(2, 10)}
    assert content["overall"]["num_rankings"] == 40
    assert len(content["bins"]) == 10
