"""Turns counts into the report, with what must be known before its figures are believed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tether.v1 import reward_pb2
from tether_services.bench.checking import AnswerChecker
from tether_services.bench.plan import CallerPlan, LoadPlan
from tether_services.bench.report import CallerReport, CheckReport, GeneratorReport, LoadReport
from tether_services.bench.statistics import Course, Tally, merged

LAG_SECONDS: Final = 0.005
"""A 99th percentile of the lag above this is worth a warning."""
CPU_SHARE: Final = 0.9
"""Likewise, of one processor."""
TOTAL: Final = "total"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a load ended, beside what was counted."""

    model: reward_pb2.RewardModel | None
    """The model as listed; None if it was not."""
    elapsed_seconds: float
    """From the first arrival to the end of the last call."""
    cpu_seconds: float
    """Processor time of this process meanwhile."""
    interrupted: bool
    """Whether the user ended it."""
    capped: bool
    """Whether `max_calls` ended it."""
    num_repeated_items: int
    """Items sent more than once."""


def build_report(
    plan: LoadPlan, tallies: Sequence[Tally], *, course: Course, checker: AnswerChecker, outcome: Outcome
) -> LoadReport:
    """Return the report of a load from the tallies of its callers, in their order."""
    whole = Tally()
    for tally in tallies:
        whole.merge(tally)
    seconds = max(outcome.elapsed_seconds, 1e-9)
    if not outcome.interrupted and not outcome.capped:
        seconds = max(seconds, plan.duration_seconds)  # the last call may be over before it
    lag = merged(tally.lag for tally in tallies).summary()
    everyone = CallerPlan(TOTAL, sum(caller.rate for caller in plan.callers))
    generator = GeneratorReport(
        lag=lag,
        cpu_share=outcome.cpu_seconds / max(outcome.elapsed_seconds, 1e-9),
        num_repeated_items=outcome.num_repeated_items,
    )
    total = report_caller(everyone, whole, seconds=seconds, num_ok=whole.num_ok)
    if len({bool(caller.rate) for caller in plan.callers}) > 1:
        total = replace(total, loop="mixed")
    checks = CheckReport(checker.num_by_oracle, checker.num_by_repeat, checker.num_unforeseen, tuple(checker.examples))
    return LoadReport(
        target=plan.target,
        model=outcome.model.name if outcome.model else plan.model,
        engine=outcome.model.engine if outcome.model else "",
        arrivals=plan.arrivals,
        seed=plan.seed,
        concurrency=plan.concurrency,
        duration_seconds=plan.duration_seconds,
        elapsed_seconds=seconds,
        interrupted=outcome.interrupted,
        capped=outcome.capped,
        total=total,
        callers=tuple(
            report_caller(caller, tally, seconds=seconds, num_ok=whole.num_ok)
            for caller, tally in zip(plan.callers, tallies, strict=True)
        ),
        course=course.rows(),
        checks=checks,
        generator=generator,
        warnings=tuple(find_warnings(plan, total, generator, checks, outcome)),
    )


def report_caller(caller: CallerPlan, tally: Tally, *, seconds: float, num_ok: int) -> CallerReport:
    """Return what became of the calls of one caller.

    Args:
        caller: Its plan.
        tally: Its counts.
        seconds: Length of the run.
        num_ok: OK calls of all callers.
    """
    return CallerReport(
        name=caller.name,
        loop="open" if caller.rate else "closed",
        rate=caller.rate,
        num_offered=tally.num_offered,
        num_sent=tally.num_sent,
        num_delayed=tally.num_delayed,
        num_unsent=tally.num_offered - tally.num_sent,
        num_unfinished=tally.num_unfinished,
        num_ok=tally.num_ok,
        num_wrong=tally.num_wrong,
        num_rejected=tally.num_rejected,
        rejections=tally.rejection_list(),
        goodput=tally.num_ok / seconds,
        item_goodput=tally.num_items / seconds,
        token_goodput=tally.num_tokens / seconds,
        share=tally.num_ok / num_ok if num_ok else 0.0,
        ok_latency=tally.ok_latency.summary(),
        ok_service_time=tally.ok_service.summary(),
        rejected_latency=tally.rejected_latency.summary(),
        rejected_service_time=tally.rejected_service.summary(),
    )


def find_warnings(
    plan: LoadPlan, total: CallerReport, generator: GeneratorReport, checks: CheckReport, outcome: Outcome
) -> Iterator[str]:
    """Yield what must be known before the figures are believed, the gravest first."""
    if total.num_wrong:
        yield f"{total.num_wrong} answers were wrong; the first: {checks.examples[0]}"
    if not total.num_ok:
        yield "no call was answered rightly: there is nothing to measure"
    elif total.num_rejected > total.num_ok:
        yield f"{total.num_rejected} of {total.num_sent} calls were rejected: latencies of answers are of the lucky few"
    if outcome.interrupted:
        yield f"interrupted after {outcome.elapsed_seconds:.1f} of {plan.duration_seconds:g} s"
    if outcome.capped:
        yield f"ended after {plan.max_calls} calls, the most that was allowed"
    if total.num_unsent:
        yield f"{total.num_unsent} calls were due and never sent: latencies are better than those of the whole load"
    if total.num_delayed:
        yield (
            f"{total.num_delayed} calls waited for one of {plan.concurrency} places; their wait counts in latencies,"
            " not in service times"
        )
    yield from _find_generator_warnings(generator)
    if any(not caller.rate for caller in plan.callers):
        yield "closed loop: each call waited for the one before, so latencies do not show what calls at a rate wait"
    if checks.num_unforeseen and not checks.num_by_oracle and not checks.num_by_repeat:
        yield "there is no oracle for this model and no item was repeated: scores were only seen to be finite"
    yield from _find_item_warnings(plan, outcome.model)


def _find_generator_warnings(generator: GeneratorReport) -> Iterator[str]:
    if generator.lag is not None and generator.lag.p99_seconds > LAG_SECONDS:
        yield (
            f"this generator was late itself: it sent 1 % of the calls {generator.lag.p99_seconds * 1e3:.1f} ms or more"
            " after they were due, which their latencies count; lower the rate or give it a free processor"
        )
    if generator.cpu_share > CPU_SHARE:
        yield (
            f"this generator used {generator.cpu_share:.0%} of a processor: it, not the service, may be the limit;"
            " run several of them"
        )


def _find_item_warnings(plan: LoadPlan, model: reward_pb2.RewardModel | None) -> Iterator[str]:
    if model is None:
        yield "the service lists no such model, or does not let the callers ask"
        return
    if plan.items.per_call > model.max_items:
        yield f"calls carry {plan.items.per_call} items, the model takes {model.max_items}"
    is_made_of_tokens = not plan.items.given and plan.items.form == "tokens"
    if is_made_of_tokens and 0 < model.max_model_len < plan.items.max_tokens:
        yield f"items have up to {plan.items.max_tokens} tokens, the model reads {model.max_model_len}"
