"""Carries a load out: sends what is due when it is due, and notes what becomes of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tether.errors import TetherError
from tether.v1 import reward_pb2
from tether_services.bench.calls import ScoreCalls, ask_for_models, choose_model, credentials_of, write_request
from tether_services.bench.checking import AnswerChecker
from tether_services.bench.findings import Outcome, build_report
from tether_services.bench.items import ItemSource
from tether_services.bench.plan import BenchItem, LoadPlan, check_plan
from tether_services.bench.report import LoadReport
from tether_services.bench.schedule import arrival_offsets
from tether_services.bench.statistics import Course, Tally, Times

PROGRESS_SECONDS: Final = 0.5
"""Between two reports of progress."""
UNBROKEN_ARRIVALS: Final = 100
"""Arrivals that are late already and sent in one go, before answers are read again."""

clock = time.perf_counter


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is."""

    elapsed_seconds: float
    """Since its start."""
    num_offered: int
    """Calls that were due."""
    num_ok: int
    """Answered."""
    num_rejected: int
    """Failed."""
    num_wrong: int
    """Answered wrongly."""
    num_in_flight: int
    """Sent and without an answer yet."""
    num_waiting: int
    """Due, and waiting to be sent."""


async def run_load(
    plan: LoadPlan, *, on_progress: Callable[[Progress], None] | None = None, stop: asyncio.Event | None = None
) -> LoadReport:
    """Return what a load showed, when it is over.

    Args:
        plan: What to send, and to whom.
        on_progress: Called twice a second, on the event loop.
        stop: Ends the load early when it is set; calls in flight are cut off, and the report is of what was.

    Raises:
        InvalidArgumentError: The plan cannot be carried out; every bad field is named.
        TetherError: The service cannot be reached before anything is sent.
    """
    check_plan(plan)
    shown = [credentials_of(caller, plan) for caller in plan.callers]
    calls = [ScoreCalls(plan.target, credentials=credentials) for credentials in shown]
    try:
        models = await ask_for_models(calls, timeout_seconds=plan.deadline_seconds)
        load = _Load(plan, calls, models)
        await load.run(on_progress or (lambda progress: None), stop or asyncio.Event())
        return load.report()
    finally:
        await asyncio.gather(*(call.close() for call in calls))


class _Load:
    """The callers and what they share."""

    def __init__(self, plan: LoadPlan, calls: Sequence[ScoreCalls], models: Sequence[reward_pb2.RewardModel]) -> None:
        self.plan = plan
        self.checker = AnswerChecker(models)
        self.course = Course(plan.duration_seconds)
        self.model = choose_model(models, plan)
        self.start = clock()
        self.num_left = plan.max_calls
        self.is_capped = False
        self.is_interrupted = False
        self._callers = [_CallerLoad(self, index, call) for index, call in enumerate(calls)]
        self._elapsed_seconds = self._cpu_seconds = 0.0

    async def run(self, on_progress: Callable[[Progress], None], stop: asyncio.Event) -> None:
        """Return when every call is over, or soon after `stop` is set."""
        cpu, self.start = time.process_time(), clock()
        working = asyncio.gather(*(caller.run() for caller in self._callers))
        stopping = asyncio.create_task(stop.wait())
        telling = asyncio.create_task(self._tell(on_progress))
        try:
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            self.is_interrupted = not working.done()
        finally:
            for task in (working, stopping, telling):
                task.cancel()
            ended, *_ = await asyncio.gather(working, stopping, telling, return_exceptions=True)
        self._elapsed_seconds, self._cpu_seconds = clock() - self.start, time.process_time() - cpu
        if isinstance(ended, Exception):
            raise ended

    def take_call(self) -> bool:
        """Return whether one more call may be offered, and count it."""
        if self.num_left == 0:
            self.is_capped = True
            return False
        self.num_left -= 1
        return True

    def report(self) -> LoadReport:
        """Return what the load showed."""
        outcome = Outcome(
            model=self.model,
            elapsed_seconds=self._elapsed_seconds,
            cpu_seconds=self._cpu_seconds,
            interrupted=self.is_interrupted,
            capped=self.is_capped,
            num_repeated_items=sum(caller.items.num_repeats for caller in self._callers),
        )
        tallies = [caller.tally for caller in self._callers]
        return build_report(self.plan, tallies, course=self.course, checker=self.checker, outcome=outcome)

    async def _tell(self, on_progress: Callable[[Progress], None]) -> None:
        while True:
            tallies = [caller.tally for caller in self._callers]
            on_progress(
                Progress(
                    elapsed_seconds=clock() - self.start,
                    num_offered=sum(tally.num_offered for tally in tallies),
                    num_ok=sum(tally.num_ok for tally in tallies),
                    num_rejected=sum(tally.num_rejected for tally in tallies),
                    num_wrong=sum(tally.num_wrong for tally in tallies),
                    num_in_flight=sum(caller.num_in_flight for caller in self._callers),
                    num_waiting=sum(len(caller.waiting) for caller in self._callers),
                )
            )
            await asyncio.sleep(PROGRESS_SECONDS)


class _CallerLoad:
    """One caller at work."""

    def __init__(self, load: _Load, index: int, calls: ScoreCalls) -> None:
        plan = load.plan
        self.tally = Tally()
        self.num_in_flight = 0
        self.waiting: deque[float] = deque()
        """When the calls were due that wait for a place, the oldest first."""
        self._load = load
        self._plan = plan
        self._index = index
        self._calls = calls
        self._caller = plan.callers[index]
        vocab_size = load.model.vocab_size if load.model else 0
        seed = f"{plan.seed} items {index}"
        self.items = ItemSource(plan.items, seed=seed, caller=index, vocab_size=vocab_size)

    async def run(self) -> None:
        """Return when every call of this caller is over."""
        async with asyncio.TaskGroup() as group:
            if self._caller.rate:
                await self._pace(group)
                return
            for _ in range(self._plan.concurrency):
                group.create_task(self._repeat())

    async def _pace(self, group: asyncio.TaskGroup) -> None:
        """Offer every call when it is due, whatever the ones before are doing."""
        plan = self._plan
        offsets = arrival_offsets(
            self._caller.rate,
            duration_seconds=plan.duration_seconds,
            arrivals=plan.arrivals,
            seed=f"{plan.seed} arrivals {self._index}",
            phase=self._index / len(plan.callers),
        )
        num_late = 0
        for offset in offsets:
            due = self._load.start + offset
            early = due - clock()
            num_late = 0 if early > 0 else num_late + 1
            if early > 0 or num_late % UNBROKEN_ARRIVALS == 0:
                await asyncio.sleep(max(early, 0.0))
            if not self._load.take_call():
                return
            self.tally.num_offered += 1
            if self.num_in_flight < plan.concurrency:
                self.num_in_flight += 1
                group.create_task(self._work(due))
            else:
                self.waiting.append(due)

    async def _work(self, due: float) -> None:
        """Send a call that is due, then those that wait, as long as there are any."""
        give_up = self._load.start + self._plan.duration_seconds + self._plan.deadline_seconds
        was_delayed = False
        try:
            while True:
                await self._call(due, was_delayed=was_delayed)
                if not self.waiting or clock() > give_up:
                    return
                due, was_delayed = self.waiting.popleft(), True
        finally:
            self.num_in_flight -= 1

    async def _repeat(self) -> None:
        """Call, and call again as soon as there is an answer, until the duration is over."""
        end = self._load.start + self._plan.duration_seconds
        while clock() < end and self._load.take_call():
            self.tally.num_offered += 1
            self.num_in_flight += 1
            try:
                await self._call(None, was_delayed=False)
            finally:
                self.num_in_flight -= 1

    async def _call(self, due: float | None, *, was_delayed: bool) -> None:
        """Send one call and note what becomes of it; `due` is None in a closed loop."""
        items = self.items.next_call()
        request = write_request(items, self._plan)
        sent = clock()
        self.tally.num_sent += 1
        if was_delayed:
            self.tally.num_delayed += 1
        elif due is not None:
            self.tally.lag.record(sent - due)
        due = sent if due is None else due
        try:
            response = await self._calls.score(request, timeout_seconds=self._plan.deadline_seconds)
        except TetherError as error:
            self._note_rejection(Times(due, sent, clock()), error.code.name, error.reason)
        except asyncio.CancelledError:
            self.tally.num_unfinished += 1
            raise
        else:
            self._note_answer(Times(due, sent, clock()), items, response)

    def _note_answer(self, times: Times, items: Sequence[BenchItem], response: reward_pb2.ScoreResponse) -> None:
        verdict = self._load.checker.check(items, response)
        if verdict.refusal is not None:
            self._note_rejection(times, *verdict.refusal)
            return
        tokens = sum(score.token_count for score in response.scores)
        self.tally.count_answer(times, num_items=len(items), num_tokens=tokens, wrong=bool(verdict.wrong))
        self._load.course.record(times.done - self._load.start, latency=times.done - times.due)

    def _note_rejection(self, times: Times, code: str, reason: str) -> None:
        self.tally.count_rejection(times, code=code, reason=reason)
        self._load.course.record(times.done - self._load.start, latency=None)
