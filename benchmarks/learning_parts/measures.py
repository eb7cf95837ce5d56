"""What the benchmark computes from responses and scores: diversity, repetition, best-of-n, spread. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import chain, pairwise

__all__ = [
    "best_of_n_kl",
    "best_of_n_mean",
    "bigrams",
    "crossing",
    "distinct_2",
    "equal_distinct_2",
    "repetition_rate",
    "standard_error",
]

REPEATED_LENGTH = 4
"""Tokens of the sequences whose second occurrence counts as a repetition."""


def bigrams(responses: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return the pairs of neighbouring tokens of all responses, response after response; none spans two responses."""
    return list(chain.from_iterable(pairwise(ids) for ids in responses))


def distinct_2(responses: Sequence[Sequence[int]], *, num_bigrams: int) -> float:
    """Return the share of different pairs among the first `num_bigrams` pairs of neighbouring tokens.

    The share falls with the size of the pool in any text, so that only pools of one size can be compared.

    Raises:
        ValueError: There are fewer pairs than that, or `num_bigrams` is below 1.

    Source: Li et al. 2016, arXiv:1510.03055, section 5.
    """
    pool = bigrams(responses)
    if not 1 <= num_bigrams <= len(pool):
        raise ValueError(f"num_bigrams is {num_bigrams}; the responses have {len(pool)} pairs")
    return len(set(pool[:num_bigrams])) / num_bigrams


def equal_distinct_2(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return distinct-2 of two sets of responses, both over as many pairs as the smaller one has."""
    size = min(len(bigrams(first)), len(bigrams(second)))
    return distinct_2(first, num_bigrams=size), distinct_2(second, num_bigrams=size)


def repetition_rate(responses: Sequence[Sequence[int]]) -> float:
    """Return the share of a response's runs of four tokens that occurred in it before, mean over responses.

    A response of fewer than four tokens repeats nothing.

    Raises:
        ValueError: There are no responses.
    """
    if not responses:
        raise ValueError("there are no responses")
    return statistics.fmean(_repeated_share(ids) for ids in responses)


def _repeated_share(ids: Sequence[int]) -> float:
    runs = [tuple(ids[i : i + REPEATED_LENGTH]) for i in range(len(ids) - REPEATED_LENGTH + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def best_of_n_mean(scores: Sequence[float], n: int) -> float:
    """Return the unbiased estimate of the expected highest of n scores, from at least n independent ones.

    The mean over all subsets of n: the i-th smallest of m (from 1) is the highest of C(i - 1, n - 1) of C(m, n).

    Raises:
        ValueError: n is below 1 or above the number of scores.
    """
    m = len(scores)
    if not 1 <= n <= m:
        raise ValueError(f"n is {n}; there are {m} scores")
    highest = [math.comb(i - 1, n - 1) * score for i, score in enumerate(sorted(scores), start=1)]
    return math.fsum(highest) / math.comb(m, n)


def best_of_n_kl(n: int) -> float:
    """Return ln n - (n - 1) / n: the KL in nats of best-of-n from its policy, per response.

    Exact where all scores differ, an upper bound otherwise.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; Beirami et al. 2024, arXiv:2401.01879.
    """
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 is needed")
    return math.log(n) - (n - 1) / n


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values, at least two."""
    return statistics.stdev(values) / math.sqrt(len(values))


def crossing(points: Sequence[tuple[float, float]], level: float) -> float:
    """Return the smallest x at which a line through the points, in the order of x, is at the level or above.

    Args:
        points: (x, y), in any order.
        level: The y to reach.

    Raises:
        ValueError: No point reaches the level.
    """
    ordered = sorted(points)
    if ordered and ordered[0][1] >= level:
        return ordered[0][0]
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if y1 >= level:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    raise ValueError(f"no point reaches {level}")
