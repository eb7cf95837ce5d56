"""How much score does PPO buy with a nat of KL, and how much does best-of-n?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.learning_parts.evaluation import REFERENCE_TOKENS, Evaluation
from benchmarks.learning_parts.measures import (
    best_of_n_kl,
    best_of_n_mean,
    crossing,
    equal_distinct_2,
    repetition_rate,
    standard_error,
)
from benchmarks.learning_parts.plots import FrontierPoint, draw_frontier
from benchmarks.learning_parts.runs import BASE_RESPONSES, RUN_RESPONSES, Job, Options, RunResult, run_jobs
from benchmarks.learning_parts.tables import Column, Study

__all__ = ["BEST_OF", "best_of_n_row", "run_frontier"]

BEST_OF: Final = (1, 2, 4, 8, 16)
MAX_KL: Final = 20.0
"""Nats per 64 tokens within which PPO is to reach the score of the largest best-of-n."""

COLUMNS: Final = (
    Column("policy", "policy"),
    Column("seed", "seed"),
    Column("KL per 64 tokens", "kl_per_64_tokens", "{:.2f}"),
    Column("score", "score", "{:+.2f}"),
    Column("standard error", "score_error", "{:.2f}"),
    Column("over best-of-16", "over_best", "{:+.2f}"),
    Column("standard error", "over_best_error", "{:.2f}"),
    Column("tokens per response", "length", "{:.1f}"),
    Column("distinct-2 before", "distinct_before", "{:.3f}"),
    Column("after", "distinct_after", "{:.3f}"),
    Column("repetition before", "repetition_before", "{:.3f}"),
    Column("after", "repetition_after", "{:.3f}"),
)
NOTES: Final = (
    f"PPO: {RUN_RESPONSES} responses to each held-out prompt. Best of n: the expected highest score of n, estimated"
    f" without bias from {BASE_RESPONSES} responses of the starting policy to the same prompts; its KL is"
    " ln n - (n - 1) / n per response, scaled to 64 tokens. Standard errors over prompts, of the difference paired.",
)


async def run_frontier(options: Options, *, kl_coefs: Sequence[float]) -> Study:
    """Return the study of PPO at several fixed KL coefficients beside best-of-n.

    Args:
        options: Seeds (each coefficient is run with all of them), steps and place.
        kl_coefs: Above 0.
    """
    jobs = [Job(f"ppo-kl-{coef:g}", seed, (f"ppo.kl_coef={coef}",)) for coef in kl_coefs for seed in options.seeds]
    base, results = await run_jobs(jobs, options)
    best_rows = [best_of_n_row(base, n) for n in BEST_OF]
    best = best_of_n_scores(base, BEST_OF[-1])
    ppo_rows = [ppo_row(result, base, best) for result in results]
    return Study(
        name="frontier",
        title="Score against KL: PPO beside best-of-n",
        columns=COLUMNS,
        rows=[*best_rows, *ppo_rows],
        conclusions=conclude(ppo_rows, best_score=best_rows[-1]["score"]),
        figure=draw_frontier(_points(ppo_rows), _points(best_rows)),
        notes=NOTES,
    )


def best_of_n_scores(base: Evaluation, n: int) -> list[float]:
    """Return per held-out prompt the expected highest score of n."""
    return [best_of_n_mean([response.score for response in group], n) for group in base.groups]


def best_of_n_row(base: Evaluation, n: int) -> dict[str, Any]:
    """Return the figures of best-of-n; those of its texts are not estimated."""
    scores = best_of_n_scores(base, n)
    return {
        **dict.fromkeys(column.key for column in COLUMNS),
        "policy": f"best of {n}",
        "kl_per_64_tokens": best_of_n_kl(n) * REFERENCE_TOKENS / base.length_mean,
        "score": statistics.fmean(scores),
        "score_error": standard_error(scores),
    }


def ppo_row(result: RunResult, base: Evaluation, best: Sequence[float]) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        result: The run.
        base: The starting policy.
        best: Per held-out prompt the expected score of the largest best-of-n.
    """
    after, before = result.evaluation, base.first(RUN_RESPONSES)
    distinct_before, distinct_after = equal_distinct_2(before.token_ids, after.token_ids)
    means = [statistics.fmean(response.score for response in group) for group in after.groups]
    over = [mean - level for mean, level in zip(means, best, strict=True)]
    return {
        "policy": f"PPO, kl_coef {result.config['ppo']['kl_coef']:g}",
        "seed": result.seed,
        "kl_per_64_tokens": after.kl_per_64_tokens,
        "score": after.score_mean,
        "score_error": after.score_error,
        "over_best": statistics.fmean(over),
        "over_best_error": standard_error(over),
        "length": after.length_mean,
        "distinct_before": distinct_before,
        "distinct_after": distinct_after,
        "repetition_before": repetition_rate(before.token_ids),
        "repetition_after": repetition_rate(after.token_ids),
    }


def conclude(rows: Sequence[Mapping[str, Any]], *, best_score: float) -> list[str]:
    """Return whether and where PPO reaches the score of the largest best-of-n."""
    within = [row for row in rows if row["score"] >= best_score and row["kl_per_64_tokens"] <= MAX_KL]
    name = f"best-of-{BEST_OF[-1]}'s mean score of {best_score:+.2f}"
    if not within:
        return [f"PPO does NOT reach {name} within {MAX_KL:g} nats per 64 tokens."]
    nearest = min(within, key=lambda row: float(row["kl_per_64_tokens"]))
    kl = crossing([(row["kl_per_64_tokens"], row["score"]) for row in rows], best_score)
    return [
        f"PPO reaches {name} within {MAX_KL:g} nats per 64 tokens: {nearest['policy']} has {nearest['score']:+.2f} at"
        f" {nearest['kl_per_64_tokens']:.2f} nats, distinct-2 {nearest['distinct_before']:.3f} ->"
        f" {nearest['distinct_after']:.3f}, repetition {nearest['repetition_before']:.3f} ->"
        f" {nearest['repetition_after']:.3f}.",
        f"On a line through its points PPO has that score from {kl:.1f} nats on.",
    ]


def _points(rows: Sequence[Mapping[str, Any]]) -> list[FrontierPoint]:
    return [
        (row["kl_per_64_tokens"], row["score"], row["score_error"], row["policy"].removeprefix("PPO, ")) for row in rows
    ]
