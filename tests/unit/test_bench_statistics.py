"""Histograms, counts, verdicts and the report made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.bench_inputs import FAKE_MODEL, PLAN, RULES_MODEL, right_score, tokens
from tether.v1 import reward_pb2
from tether_services.bench import report as reporting
from tether_services.bench.checking import AnswerChecker
from tether_services.bench.findings import Outcome, build_report
from tether_services.bench.plan import BenchItem, CallerPlan
from tether_services.bench.report import LatencySummary, LoadReport
from tether_services.bench.statistics import Course, Latencies, Tally, Times, merged

DOCUMENT = Path(__file__).parents[2] / "docs" / "bench.md"


def summary(values: Sequence[float]) -> LatencySummary:
    latencies = Latencies()
    for value in values:
        latencies.record(value)
    made = latencies.summary()
    assert made is not None
    return made


def lognormal(count: int, *, seed: int) -> list[float]:
    values = random.Random(seed)
    return [values.lognormvariate(-5, 1.5) for _ in range(count)]


def test_percentiles_are_those_of_the_sorted_values_within_a_thousandth() -> None:
    values = sorted(lognormal(20_000, seed=1))
    made = summary(values)
    for share, got in ((0.5, made.p50_seconds), (0.95, made.p95_seconds), (0.99, made.p99_seconds)):
        assert got == pytest.approx(values[math.ceil(share * len(values)) - 1], rel=2e-3, abs=2e-6)
    assert made.p999_seconds == pytest.approx(values[19_979], rel=2e-3)
    assert made.max_seconds == pytest.approx(values[-1], rel=1e-3)
    assert made.mean_seconds == pytest.approx(sum(values) / len(values))
    assert made.count == 20_000


def test_merged_histograms_are_the_histogram_of_all_values() -> None:
    values = [lognormal(500, seed=seed) for seed in range(3)]
    parts = []
    for some in values:
        parts.append(Latencies())
        for value in some:
            parts[-1].record(value)
    whole, expected = merged(parts).summary(), summary([value for some in values for value in some])
    assert whole is not None
    assert dataclasses.astuple(whole) == pytest.approx(dataclasses.astuple(expected))


def test_latencies_out_of_range_are_counted_at_its_ends() -> None:
    made = summary([-1.0, 0.0, 1e9])
    assert made.count == 3
    assert made.p50_seconds == pytest.approx(1e-6)
    assert made.max_seconds == pytest.approx(86_400, rel=1e-3)


def test_nothing_counted_has_no_summary() -> None:
    assert Latencies().summary() is None


def test_latency_counts_from_when_a_call_was_due_and_service_time_from_when_it_was_sent() -> None:
    tally = Tally()
    tally.count_answer(Times(due=10.0, sent=10.9, done=11.0), num_items=2, num_tokens=9, wrong=False)
    latency, service = tally.ok_latency.summary(), tally.ok_service.summary()
    assert latency and latency.max_seconds == pytest.approx(1.0, rel=1e-3)
    assert service and service.max_seconds == pytest.approx(0.1, rel=1e-3)


def tally_of(*, ok: int, rejected: int = 0, wrong: int = 0) -> Tally:
    tally = Tally(num_offered=ok + rejected + wrong, num_sent=ok + rejected + wrong)
    for index in range(ok + wrong):
        tally.count_answer(Times(0.0, 0.0, 0.01), num_items=3, num_tokens=12, wrong=index >= ok)
    for index in range(rejected):
        reason = "QUEUE_FULL" if index % 3 else "QUOTA"
        tally.count_rejection(Times(0.0, 0.0, 0.001), code="RESOURCE_EXHAUSTED", reason=reason)
    return tally


OUTCOME = Outcome(
    model=FAKE_MODEL, elapsed_seconds=2.0, cpu_seconds=0.5, interrupted=False, capped=False, num_repeated_items=0
)


def report_of(tallies: Sequence[Tally], *, outcome: Outcome = OUTCOME, rate: float = 10.0) -> LoadReport:
    callers = tuple(CallerPlan(f"c{index}", rate) for index in range(len(tallies)))
    plan = dataclasses.replace(PLAN, callers=callers)
    checker = AnswerChecker([FAKE_MODEL])
    checker.examples.append("example")
    return build_report(plan, tallies, course=Course(2.0), checker=checker, outcome=outcome)


def test_shares_goodputs_and_rejections_are_per_caller_and_add_up() -> None:
    report = report_of([tally_of(ok=30, rejected=4), tally_of(ok=10)])
    assert [caller.share for caller in report.callers] == [0.75, 0.25]
    assert [caller.goodput for caller in report.callers] == [15.0, 5.0]
    assert (report.total.goodput, report.total.item_goodput, report.total.token_goodput) == (20.0, 60.0, 240.0)
    assert [(r.reason, r.count) for r in report.callers[0].rejections] == [("QUEUE_FULL", 2), ("QUOTA", 2)]
    assert report.total.num_rejected == 4 and report.callers[1].rejections == ()
    assert report.total.rejected_latency and report.total.rejected_latency.count == 4
    assert report.generator.cpu_share == 0.25
    assert report.passed and report.warnings == ()


def test_open_and_closed_loops_beside_each_other_are_told_apart() -> None:
    callers = (CallerPlan("open", 10.0), CallerPlan("closed", 0.0))
    plan = dataclasses.replace(PLAN, callers=callers)
    tallies = [tally_of(ok=1), tally_of(ok=1)]
    report = build_report(plan, tallies, course=Course(2.0), checker=AnswerChecker([FAKE_MODEL]), outcome=OUTCOME)
    assert [caller.loop for caller in (*report.callers, report.total)] == ["open", "closed", "mixed"]


def test_a_run_that_ends_before_its_duration_is_not_given_a_higher_rate() -> None:
    early = dataclasses.replace(OUTCOME, elapsed_seconds=1.9)
    assert report_of([tally_of(ok=20)], outcome=early).total.goodput == 10.0
    ended = dataclasses.replace(early, interrupted=True)
    assert report_of([tally_of(ok=20)], outcome=ended).total.goodput == pytest.approx(20 / 1.9)


def test_wrong_answers_and_no_answers_do_not_pass() -> None:
    assert not report_of([tally_of(ok=5, wrong=1)]).passed
    assert not report_of([tally_of(ok=0, rejected=5)]).passed


def test_what_makes_figures_doubtful_is_said() -> None:
    late = tally_of(ok=100)
    for _ in range(100):
        late.lag.record(0.02)
    late.num_delayed, late.num_offered = 3, 105
    outcome = dataclasses.replace(OUTCOME, cpu_seconds=1.9, interrupted=True, model=None)
    said = "\n".join(report_of([late, tally_of(ok=1, wrong=2)], outcome=outcome).warnings)
    for words in ("2 answers were wrong", "interrupted", "5 calls were due and never sent", "3 calls waited",
                  "late itself", "95% of a processor", "no such model"):  # fmt: skip
        assert words in said
    assert "closed loop" in "".join(report_of([tally_of(ok=1)], rate=0.0).warnings)
    assert "8 of 11 calls were rejected" in "".join(report_of([tally_of(ok=3, rejected=8)]).warnings)


def test_the_course_has_a_row_per_interval_with_calls() -> None:
    course = Course(10.0)
    for offset, latency in ((0.1, 0.01), (0.9, 0.03), (3.2, None), (3.5, 0.02)):
        course.record(offset, latency=latency)
    rows = course.rows()
    assert [(row.start_seconds, row.num_ok, row.num_rejected) for row in rows] == [(0.0, 2, 0), (3.0, 1, 1)]
    assert rows[0].ok_latency and rows[0].ok_latency.max_seconds == pytest.approx(0.03, rel=1e-3)
    assert Course(3600.0).interval_seconds == 12.0


def test_the_document_is_json_and_every_field_of_it_is_documented() -> None:
    document = report_of([tally_of(ok=3, rejected=1)]).document()
    assert json.loads(json.dumps(document, allow_nan=False)) == json.loads(json.dumps(document))
    described = DOCUMENT.read_text(encoding="utf-8")
    kinds = [kind for kind in vars(reporting).values() if dataclasses.is_dataclass(kind)]
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)} | set(document)
    assert len(kinds) == 7
    assert sorted(name for name in names if f"`{name}`" not in described) == []


ITEMS = [tokens(3, 4), tokens(5, 6)]


def answer(*scores: reward_pb2.ItemScore, model: str = "default") -> reward_pb2.ScoreResponse:
    return reward_pb2.ScoreResponse(scores=scores, model=model, version="1", model_sha256="s")


def test_right_answers_are_right_whatever_the_weight() -> None:
    checker = AnswerChecker([FAKE_MODEL])
    for weight in (1.0, -0.25):
        assert checker.check(ITEMS, answer(*(right_score(item, weight=weight) for item in ITEMS))).wrong == ""
    assert (checker.num_by_oracle, checker.examples) == (4, [])


def test_text_is_checked_by_the_oracle_too() -> None:
    from tether_services.reward.engines.fake import fake_text_score

    raw = fake_text_score("p", "r")
    checker = AnswerChecker([FAKE_MODEL])
    part = reward_pb2.ScoreComponent(value=raw, weight=1)
    good, bad = (reward_pb2.ItemScore(score=raw, raw_score=raw + off, components=[part]) for off in (0.0, 1e-6))
    assert checker.check([BenchItem("p", "r")], answer(good)).wrong == ""
    assert "oracle" in checker.check([BenchItem("p", "r")], answer(bad)).wrong


def test_swapped_missing_infinite_and_inconsistent_scores_are_wrong() -> None:
    first, second = (right_score(item) for item in ITEMS)
    infinite, odd = right_score(ITEMS[1]), right_score(ITEMS[1])
    infinite.raw_score = math.nan
    odd.score += 0.5
    checker = AnswerChecker([FAKE_MODEL])
    for scores in ((second, first), (first,), (first, infinite), (first, odd)):
        assert checker.check(ITEMS, answer(*scores)).wrong
    assert len(checker.examples) == 4


def test_an_item_that_was_refused_is_no_wrong_answer_but_a_rejection() -> None:
    refused = reward_pb2.ItemScore(error=reward_pb2.ItemError(code=3, reason="TOO_LONG"))
    verdict = AnswerChecker([FAKE_MODEL]).check(ITEMS, answer(right_score(ITEMS[0]), refused))
    assert verdict.refusal == ("INVALID_ARGUMENT", "TOO_LONG") and not verdict.wrong


def test_without_an_oracle_the_same_item_must_get_the_same_score_within_the_tolerance() -> None:
    checker = AnswerChecker([RULES_MODEL])

    def check(score: float, *, sha256: str = "s") -> str:
        response = answer(reward_pb2.ItemScore(score=score), model="rules")
        response.model_sha256 = sha256
        return checker.check([ITEMS[0]], response).wrong

    assert check(0.5) == "" and check(0.5 + 9e-6) == "" and check(0.9, sha256="another model") == ""
    assert "the same item had 0.5 before" in check(0.5 + 2e-5)
    assert (checker.num_by_oracle, checker.num_by_repeat, checker.num_unforeseen) == (0, 2, 2)


def test_the_table_of_remembered_scores_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether_services.bench.checking.REMEMBERED_ITEMS", 10)
    checker = AnswerChecker([RULES_MODEL])
    for index in range(50):
        checker.check([tokens(index)], answer(reward_pb2.ItemScore(score=1.0), model="rules"))
    assert len(checker._remembered) == 10
