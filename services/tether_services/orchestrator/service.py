"""The gRPC face of the orchestrator: check, convert, ask the ledger or the engine, convert."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import CollectorRegistry

from tether.errors import InvalidArgumentError, NotFoundError
from tether.v1 import orchestrator_pb2 as pb
from tether.v1 import orchestrator_pb2_grpc
from tether_services.orchestrator.config import OrchestratorSettings, RunConfig
from tether_services.orchestrator.engine import RunEngine, WorkerExit
from tether_services.orchestrator.engines.process import ProcessEngine
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.metrics import OrchestratorMetrics
from tether_services.orchestrator.records import FINAL_STATES, Attempt, RunRecord, RunState, StepRecord
from tether_services.orchestrator.run_config import check_run_config, parse_run_config
from tether_services.runtime.checks import check_name, check_page
from tether_services.runtime.logging import log_event
from tether_services.runtime.server import Port

__all__ = ["OrchestratorService"]

log = logging.getLogger(__name__)

SERVICE_NAME = "tether.v1.OrchestratorService"
METHODS = ("StartRun", "GetRun", "ListRuns", "CancelRun", "ResumeRun", "WatchRun")
_POLL_SECONDS = 0.1
"""How often the ledger is read for new steps; the worker writes it from another process."""
_METRICS_SECONDS = 0.5
"""How often committed steps are read for the metrics."""
_PAGE_STEPS = 200

T = TypeVar("T")
_STATES = {state: getattr(pb, f"RUN_STATE_{state.value}") for state in RunState}


class OrchestratorService(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Keeps the ledger, starts a worker per run and tells callers how the runs go."""

    name = "orchestrator"

    def __init__(
        self, settings: OrchestratorSettings, registry: CollectorRegistry, *, engine: RunEngine | None = None
    ) -> None:
        self._settings = settings
        self._engine = engine or ProcessEngine(settings)
        self._metrics = OrchestratorMetrics(registry)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._starting = asyncio.Lock()
        self._closing = False
        self._lock: IO[bytes] | None = None
        self._opened: Ledger | None = None

    def ports(self) -> Sequence[Port]:
        """Return the one address."""

        def register(server: grpc.aio.Server) -> None:
            orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)

        return [Port("address", self._settings.address, [SERVICE_NAME], register)]

    def methods(self) -> Sequence[str]:
        """Return the names of the methods."""
        return METHODS

    async def start(self) -> None:
        """Open the ledger and end what an earlier process left unfinished.

        Raises:
            InvalidArgumentError: Another orchestrator uses the state folder, or it cannot be written.
        """
        self._opened, self._lock = await asyncio.to_thread(open_state, Path(self._settings.state_dir))
        left = await asyncio.to_thread(self._ledger.active_run)
        if left is not None:
            await self._end(_attempt(self._ledger, left), "the orchestrator process ended; resume the run to go on")

    async def check(self) -> None:
        """Read the ledger."""
        await asyncio.to_thread(self._ledger.active_run)

    async def close(self) -> None:
        """End the workers; their runs are FAILED and can be resumed."""
        self._closing = True
        try:
            await self._engine.close()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            if self._lock is not None:
                self._lock.close()

    async def StartRun(self, request: pb.StartRunRequest, context: Any) -> pb.StartRunResponse:
        """Validate, record and start a run."""
        check_name(request.run_id, field="run_id")
        async with self._starting:  # of two calls for the same run the second finds what the first has recorded
            return await self._start_run(request)

    async def _start_run(self, request: pb.StartRunRequest) -> pb.StartRunResponse:
        known = await self._find(request.run_id)
        if known is not None:
            return pb.StartRunResponse(run=self._message(_same_or_refuse(known, request.config_toml)))
        config = await asyncio.to_thread(_read_config, request.config_toml)
        record = partial(
            self._ledger.create_run, request.run_id, config_toml=request.config_toml, total_steps=config.total_steps
        )
        return pb.StartRunResponse(run=self._message(await self._launch(record)))

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        """Return a run."""
        return pb.GetRunResponse(run=self._message(await self._get(request.run_id)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        """Return a page of runs."""
        size, start = check_page(request.page_size, request.page_token)
        runs = await asyncio.to_thread(self._ledger.list_runs, start=start, limit=size + 1)
        token = str(start + size) if len(runs) > size else ""
        return pb.ListRunsResponse(runs=[self._message(run) for run in runs[:size]], next_page_token=token)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        """Ask the worker to stop."""
        check_name(request.run_id, field="run_id")
        run = await asyncio.to_thread(self._ledger.request_cancel, request.run_id)
        return pb.CancelRunResponse(run=self._message(run))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Any) -> pb.ResumeRunResponse:
        """Start another attempt of a run."""
        run = await self._get(request.run_id)
        await asyncio.to_thread(_read_config, run.config_toml)
        resumed = await self._launch(partial(self._ledger.begin_attempt, request.run_id))
        self._metrics.resumes.inc()
        return pb.ResumeRunResponse(run=self._message(resumed))

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        """Send committed steps and changes of state until a final state."""
        if request.first_step < 0:
            raise InvalidArgumentError(f"{request.first_step} is below 0.", field="first_step")
        run = await self._get(request.run_id)
        next_step, sent = request.first_step, None
        while True:
            # The state is read before the steps: once it is final, the steps that follow are all there are.
            run = await self._get(run.run_id)
            if run.state is not sent and run.state not in FINAL_STATES:
                sent = run.state
                yield pb.WatchRunResponse(run=self._message(run))
            steps = await asyncio.to_thread(
                self._ledger.list_steps, run.run_id, first_step=next_step, limit=_PAGE_STEPS
            )
            for record in steps:
                next_step = record.step + 1
                yield pb.WatchRunResponse(step=step_message(record))
            if len(steps) == _PAGE_STEPS:
                continue
            if run.state in FINAL_STATES:
                yield pb.WatchRunResponse(run=self._message(run))
                return
            await asyncio.sleep(_POLL_SECONDS)

    @property
    def _ledger(self) -> Ledger:
        assert self._opened is not None, "the readiness guard lets no call through before start"
        return self._opened

    async def _get(self, run_id: str) -> RunRecord:
        check_name(run_id, field="run_id")
        return await asyncio.to_thread(self._ledger.get_run, run_id)

    async def _find(self, run_id: str) -> RunRecord | None:
        try:
            return await asyncio.to_thread(self._ledger.get_run, run_id)
        except NotFoundError:
            return None

    async def _launch(self, record: Callable[[], Attempt]) -> RunRecord:
        """Record an attempt, start its worker and return the run; once begun it is done even if the caller leaves."""
        return await asyncio.shield(self._keep(self._begin(record)))

    async def _begin(self, record: Callable[[], Attempt]) -> RunRecord:
        attempt = await asyncio.to_thread(record)
        run = await self._get(attempt.run_id)
        self._keep(self._supervise(attempt, run.num_committed_steps))
        return run

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something on its own and hold on to it: the event loop itself does not."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _supervise(self, attempt: Attempt, next_step: int) -> None:
        """Run an attempt, show its steps as metrics, and if its worker ends without recording how, fail the run."""
        self._metrics.observe_state(await asyncio.to_thread(self._ledger.get_run, attempt.run_id))
        worker = asyncio.create_task(self._work(attempt))
        overdue: float | None = None
        while not worker.done():
            await asyncio.wait({worker}, timeout=_METRICS_SECONDS)
            next_step = await self._show_steps(attempt.run_id, next_step)
            run = await asyncio.to_thread(self._ledger.get_run, attempt.run_id)
            if run.cancel_requested and overdue is None:
                overdue = time.monotonic() + self._settings.cancel_seconds
            if overdue is not None and time.monotonic() > overdue:
                await self._end_hung(attempt, worker)
        await self._end(attempt, "the worker hung" if worker.cancelled() else worker.result())
        await self._show_steps(attempt.run_id, next_step)
        self._metrics.observe_state(await asyncio.to_thread(self._ledger.get_run, attempt.run_id))

    async def _work(self, attempt: Attempt) -> str:
        """Run the worker of an attempt and return why the run has failed if it did not say so itself."""
        try:
            reason = describe_exit(await self._engine.run(attempt))
        except OSError as error:
            reason = f"the worker could not be started: {error}"
        return "the orchestrator was stopped; resume the run to go on" if self._closing else reason

    async def _end_hung(self, attempt: Attempt, worker: asyncio.Task[str]) -> None:
        """End a worker that does not answer a cancellation; no other run could start while it is there."""
        worker.cancel()
        await asyncio.wait({worker})
        error = f"the worker did not stop within {self._settings.cancel_seconds:g} s of CancelRun and was ended"
        await asyncio.to_thread(self._ledger.finish, attempt, RunState.CANCELLED, error=error)
        log_event(log, "hung worker ended", level=logging.ERROR, run_id=attempt.run_id)

    async def _end(self, attempt: Attempt, reason: str) -> None:
        if await asyncio.to_thread(self._ledger.finish, attempt, RunState.FAILED, error=reason):
            log_event(log, "run failed", level=logging.ERROR, run_id=attempt.run_id, error=reason)

    async def _show_steps(self, run_id: str, first_step: int) -> int:
        """Show the steps committed from a number on as metrics and return the next number."""
        steps = await asyncio.to_thread(self._ledger.list_steps, run_id, first_step=first_step)
        for record in steps:
            self._metrics.observe_step(record)
        return first_step + len(steps)

    def _message(self, run: RunRecord) -> pb.Run:
        return pb.Run(
            run_id=run.run_id,
            state=_STATES[run.state],
            committed_step_count=run.num_committed_steps,
            total_step_count=run.num_total_steps,
            policy_version=run.policy_version,
            error=run.error,
            create_time=_timestamp(run.create_time),
            end_time=None if run.end_time is None else _timestamp(run.end_time),
            directory=str(self._ledger.directory(run.run_id)),
        )


def open_state(state_dir: Path) -> tuple[Ledger, IO[bytes]]:
    """Return the ledger of a state folder and the lock that keeps a second orchestrator out while it is open.

    Raises:
        InvalidArgumentError: Another orchestrator holds the lock, or the folder cannot be written.
    """
    try:
        ledger = Ledger(state_dir)
        lock = (ledger.state_dir / "lock").open("wb")
    except OSError as error:
        raise InvalidArgumentError(f"Cannot write {state_dir}: {error.strerror}.", field="state_dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        message = f"Another orchestrator uses {state_dir}; choose another folder or stop it."
        raise InvalidArgumentError(message, field="state_dir") from error
    os.set_inheritable(lock.fileno(), False)
    return ledger, lock


def describe_exit(exit_: WorkerExit) -> str:
    """Return in words how a worker ended that did not say so itself."""
    how = f"was killed by signal {-exit_.code}" if exit_.code < 0 else f"exited with status {exit_.code}"
    return f"the worker {how} without finishing the run; its log ends with: {exit_.last_line or '(nothing)'}"


def step_message(record: StepRecord) -> pb.StepEvent:
    """Return a committed step as the contract spells it."""
    return pb.StepEvent(
        step=record.step,
        policy_version=record.policy_version,
        metrics=[pb.StepMetric(name=name, value=value) for name, value in record.metrics.items()],
        commit_time=_timestamp(record.commit_time),
    )


def _read_config(text: str) -> RunConfig:
    config = parse_run_config(text)
    check_run_config(config)
    return config


def _same_or_refuse(run: RunRecord, config_toml: str) -> RunRecord:
    if run.config_toml != config_toml:
        message = f"Run {run.run_id!r} exists with another configuration; choose another id."
        raise InvalidArgumentError(message, field="run_id", reason="RUN_EXISTS")
    return run


def _attempt(ledger: Ledger, run: RunRecord) -> Attempt:
    return Attempt(run.run_id, run.epoch, ledger.directory(run.run_id))


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp
