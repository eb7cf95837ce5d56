"""Does every method learn, on every seed, at the KL that it was told?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.learning_parts.evaluation import Evaluation
from benchmarks.learning_parts.measures import equal_distinct_2, repetition_rate
from benchmarks.learning_parts.plots import draw_methods
from benchmarks.learning_parts.runs import RUN_RESPONSES, Job, Options, RunResult, run_jobs
from benchmarks.learning_parts.tables import Column, Study

__all__ = ["METHODS", "is_collapsed", "late_kl", "run_methods"]

METHODS: Final[Mapping[str, tuple[str, ...]]] = {
    "ppo": (),
    "grpo": ("ppo.advantage=grpo",),
    "rloo": ("ppo.advantage=rloo",),
}
"""Settings of each method over demo.toml."""
TOLERANCE: Final = 0.25
"""Share by which the KL may miss its target."""
MIN_GAIN_IN_SD: Final = 1.0
MIN_DISTINCT_SHARE: Final = 0.5
"""A policy whose distinct-2 falls below this share of the start's has collapsed."""

COLUMNS: Final = (
    Column("method", "method"),
    Column("seed", "seed"),
    Column("score before", "score_before", "{:+.2f}"),
    Column("after", "score_after", "{:+.2f}"),
    Column("gain in SD", "gain_in_sd", "{:+.2f}"),
    Column("KL, last quarter", "kl_late", "{:.2f}"),
    Column("over target", "kl_over_target", "{:.2f}"),
    Column("last kl_coef", "kl_coef", "{:.3f}"),
    Column("held-out KL per 64 tokens", "kl_per_64_tokens", "{:.2f}"),
    Column("distinct-2 before", "distinct_before", "{:.3f}"),
    Column("after", "distinct_after", "{:.3f}"),
    Column("repetition before", "repetition_before", "{:.3f}"),
    Column("after", "repetition_after", "{:.3f}"),
    Column("collapsed", "collapsed"),
    Column("seconds", "seconds", "{:.0f}"),
)
NOTES: Final = (
    f"Scores: {RUN_RESPONSES} responses to each held-out prompt. SD: of the scores of single responses before."
    " KL, last quarter: nats per response, k1, mean over the last quarter of the steps."
    f" Distinct-2: over equally many pairs of tokens before and after. Collapsed: a gain below {MIN_GAIN_IN_SD:g} SD,"
    f" or distinct-2 below {MIN_DISTINCT_SHARE:g} of before.",
)


async def run_methods(options: Options, *, kl_target: float, kl_horizon: float, kl_coef: float) -> Study:
    """Return the study of PPO, GRPO and RLOO over all seeds with the adaptive controller.

    Args:
        options: Seeds, steps and place.
        kl_target: Nats per response.
        kl_horizon: Responses; beta moves by at most 0.2 times the responses of a step over this, per step.
        kl_coef: The first beta. It falls while the policy is still near the start; the higher it begins, the less the
            KL overshoots.
    """
    control = (f"ppo.kl_target={kl_target}", f"ppo.kl_horizon={kl_horizon}", f"ppo.kl_coef={kl_coef}")
    jobs = [Job(label, seed, (*settings, *control)) for label, settings in METHODS.items() for seed in options.seeds]
    base, results = await run_jobs(jobs, options)
    before = base.first(RUN_RESPONSES)
    rows = [method_row(result, before, kl_target=kl_target) for result in results]
    curves = {label: [result for result in results if result.label == label] for label in METHODS}
    return Study(
        name="methods",
        title=f"PPO, GRPO and RLOO over {len(options.seeds)} seeds, KL target {kl_target:g} nats per response",
        columns=COLUMNS,
        rows=rows,
        conclusions=[conclude(label, [row for row in rows if row["method"] == label]) for label in METHODS],
        figure=draw_methods(curves, kl_target=kl_target, tolerance=TOLERANCE),
        notes=NOTES,
    )


def method_row(result: RunResult, before: Evaluation, *, kl_target: float) -> dict[str, Any]:
    """Return the figures of a run."""
    after = result.evaluation
    distinct_before, distinct_after = equal_distinct_2(before.token_ids, after.token_ids)
    kl = late_kl(result.curve("kl_per_sequence"))
    gain = (after.score_mean - before.score_mean) / before.score_std
    return {
        "method": result.label,
        "seed": result.seed,
        "score_before": before.score_mean,
        "score_after": after.score_mean,
        "gain_in_sd": gain,
        "kl_late": kl,
        "kl_over_target": kl / kl_target,
        "kl_coef": result.curve("kl_coef")[-1],
        "kl_per_64_tokens": after.kl_per_64_tokens,
        "distinct_before": distinct_before,
        "distinct_after": distinct_after,
        "repetition_before": repetition_rate(before.token_ids),
        "repetition_after": repetition_rate(after.token_ids),
        "collapsed": is_collapsed(gain, distinct_before, distinct_after),
        "seconds": result.wall_seconds,
    }


def late_kl(curve: Sequence[float]) -> float:
    """Return the mean over the last quarter of the steps, at least one."""
    return statistics.fmean(curve[-math.ceil(len(curve) / 4) :])


def is_collapsed(gain_in_sd: float, distinct_before: float, distinct_after: float) -> bool:
    """Return whether a run learned too little or gave up its variety for it."""
    return gain_in_sd < MIN_GAIN_IN_SD or distinct_after < MIN_DISTINCT_SHARE * distinct_before


def conclude(label: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what the seeds of a method have in common."""
    ratios = [row["kl_over_target"] for row in rows]
    at_target = sum(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
    gains = [row["gain_in_sd"] for row in rows]
    return (
        f"{label}: gain {statistics.fmean(gains):+.2f} SD on average, {min(gains):+.2f} at worst; KL {min(ratios):.2f}"
        f" to {max(ratios):.2f} of its target, within {TOLERANCE:.0%} on {at_target} of {len(rows)} seeds;"
        f" {sum(row['collapsed'] for row in rows)} of {len(rows)} collapsed"
    )
