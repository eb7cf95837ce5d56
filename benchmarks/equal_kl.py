"""Compares two groups of policies at equal KL: how far do ours lie above the line through the peers?

    .venv/bin/python benchmarks/equal_kl.py --ours runs/seed-*/adapters/000024 --peers runs/trl/seed-*/adapter

Every policy is judged by policy_evaluation.py: same held-out prompts, same random numbers. Through the peers' points
(KL per 64 tokens, score) goes a straight line by least squares, so the peers should be runs of two or more kl_coef
around the KL of ours; a row outside their KL is marked. Two standard errors of the mean difference are given: over our
policies (seeds), and over prompts, by drawing the prompts anew for all policies at once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, only its own folder is on the path

from benchmarks.policy_evaluation import (
    HEADER,
    Judge,
    Response,
    evaluate,
    format_row,
    load_judge,
    load_policy,
    silence_loading,
)

NUM_DRAWS = 1000
"""Of the prompts, for the standard error over them."""

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sums:
    """What one policy did on each prompt; every array is [P] over the prompts."""

    scores: Array
    kls: Array
    """Nats."""
    num_tokens: Array
    num_responses: int
    """To each prompt."""

    def point(self, counts: Array) -> tuple[float, float]:
        """Return (KL per 64 tokens, mean score) where prompt i counts `counts[i]` times."""
        kl = 64 * float(counts @ self.kls) / float(counts @ self.num_tokens)
        return kl, float(counts @ self.scores) / float(counts.sum() * self.num_responses)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours against the line through the peers."""

    kls: tuple[float, ...]
    """Of our policies, per 64 tokens."""
    differences: tuple[float, ...]
    """Score of each of ours minus the peers' line at its KL."""
    outside: tuple[bool, ...]
    """True where no peer has a KL as low or as high."""
    mean: float
    error_of_seeds: float
    """Standard error of `mean` over our policies; NaN for one."""
    error_of_prompts: float
    """Standard error of `mean` over prompts."""


def main() -> int:
    """Evaluate both groups, print a row each and the differences at equal KL."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ours", nargs="+", type=Path, required=True, help="folders of adapters or whole models")
    parser.add_argument("--peers", nargs="+", type=Path, required=True, help="the same, of two or more kl_coef")
    parser.add_argument("--responses", type=int, default=8, help="answers per prompt (default 8)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    silence_loading()
    judge = load_judge()
    print(HEADER, flush=True)
    groups = [
        [judge_policy(path, judge, num_responses=arguments.responses) for path in paths]
        for paths in (arguments.ours, arguments.peers)
    ]
    comparison = compare(groups[0], groups[1])
    print(format_comparison(arguments.ours, comparison))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(as_document(arguments, groups, comparison), indent=1), encoding="utf-8")
    return 0


def judge_policy(source: Path, judge: Judge, *, num_responses: int) -> Sums:
    """Evaluate a policy, print its row and return its sums by prompt."""
    evaluation = evaluate(load_policy(source), judge, num_responses=num_responses, seed=0)
    print(format_row(str(source), evaluation), flush=True)
    return sum_by_prompt(evaluation.responses, num_responses=num_responses)


def sum_by_prompt(responses: Sequence[Response], *, num_responses: int) -> Sums:
    """Return the sums of responses that lie prompt by prompt."""
    rows = np.array([(row.score, row.kl, row.num_tokens) for row in responses], dtype=np.float64)
    sums = rows.reshape(-1, num_responses, 3).sum(axis=1)
    return Sums(sums[:, 0], sums[:, 1], sums[:, 2], num_responses)


def compare(ours: Sequence[Sums], peers: Sequence[Sums]) -> Comparison:
    """Return the comparison of two groups that answered the same prompts.

    Raises:
        SystemExit: The peers do not have two different KL, so there is no line through them.
    """
    num_prompts = len(ours[0].scores)
    once = np.ones(num_prompts)
    differences = differences_at_equal_kl(ours, peers, once)
    generator = np.random.default_rng(0)
    draws = generator.multinomial(num_prompts, once / num_prompts, size=NUM_DRAWS).astype(np.float64)
    means = [statistics.fmean(differences_at_equal_kl(ours, peers, draw)) for draw in draws]
    kls, peer_kls = ([policy.point(once)[0] for policy in group] for group in (ours, peers))
    return Comparison(
        kls=tuple(kls),
        differences=tuple(differences),
        outside=tuple(not min(peer_kls) <= kl <= max(peer_kls) for kl in kls),
        mean=statistics.fmean(differences),
        error_of_seeds=statistics.stdev(differences) / math.sqrt(len(ours)) if len(ours) > 1 else math.nan,
        error_of_prompts=statistics.stdev(means),
    )


def differences_at_equal_kl(ours: Sequence[Sums], peers: Sequence[Sums], counts: Array) -> list[float]:
    """Return the score of each of ours minus the line through the peers, where prompt i counts `counts[i]` times.

    Raises:
        SystemExit: The peers do not have two different KL.
    """
    points = [peer.point(counts) for peer in peers]
    if len({round(kl, 6) for kl, _ in points}) < 2:
        raise SystemExit("the peers need two different KL: give runs of two or more kl_coef")
    slope, offset = statistics.linear_regression([kl for kl, _ in points], [score for _, score in points])
    return [score - (offset + slope * kl) for kl, score in (policy.point(counts) for policy in ours)]


def format_comparison(names: Sequence[Path], comparison: Comparison) -> str:
    """Return one line per policy of ours and the mean difference."""
    rows = zip(names, comparison.kls, comparison.differences, comparison.outside, strict=True)
    lines = [
        f"{str(name)[-48:]:<48} at KL {kl:.2f}: {difference:+.3f}"
        + (" (outside the KL of the peers)" if outside else "")
        for name, kl, difference, outside in rows
    ]
    errors = f"{comparison.error_of_seeds:.3f} over seeds, {comparison.error_of_prompts:.3f} over prompts"
    return "\n".join(
        [*lines, f"mean difference in score at equal KL: {comparison.mean:+.3f} (standard error {errors})"]
    )


def as_document(arguments: argparse.Namespace, groups: list[list[Sums]], comparison: Comparison) -> dict[str, Any]:
    """Return the figures for a JSON file; NaN becomes null."""
    once = np.ones(len(groups[0][0].scores))
    paths = zip(("ours", "peers"), (arguments.ours, arguments.peers), groups, strict=True)
    points = {
        kind: {
            str(path): dict(zip(("kl_per_64_tokens", "score"), sums.point(once), strict=True)) for path, sums in pairs
        }
        for kind, pairs in ((kind, zip(names, group, strict=True)) for kind, names, group in paths)
    }
    error = None if math.isnan(comparison.error_of_seeds) else comparison.error_of_seeds
    return {
        **points,
        "differences": list(comparison.differences),
        "mean": comparison.mean,
        "error_of_seeds": error,
        "error_of_prompts": comparison.error_of_prompts,
    }


if __name__ == "__main__":
    sys.exit(main())
