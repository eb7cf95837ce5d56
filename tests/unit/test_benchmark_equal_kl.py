"""The comparison at equal KL: its line, its differences and its errors against hand calculation and known truth."""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.equal_kl import (
    Sums,
    as_document,
    compare,
    differences_at_equal_kl,
    format_comparison,
    sum_by_prompt,
)
from benchmarks.policy_evaluation import Response, summarise


def make_sums(*, kl: float, score: float, num_prompts: int = 4) -> Sums:
    """Return a policy that does the same on every prompt: two responses of 64 tokens each."""
    ones = np.ones(num_prompts)
    return Sums(scores=2 * score * ones, kls=2 * kl * ones, num_tokens=128 * ones, num_responses=2)


def random_sums(generator: np.random.Generator, *, kl: float, score: float, effects: np.ndarray) -> Sums:
    noise = generator.normal(size=len(effects))
    return Sums(score + effects + 0.1 * noise, kl + 0 * effects, 64 + 0 * effects, num_responses=1)


def test_sums_and_points_agree_with_the_evaluation() -> None:
    rows = [Response("a", "", 1.0, 2.0, 4), Response("a", "", 3.0, 4.0, 8)]
    rows += [Response("b", "", 5.0, 0.0, 8), Response("b", "", 7.0, 6.0, 12)]
    sums, evaluation = sum_by_prompt(rows, num_responses=2), summarise(rows, num_responses=2)
    assert sums.scores.tolist() == [4.0, 12.0]
    assert sums.kls.tolist() == [6.0, 6.0]
    assert sums.num_tokens.tolist() == [12.0, 20.0]
    assert sums.point(np.ones(2)) == pytest.approx((evaluation.kl_per_64_tokens, evaluation.score_mean))


def test_a_point_counts_prompts_as_often_as_they_were_drawn() -> None:
    sums = Sums(np.array([1.0, 2.0]), np.array([3.0, 5.0]), np.array([10.0, 30.0]), num_responses=1)
    assert sums.point(np.array([2.0, 1.0])) == pytest.approx((64 * 11 / 50, 4 / 3))


def test_differences_are_taken_from_the_line_through_the_peers() -> None:
    peers = [make_sums(kl=4, score=3), make_sums(kl=8, score=5)]
    ours = [make_sums(kl=6, score=4.5), make_sums(kl=4, score=2.75)]
    assert differences_at_equal_kl(ours, peers, np.ones(4)) == pytest.approx([0.5, -0.25])


def test_the_line_is_one_of_least_squares() -> None:
    points = [(4.0, 3.0), (4.0, 3.4), (8.0, 5.0), (9.0, 5.5)]
    design = np.array([(kl, 1.0) for kl, _ in points])
    slope, offset = np.linalg.lstsq(design, np.array([score for _, score in points]), rcond=None)[0]
    peers = [make_sums(kl=kl, score=score) for kl, score in points]
    found = differences_at_equal_kl([make_sums(kl=7, score=4)], peers, np.ones(4))
    assert found == pytest.approx([4 - (offset + 7 * slope)])


def test_peers_of_one_kl_are_refused() -> None:
    peers = [make_sums(kl=4, score=3), make_sums(kl=4, score=5)]
    with pytest.raises(SystemExit, match="two or more kl_coef"):
        compare([make_sums(kl=4, score=4)], peers)


def test_mean_and_error_over_seeds_match_a_hand_calculation() -> None:
    peers = [make_sums(kl=4, score=3), make_sums(kl=8, score=5)]
    ours = [make_sums(kl=4, score=3.1), make_sums(kl=6, score=4.2), make_sums(kl=9, score=5.9)]
    comparison = compare(ours, peers)
    assert comparison.differences == pytest.approx((0.1, 0.2, 0.4))
    assert comparison.mean == pytest.approx(0.7 / 3)
    assert comparison.error_of_seeds == pytest.approx(statistics.stdev([0.1, 0.2, 0.4]) / math.sqrt(3))
    assert comparison.kls == pytest.approx((4, 6, 9))
    assert comparison.outside == (False, False, True)
    assert comparison.error_of_prompts == pytest.approx(0.0, abs=1e-9)  # every prompt says the same


def test_effects_of_prompts_that_both_groups_share_cancel() -> None:
    generator = np.random.default_rng(1)
    effects = generator.normal(scale=5.0, size=200)
    peers = [random_sums(generator, kl=kl, score=kl / 2, effects=effects) for kl in (4.0, 4.0, 8.0, 8.0)]
    ours = [random_sums(generator, kl=6.0, score=3.5, effects=effects)]
    comparison = compare(ours, peers)
    assert comparison.mean == pytest.approx(0.5, abs=0.05)
    # Noise of 0.1 per prompt: the mean of ours has 0.1 / sqrt(200), the line half of that at its middle.
    assert comparison.error_of_prompts == pytest.approx(0.1 * math.sqrt(1.25 / 200), rel=0.25)
    assert math.isnan(comparison.error_of_seeds)


def test_prompts_that_only_we_do_well_on_show_in_the_error() -> None:
    effects = np.random.default_rng(2).normal(scale=5.0, size=200)
    peers = [make_sums(kl=kl, score=kl / 2, num_prompts=200) for kl in (4.0, 8.0)]
    ours = [Sums(3.0 + effects, 6.0 + 0 * effects, 64 + 0 * effects, num_responses=1)]
    assert compare(ours, peers).error_of_prompts == pytest.approx(effects.std() / math.sqrt(200), rel=0.1)


def test_lines_name_the_policy_and_mark_what_is_outside() -> None:
    comparison = compare([make_sums(kl=9, score=6.0)], [make_sums(kl=4, score=3), make_sums(kl=8, score=5)])
    first, last = format_comparison([Path("runs/a")], comparison).splitlines()
    assert " ".join(first.split()) == "runs/a at KL 9.00: +0.500 (outside the KL of the peers)"
    assert last.startswith("mean difference in score at equal KL: +0.500 (standard error nan over seeds, 0.000 over")


def test_the_document_holds_every_point_and_no_nan() -> None:
    ours, peers = [make_sums(kl=6, score=4.5)], [make_sums(kl=4, score=3), make_sums(kl=8, score=5)]
    arguments = argparse.Namespace(ours=[Path("a")], peers=[Path("b"), Path("c")])
    document = as_document(arguments, [ours, peers], compare(ours, peers))
    assert document["ours"] == {"a": {"kl_per_64_tokens": 6.0, "score": 4.5}}
    assert document["peers"]["c"] == {"kl_per_64_tokens": 8.0, "score": 5.0}
    assert document["error_of_seeds"] is None
    assert document["differences"] == pytest.approx([0.5])
