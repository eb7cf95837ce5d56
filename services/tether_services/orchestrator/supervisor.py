"""Keeps runs going: starts their workers, watches them, starts them again after a crash, and records how they ended."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

from tether.errors import ResourceExhaustedError, TetherError, UnavailableError
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.engine import RunEngine, WorkerExit
from tether_services.orchestrator.lease import end_holder
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.metrics import OrchestratorMetrics
from tether_services.orchestrator.records import FINAL_STATES, Attempt, RunRecord, RunState
from tether_services.orchestrator.report_writing import complete_report, complete_reports
from tether_services.orchestrator.worker_states import read_breakers, read_lagging
from tether_services.runtime.logging import log_event

__all__ = ["Supervisor", "describe_exit"]

log = logging.getLogger(__name__)

FENCED_EXIT_CODE = 3
"""As in worker.py, which is not imported here: another attempt has taken over."""
ROLLED_BACK_EXIT_CODE = 4
"""As in worker.py: the run is to be rolled back."""
_LOOK_SECONDS = 0.5
"""How often a worker is looked at and committed steps are read for the metrics."""
_LATE_SECONDS = 2 * _LOOK_SECONDS
"""A look that comes later than this follows a time in which this process, and perhaps the machine, stood still."""
_MISSED_LEASES = 3.0
_LAST_PAUSE_SECONDS = 5.0
STOPPED = "the orchestrator was stopped; resume the run to go on"
ORPHANED = "the orchestrator process ended; resume the run to go on"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """How a worker ended."""

    reason: str
    """Why the run has failed, if the worker did not say so itself."""
    crashed: bool = False
    """True if starting another one may help."""
    rolls_back: bool = False
    """True if it made way for a rollback: another one follows, whatever is said of crashes."""
    state: RunState = RunState.FAILED
    """Of the run, unless another worker is started."""


@dataclass(slots=True)
class _Course:
    """Where a run is that is seen to its end."""

    attempt: Attempt
    next_step: int = 0
    """The first one that is not shown as metrics yet."""
    num_rollbacks: int = 0
    """Those that are shown."""
    unaccounted: int = 0
    """Samples of the steps shown."""


@dataclass(slots=True)
class _Watch:
    """What is known of a worker from earlier looks at it, on the monotonic clock."""

    lease_ns: int = 0
    """When the lease of its attempt expires; 0: it has none."""
    renewed_at: float = 0.0
    looked_at: float = 0.0


class Supervisor:
    """The workers of one orchestrator."""

    def __init__(
        self, settings: OrchestratorSettings, engine: RunEngine, metrics: OrchestratorMetrics, ledger: Ledger
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._ledger = ledger
        self._tasks: set[asyncio.Task[Any]] = set()
        self._courses: list[_Course] = []
        """Of the runs that are seen to their end now."""
        self._closing = False

    async def recover(self) -> None:
        """Take care of the run that an earlier orchestrator left unfinished: it goes on, or is FAILED."""
        self.keep(self._persist(partial(asyncio.to_thread, complete_reports, self._ledger)))
        left = await asyncio.to_thread(self._ledger.active_run)
        if left is None and self._settings.auto_resume == "always":
            left = await asyncio.to_thread(self._ledger.interrupted_run)
        if left is None:
            return
        take_up = partial(self._take_up, left)  # whatever is started meanwhile is not touched
        try:
            await take_up()
        except (ResourceExhaustedError, UnavailableError) as error:
            log_event(log, "recovery postponed", level=logging.ERROR, error=str(error))
            self.keep(self._persist(take_up))

    async def close(self) -> None:
        """End the workers; their runs are FAILED and can be resumed."""
        self._closing = True
        await self._engine.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def launch(self, record: Callable[[], Attempt]) -> RunRecord:
        """Record an attempt, start its worker and return the run; not to be cancelled in between."""
        try:
            attempt = await asyncio.to_thread(record)
        except TetherError:
            self.keep(self._persist(self._adopt))
            raise
        try:
            return await asyncio.to_thread(self._ledger.get_run, attempt.run_id)
        finally:  # it is recorded, so that somebody must look after it even if it cannot be read now
            self._begin(attempt)

    def _begin(self, attempt: Attempt) -> None:
        """See a run to its end from an attempt on, unless somebody does so already."""
        if any(c.attempt.run_id == attempt.run_id and c.attempt.epoch >= attempt.epoch for c in self._courses):
            return
        course = _Course(attempt)
        self._courses.append(course)
        self.keep(self._supervise(course))

    async def _adopt(self) -> None:
        """Look after an attempt that was recorded although the disk reported an error: nobody else knows of it."""
        run = await asyncio.to_thread(self._ledger.active_run)
        known = run is None or any(course.attempt.run_id == run.run_id for course in self._courses)
        if run is None or known or self._closing or run.state is not RunState.PENDING:
            return
        self._begin(Attempt(run.run_id, run.epoch, self._ledger.directory(run.run_id)))

    def keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something on its own and hold on to it: the event loop itself does not."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _take_up(self, left: RunRecord) -> None:
        """Go on with a run as an earlier orchestrator left it, or end it; do nothing if it is not so any more."""
        attempt = Attempt(left.run_id, left.epoch, self._ledger.directory(left.run_id))
        if left.state in FINAL_STATES:
            following = await asyncio.to_thread(self._begin_again, left)
        elif self._settings.auto_resume == "off":
            await self._finish(attempt, RunState.FAILED, ORPHANED)
            following = None
        else:
            following = await asyncio.to_thread(self._restart, attempt, "the orchestrator process ended")
        if following is not None:
            self._note_resume(following, "taken up")
            self._begin(following)
        elif left.state not in FINAL_STATES:
            self.keep(self._persist(partial(self._show_ended, left, attempt)))
            self.report(left.run_id)
        await self._adopt()

    def _begin_again(self, stopped: RunRecord) -> Attempt | None:
        """Return another attempt of a run that a stop has ended; None if somebody has resumed it or runs another."""
        now = self._ledger.interrupted_run()
        if now is None or (now.run_id, now.epoch) != (stopped.run_id, stopped.epoch) or self._ledger.active_run():
            return None
        return self._ledger.begin_attempt(stopped.run_id, by_hand=False)

    async def _supervise(self, course: _Course) -> None:
        """See a run to its end, whatever happens on the way, and show its steps as metrics."""
        try:
            await self._persist(partial(self._show_begin, course))
            await self._see_to_end(course)
        except Exception as error:  # a defect, or this process ends: no run may stay active with nobody to end it
            log.error("run given up", exc_info=error)
            await self._give_up(course.attempt, error)
        finally:
            self._courses.remove(course)
        await self._persist(partial(self._show_end, course))
        await self._persist(self._adopt)
        self.report(course.attempt.run_id)

    def report(self, run_id: str) -> None:
        """Have the report of a run that has ended brought up to date; if this process ends, the next one does it."""
        if not self._closing:
            self.keep(self._persist(partial(asyncio.to_thread, complete_report, self._ledger, run_id)))

    async def _give_up(self, attempt: Attempt, error: Exception) -> None:
        reason = STOPPED if self._closing else f"[INTERNAL] {type(error).__name__}: {error}"
        await self._persist(partial(self._finish, attempt, RunState.FAILED, reason, interrupted=self._closing))

    async def _see_to_end(self, course: _Course) -> None:
        """Run a worker, and another one after each that died."""
        crashes = 0
        while True:
            first_step = course.next_step
            end = await self._watch(course)
            following = await self._follow(course.attempt, end)
            if following is None:
                return
            course.attempt = following
            brought_step = course.next_step > first_step
            await self._persist(partial(self._show_rollbacks, course))
            if not end.rolls_back:
                self._note_resume(following, end.reason)
            crashes = 0 if brought_step or end.rolls_back else crashes + 1
            await asyncio.sleep(_pause(crashes))

    async def _show_begin(self, course: _Course) -> None:
        run = await asyncio.to_thread(self._ledger.get_run, course.attempt.run_id)
        course.next_step, course.num_rollbacks = run.num_committed_steps, run.branch
        self._metrics.observe_state(run)

    async def _show_end(self, course: _Course) -> None:
        await self._show_rollbacks(course)
        await self._show_steps(course, pushed_only=False)
        await self._show_state(course.attempt.run_id)

    async def _show_ended(self, left: RunRecord, attempt: Attempt) -> None:
        """Show the end of a run that an earlier process left and that did not go on, unless somebody has resumed it."""
        if (await asyncio.to_thread(self._ledger.get_run, left.run_id)).epoch == left.epoch:
            await self._show_end(_Course(attempt, left.num_committed_steps, left.branch))

    async def _show_rollbacks(self, course: _Course) -> None:
        """Show the rollbacks made since the last time, and from now on the steps that are made again."""
        run_id, before = course.attempt.run_id, course.num_rollbacks
        rollbacks = await asyncio.to_thread(self._ledger.list_rollbacks, run_id)
        self._metrics.observe_rollbacks(run_id, rollbacks, before=before)
        for rollback in rollbacks[before:]:
            log_event(log, "run rolled back", level=logging.WARNING, run_id=run_id, **asdict(rollback))
            course.next_step, course.num_rollbacks = min(course.next_step, rollback.to_step), rollback.branch

    async def _show_state(self, run_id: str) -> None:
        self._metrics.observe_state(await asyncio.to_thread(self._ledger.get_run, run_id))

    def _note_resume(self, attempt: Attempt, reason: str) -> None:
        self._metrics.resumes.inc()
        log_event(log, "run resumed", level=logging.WARNING, run_id=attempt.run_id, epoch=attempt.epoch, reason=reason)

    async def _watch(self, course: _Course) -> _End:
        """Run the worker of an attempt and return how it ended."""
        blocked = await self._persist(partial(asyncio.to_thread, self._end_stale_holder, course.attempt.run_id))
        if blocked is not None:
            return blocked
        worker = asyncio.create_task(self._work(course.attempt))
        try:
            return await self._look_after(worker, course) or worker.result()
        finally:
            worker.cancel()  # it has ended, unless an unforeseen error led here
            await asyncio.wait({worker})
            self._metrics.show_breakers({})
            self._metrics.show_lagging(())

    async def _look_after(self, worker: asyncio.Task[_End], course: _Course) -> _End | None:
        """Look at a worker until it is done; return how it was ended, None if it ended by itself."""
        attempt, started = course.attempt, time.monotonic()
        watch, ended = _Watch(renewed_at=started, looked_at=started), None
        while not worker.done():
            await asyncio.wait({worker}, timeout=_LOOK_SECONDS)
            try:
                await self._show_steps(course, pushed_only=True)
                self._metrics.show_breakers(await asyncio.to_thread(read_breakers, attempt.directory))
                self._metrics.show_lagging(await asyncio.to_thread(read_lagging, attempt.directory))
                ended = ended or await self._end_if_hung(attempt, worker, watch)
            except (TetherError, OSError) as error:  # of the ledger's disk: the worker may still get through
                log_event(log, "run not readable", level=logging.ERROR, run_id=attempt.run_id, error=str(error))
        return ended

    def _end_stale_holder(self, run_id: str) -> _End | None:
        """Kill the worker of an earlier attempt that outlived its orchestrator; say so if it does not end."""
        lease = self._ledger.get_lease(run_id)
        try:
            if lease is not None and end_holder(lease):
                log_event(log, "stale worker ended", level=logging.WARNING, run_id=run_id, holder=lease.holder)
        except (TimeoutError, PermissionError) as error:
            return _End(f"the worker of an earlier attempt is still there: {error}")
        return None

    async def _work(self, attempt: Attempt) -> _End:
        """Run the worker of an attempt and return how it ended."""
        try:
            exit_ = await self._engine.run(attempt)
        except OSError as error:
            return _End(f"the worker could not be started: {error}")
        crashed, rolls_back = exit_.code not in (0, FENCED_EXIT_CODE), exit_.code == ROLLED_BACK_EXIT_CODE
        return _End(describe_exit(exit_), crashed=crashed, rolls_back=rolls_back)

    async def _end_if_hung(self, attempt: Attempt, worker: asyncio.Task[_End], watch: _Watch) -> _End | None:
        """End a worker that does not renew its lease, or never takes one; None if it is well.

        It does not renew the lease if it is stuck, see `Heartbeat`. No other run could start while it is there.
        """
        run = await asyncio.to_thread(self._ledger.get_run, attempt.run_id)
        lease = await asyncio.to_thread(self._ledger.get_lease, attempt.run_id)
        now = time.monotonic()
        expires_ns = lease.expires_ns if lease is not None and lease.epoch == attempt.epoch else 0
        if expires_ns != watch.lease_ns:
            watch.lease_ns, watch.renewed_at = expires_ns, now
        elif now - watch.looked_at > _LOOK_SECONDS + _LATE_SECONDS:  # nobody could have seen or given a sign
            watch.renewed_at = now
        watch.looked_at = now
        silence = self._longest_silence(run, has_lease=bool(expires_ns))
        if now - watch.renewed_at <= silence:
            return None
        if run.cancel_requested:
            end = _End("the worker did not stop after CancelRun and was ended", state=RunState.CANCELLED)
        else:
            reason = f"the worker gave no sign of life for {silence:g} s and was ended; worker.log may say where it was"
            end = _End(reason, crashed=True)
        worker.cancel()
        await asyncio.wait({worker})
        log_event(log, "hung worker ended", level=logging.ERROR, run_id=attempt.run_id, reason=end.reason)
        return end

    def _longest_silence(self, run: RunRecord, *, has_lease: bool) -> float:
        """Return for how many seconds a worker may give no sign: while it is at work, or else begins or ends."""
        if has_lease:
            return _MISSED_LEASES * self._settings.lease_seconds
        limits = [self._settings.hang_seconds or math.inf]
        return min(limits + [self._settings.cancel_seconds] * run.cancel_requested)

    async def _follow(self, attempt: Attempt, end: _End) -> Attempt | None:
        """Return the attempt that follows one whose worker has ended; None if the run has ended or ends now."""
        if self._closing:
            await self._persist(partial(self._finish, attempt, RunState.FAILED, STOPPED, interrupted=True))
            return None
        if not end.rolls_back and (not end.crashed or self._settings.auto_resume == "off"):
            await self._persist(partial(self._finish, attempt, end.state, end.reason))
            return None

        async def restart() -> Attempt | None:
            return await asyncio.to_thread(self._restart, attempt, end.reason)

        return await self._persist(restart)

    def _restart(self, attempt: Attempt, reason: str) -> Attempt | None:
        return self._ledger.restart_attempt(attempt, reason=reason, max_restarts=self._settings.max_restarts)

    async def _finish(self, attempt: Attempt, state: RunState, error: str, *, interrupted: bool = False) -> None:
        finish = partial(self._ledger.finish, attempt, state, error=error, interrupted=interrupted)
        if await asyncio.to_thread(finish):
            log_event(log, f"run {state.value.lower()}", level=logging.ERROR, run_id=attempt.run_id, error=error)

    async def _persist(self, act: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do something to the ledger, again and again while it cannot be used for whatever reason.

        Otherwise a run would stay RUNNING for ever: it could be neither resumed nor replaced by another.
        """
        for number in count():
            try:
                return await act()
            except (TetherError, OSError) as error:
                log_event(log, "ledger not usable", level=logging.ERROR, error=str(error))
                if self._closing:  # the next start takes care of it
                    raise
            await asyncio.sleep(_pause(number))
        raise AssertionError("counted without end")

    async def _show_steps(self, course: _Course, *, pushed_only: bool) -> None:
        """Show the steps committed since the last time as metrics."""
        run_id, first_step = course.attempt.run_id, course.next_step
        read = partial(self._ledger.list_steps, run_id, first_step=first_step, pushed_only=pushed_only)
        for record in await asyncio.to_thread(read):
            self._metrics.observe_step(record)
            course.next_step = record.step + 1
        if course.next_step > first_step:
            count = partial(self._ledger.count_unaccounted, run_id, first_step=first_step, end_step=course.next_step)
            course.unaccounted += await asyncio.to_thread(count)
            self._metrics.show_unaccounted(course.unaccounted)


def _pause(number: int) -> float:
    """Return the seconds before a repeat, counted from 0."""
    return float(min(0.1 * 2 ** min(number, 10), _LAST_PAUSE_SECONDS))


def describe_exit(exit_: WorkerExit) -> str:
    """Return in words how a worker ended that did not say so itself."""
    how = f"was killed by signal {-exit_.code}" if exit_.code < 0 else f"exited with status {exit_.code}"
    return f"the worker {how} without finishing the run; its log ends with: {exit_.last_line or '(nothing)'}"
