"""The load generator against services on a loopback port: real ones, and one that stalls, refuses or counts."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.rpc.scripted_server import serving as scripted
from tests.rpc.serving import LOCAL, run, serving
from tether.errors import ResourceExhaustedError, UnauthenticatedError, UnavailableError, UnimplementedError
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.bench.checking import FAKE_MODEL_SHA256
from tether_services.bench.plan import CallerPlan, ItemPlan, LoadPlan
from tether_services.bench.report import CallerReport, LoadReport
from tether_services.bench.run import Progress, run_load
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines import fake
from tether_services.reward.engines.fake import fake_score
from tether_services.reward.service import RewardService

pytestmark = pytest.mark.alone  # what is measured are times


Script = Callable[[int, "Scripted", Any], Awaitable[None]]


class Scripted(reward_pb2_grpc.RewardServiceServicer):
    """Scores like the fake engine, after what the script does with the number of the call."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.num_calls = self.num_in_flight = self.most_in_flight = 0
        self.requests: list[bytes] = []
        self.tokens: Counter[str] = Counter()

    async def ListRewardModels(self, request: Any, context: Any) -> reward_pb2.ListRewardModelsResponse:
        model = reward_pb2.RewardModel(
            name="default", version="1", engine="fake", model_sha256=FAKE_MODEL_SHA256, max_items=64, default_model=True
        )
        return reward_pb2.ListRewardModelsResponse(models=[model])

    async def Compare(self, request: Any, context: Any) -> reward_pb2.CompareResponse:
        raise UnimplementedError("Compare is not scripted")

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        number, self.num_calls = self.num_calls, self.num_calls + 1
        self.requests.append(request.SerializeToString(deterministic=True))
        self.tokens[dict(context.invocation_metadata()).get("authorization", "")] += 1
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        try:
            await self.script(number, self, context)
        finally:
            self.num_in_flight -= 1
        scores = []
        for item in request.items:
            raw = fake_score(item.prompt_token_ids, item.response_token_ids)
            part = reward_pb2.ScoreComponent(name="score", value=raw, weight=1)
            scores.append(reward_pb2.ItemScore(score=raw, raw_score=raw, components=[part], token_count=5))
        return reward_pb2.ScoreResponse(scores=scores, model="default", version="1")


async def at_once(number: int, servicer: Scripted, context: Any) -> None:
    """Answer at once."""


def load_script(script: Script, *callers: CallerPlan, **plan: Any) -> tuple[LoadReport, Scripted]:
    """Return the report of a load on a scripted service, and the service."""
    servicer = Scripted(script)

    async def main() -> LoadReport:
        async with scripted(lambda s: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, s)) as target:
            return await run_load(LoadPlan(target, callers, **plan))

    report = run(main())
    check_conservation(report)
    return report, servicer


def load_service(settings: dict[str, Any], *callers: CallerPlan, **plan: Any) -> LoadReport:
    """Return the report of a load on a reward service."""
    resolved = RewardSettings.model_validate(LOCAL | {"admin_address": "127.0.0.1:0"} | settings)

    async def main() -> LoadReport:
        async with serving(resolved, lambda registry: RewardService(resolved, registry)) as served:
            return await run_load(LoadPlan(served.target, callers, **plan))

    report = run(main())
    check_conservation(report)
    return report


def check_conservation(report: LoadReport) -> None:
    """Fail if a call is counted twice or not at all."""
    for caller in (report.total, *report.callers):
        assert caller.num_offered == caller.num_sent + caller.num_unsent
        ended = caller.num_ok + caller.num_wrong + caller.num_rejected + caller.num_unfinished
        assert caller.num_sent == ended
        assert caller.num_rejected == sum(rejection.count for rejection in caller.rejections)
    for field in dataclasses.fields(CallerReport):
        if field.name.startswith("num_"):
            assert getattr(report.total, field.name) == sum(getattr(c, field.name) for c in report.callers)
    assert sum(row.num_ok for row in report.course) == report.total.num_ok + report.total.num_wrong


def test_one_stall_of_a_second_shows_in_latencies_since_due_and_not_in_times_since_sent() -> None:
    async def stall_once(number: int, servicer: Scripted, context: Any) -> None:
        if number == 100:
            await asyncio.sleep(1.0)

    report, _ = load_script(stall_once, CallerPlan("a", 150), duration_seconds=2.0, concurrency=1)
    latency, service = report.total.ok_latency, report.total.ok_service_time
    assert latency and service and latency.count == service.count == 300
    assert latency.p99_seconds > 0.8  # of every hundred calls many were due during the stall
    assert service.p99_seconds < 0.4  # the control: one call took long, and those held up behind it hide their wait
    assert service.max_seconds > 0.95
    assert report.total.num_delayed > 100
    assert any("waited for one of 1 places" in warning for warning in report.warnings)


def test_slow_answers_move_no_arrival_and_change_no_item() -> None:
    async def slowly(number: int, servicer: Scripted, context: Any) -> None:
        await asyncio.sleep(0.4)

    quick, at_once_service = load_script(at_once, CallerPlan("a", 100), duration_seconds=0.5)
    slow, slow_service = load_script(slowly, CallerPlan("a", 100), duration_seconds=0.5)
    assert quick.total.num_offered == slow.total.num_offered == 50
    assert sorted(at_once_service.requests) == sorted(slow_service.requests)
    assert slow_service.most_in_flight > 20  # a caller that waits for answers would have one


def test_poisson_arrivals_of_two_callers_are_sent_as_planned() -> None:
    callers = (CallerPlan("a", 100), CallerPlan("b", 200))
    first, _ = load_script(at_once, *callers, duration_seconds=0.5, arrivals="poisson", seed=3)
    again, _ = load_script(at_once, *callers, duration_seconds=0.5, arrivals="poisson", seed=3)
    offered = [[caller.num_offered for caller in report.callers] for report in (first, again)]
    assert offered[0] == offered[1] != [50, 100]


def test_no_more_calls_are_in_flight_than_allowed_and_those_that_wait_are_told() -> None:
    async def briefly(number: int, servicer: Scripted, context: Any) -> None:
        await asyncio.sleep(0.05)

    report, servicer = load_script(briefly, CallerPlan("a", 100), duration_seconds=0.5, concurrency=3)
    assert servicer.most_in_flight == 3
    assert report.total.num_ok == 50 and report.total.num_delayed >= 40
    closed, servicer = load_script(briefly, CallerPlan("a", 0), duration_seconds=0.3, concurrency=4)
    assert servicer.most_in_flight == 4
    assert closed.total.loop == "closed" and closed.generator.lag is None
    assert any("closed loop" in warning for warning in closed.warnings)


def test_calls_that_find_no_place_before_the_end_are_counted_as_unsent() -> None:
    async def slowly(number: int, servicer: Scripted, context: Any) -> None:
        await asyncio.sleep(0.5)

    report, servicer = load_script(
        slowly, CallerPlan("a", 50), duration_seconds=0.4, concurrency=2, deadline_seconds=0.7
    )
    assert report.total.num_unsent == 20 - servicer.num_calls > 10
    assert any("never sent" in warning for warning in report.warnings)


def test_rejections_are_counted_by_code_and_reason_with_latencies_of_their_own() -> None:
    async def refuse(number: int, servicer: Scripted, context: Any) -> None:
        if number % 4 == 1:
            raise ResourceExhaustedError("full", retry_after_seconds=1.0)
        if number % 4 == 2:
            raise UnavailableError("draining", reason="DRAINING")
        await asyncio.sleep(0.05)

    report, _ = load_script(refuse, CallerPlan("a", 100), duration_seconds=0.4)
    kinds = {(rejection.code, rejection.reason): rejection.count for rejection in report.total.rejections}
    assert kinds == {("RESOURCE_EXHAUSTED", "QUEUE_FULL"): 10, ("UNAVAILABLE", "DRAINING"): 10}
    assert report.total.num_ok == 20 and report.passed
    answered, refused = report.total.ok_latency, report.total.rejected_latency
    assert answered and refused and refused.p50_seconds < 0.05 < answered.p50_seconds


def test_a_deadline_that_passes_is_a_rejection() -> None:
    async def never(number: int, servicer: Scripted, context: Any) -> None:
        await asyncio.sleep(60)

    report, _ = load_script(never, CallerPlan("a", 20), duration_seconds=0.2, deadline_seconds=0.3)
    assert [rejection.code for rejection in report.total.rejections] == ["DEADLINE_EXCEEDED"]
    assert not report.passed


def test_every_caller_sends_its_own_token_and_has_its_own_share() -> None:
    async def know(number: int, servicer: Scripted, context: Any) -> None:
        if dict(context.invocation_metadata()).get("authorization") == "Bearer wrong":
            raise UnauthenticatedError("unknown token")

    callers = (CallerPlan("a", 60, "right"), CallerPlan("b", 20), CallerPlan("c", 40, "wrong"))
    report, servicer = load_script(know, *callers, duration_seconds=0.5)
    assert servicer.tokens == {"Bearer right": 30, "": 10, "Bearer wrong": 20}
    assert [caller.share for caller in report.callers] == [0.75, 0.25, 0.0]
    assert [caller.num_rejected for caller in report.callers] == [0, 0, 20]


def test_a_closed_loop_stops_at_the_cap() -> None:
    report, servicer = load_script(at_once, CallerPlan("a", 0), duration_seconds=30, concurrency=4, max_calls=100)
    assert servicer.num_calls == report.total.num_ok == 100
    assert report.capped and report.elapsed_seconds < 20


def test_a_load_that_is_stopped_reports_what_was() -> None:
    async def hang_later(number: int, servicer: Scripted, context: Any) -> None:
        if number >= 20:
            await asyncio.sleep(60)

    servicer, stop = Scripted(hang_later), asyncio.Event()

    def watch(progress: Progress) -> None:
        if progress.num_ok == 20 and progress.num_in_flight >= 5:
            stop.set()

    async def main() -> LoadReport:
        async with scripted(lambda s: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, s)) as target:
            plan = LoadPlan(target, (CallerPlan("a", 50), CallerPlan("b", 0)), 60, concurrency=10)
            return await run_load(plan, on_progress=watch, stop=stop)

    report = run(main())
    check_conservation(report)
    assert report.interrupted and report.elapsed_seconds < 30
    assert report.total.num_ok == 20 and report.total.num_unfinished >= 5


def test_a_generator_that_is_held_up_itself_says_so() -> None:
    async def main() -> LoadReport:
        servicer = Scripted(at_once)
        async with scripted(lambda s: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, s)) as target:
            plan = LoadPlan(target, (CallerPlan("a", 100),), 0.8)
            return await run_load(plan, on_progress=lambda progress: time.sleep(0.1))  # blocks the event loop

    report = run(main())
    assert report.generator.lag and report.generator.lag.p99_seconds > 0.05
    assert any("this generator was late itself" in warning for warning in report.warnings)


@pytest.mark.parametrize("form", ["tokens", "text"])
def test_every_answer_of_the_fake_engine_is_checked_by_the_oracle(form: Any) -> None:
    items = ItemPlan(per_call=3, form=form)
    report = load_service({"engine": "fake"}, CallerPlan("a", 60), duration_seconds=0.5, items=items)
    assert report.passed and report.total.num_ok == 30
    assert report.checks.num_by_oracle == 90 and report.checks.num_unforeseen == 0
    assert (report.model, report.engine) == ("default", "fake")
    assert report.total.item_goodput == pytest.approx(3 * report.total.goodput)
    assert report.total.token_goodput >= 32 * report.total.item_goodput


def test_a_fake_engine_with_a_salt_has_no_oracle_and_is_not_called_wrong() -> None:
    component = {"engine": "fake", "name": "score", "salt": "s"}
    report = load_service(
        {"models": [{"name": "other", "components": [component]}]},
        CallerPlan("a", 60),
        duration_seconds=0.3,
        items=ItemPlan(repeat_share=0.5),
    )
    assert report.passed and report.total.num_wrong == 0
    assert report.checks.num_by_oracle == 0 < report.checks.num_by_repeat


def test_a_scorer_that_is_wrong_once_in_twenty_items_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotaged(prompt: Any, response: Any, *, salt: str) -> float:
        return fake_score(prompt, response, salt=salt) + (1e-3 if sum(response) % 20 == 0 else 0.0)

    monkeypatch.setattr(fake, "fake_score", sabotaged)
    report = load_service({"engine": "fake"}, CallerPlan("a", 300), duration_seconds=1.0)
    assert 0 < report.total.num_wrong < 60 and report.total.num_ok > 200
    assert not report.passed
    assert "oracle" in report.checks.examples[0]


def test_an_item_of_an_ok_call_that_was_refused_counts_the_call_as_rejected() -> None:
    items = ItemPlan(min_tokens=2000, max_tokens=6000)
    report = load_service({"engine": "fake"}, CallerPlan("a", 40), duration_seconds=0.5, items=items)
    assert {r.reason for r in report.total.rejections} == {"TOO_LONG"}
    assert report.total.num_wrong == 0 and report.total.num_rejected > 5
    assert any("the model reads 2048" in warning for warning in report.warnings)


def rules(function: str) -> dict[str, Any]:
    component = {"name": "r", "engine": "rules", "function": f"tests.rpc.bench_rules:{function}"}
    return {"models": [{"name": "rules", "components": [component]}]}


@pytest.mark.parametrize(("function", "is_right"), [("length", True), ("drift", False)])
def test_without_an_oracle_repeats_tell_whether_scores_are_steady(function: str, is_right: bool) -> None:
    items = ItemPlan(repeat_share=0.5, form="text")
    report = load_service(rules(function), CallerPlan("a", 60), duration_seconds=0.5, items=items)
    assert report.checks.num_by_repeat > 5
    assert report.passed is is_right and (report.total.num_wrong > 0) is not is_right


def test_without_an_oracle_and_repeats_it_is_said_that_little_was_checked() -> None:
    report = load_service(rules("drift"), CallerPlan("a", 40), duration_seconds=0.3, items=ItemPlan(form="text"))
    assert report.passed and report.checks.num_unforeseen == 12
    assert any("only seen to be finite" in warning for warning in report.warnings)


def test_a_service_that_is_not_there_is_an_error_and_no_report() -> None:
    with pytest.raises(UnavailableError):
        run(run_load(LoadPlan("127.0.0.1:1", (CallerPlan("a", 10),), 1)))
