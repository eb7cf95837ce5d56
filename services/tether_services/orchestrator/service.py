"""The gRPC face of the orchestrator: check, convert, ask the ledger or the engine, convert."""

from __future__ import annotations

import asyncio
import fcntl
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import CollectorRegistry

from tether.errors import InvalidArgumentError, NotFoundError, UnavailableError
from tether.v1 import orchestrator_pb2 as pb
from tether.v1 import orchestrator_pb2_grpc
from tether_services.orchestrator.config import OrchestratorSettings, RunConfig
from tether_services.orchestrator.engine import RunEngine
from tether_services.orchestrator.engines.process import ProcessEngine
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.metrics import OrchestratorMetrics
from tether_services.orchestrator.records import FINAL_STATES, Rollback, RunRecord, RunState, StepRecord, StepState
from tether_services.orchestrator.remote import check_credentials
from tether_services.orchestrator.run_config import check_run_config, parse_run_config
from tether_services.orchestrator.supervisor import Supervisor
from tether_services.runtime.checks import check_name, check_page, check_range
from tether_services.runtime.server import Port

__all__ = ["OrchestratorService"]

SERVICE_NAME = "tether.v1.OrchestratorService"
METHODS = ("StartRun", "GetRun", "ListRuns", "CancelRun", "ResumeRun", "RollbackRun", "WatchRun", "ListSteps")
_POLL_SECONDS = 0.1
"""How often the ledger is read for new steps; the worker writes it from another process."""
_PAGE_STEPS = 200
_LISTED_STEPS, _MOST_LISTED_STEPS = 100, 1000
"""Of a page of ListSteps: unless told otherwise, and at most."""

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
        self._starting = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._lock: IO[bytes] | None = None
        self._opened: Ledger | None = None
        self._supervisor: Supervisor | None = None

    def ports(self) -> Sequence[Port]:
        """Return the one address."""

        def register(server: grpc.aio.Server) -> None:
            orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)

        return [Port("address", self._settings.address, [SERVICE_NAME], register, self._settings.max_message_bytes)]

    def methods(self) -> Sequence[str]:
        """Return the names of the methods."""
        return METHODS

    async def start(self) -> None:
        """Open the ledger and take care of what an earlier process left unfinished.

        Raises:
            InvalidArgumentError: Another orchestrator uses the state folder, or it cannot be written; the credentials
                for the other services are of no use.
            TetherError: The ledger cannot be used; the message says why.
        """
        await asyncio.to_thread(check_credentials, self._settings)
        ledger, self._lock = await asyncio.to_thread(open_state, Path(self._settings.state_dir))
        self._opened = ledger
        self._supervisor = Supervisor(self._settings, self._engine, self._metrics, ledger)
        await self._supervisor.recover()

    async def check(self) -> None:
        """Read the ledger."""
        await asyncio.to_thread(self._ledger.active_run)

    def end_streams(self) -> None:
        """Send watchers away: another orchestrator will tell them more."""
        self._stopping.set()

    async def close(self) -> None:
        """End the workers; their runs are FAILED and can be resumed."""
        try:
            if self._supervisor is not None:
                await self._supervisor.close()
        finally:
            if self._opened is not None:
                self._opened.close()
            if self._lock is not None:
                self._lock.close()

    async def StartRun(self, request: pb.StartRunRequest, context: Any) -> pb.StartRunResponse:
        """Validate, record and start a run."""
        check_name(request.run_id, field="run_id")
        # Once begun it is done even if the caller leaves: the caller will ask again.
        run = await asyncio.shield(self._supervised.keep(self._start(request)))
        return pb.StartRunResponse(run=await self._message(run))

    async def _start(self, request: pb.StartRunRequest) -> RunRecord:
        async with self._starting:  # of two calls for the same run the second finds what the first has recorded
            return await self._start_or_find(request)

    async def _start_or_find(self, request: pb.StartRunRequest) -> RunRecord:
        known = await self._find(request.run_id)
        if known is not None:
            return _same_or_refuse(known, request.config_toml)
        config = await asyncio.to_thread(_read_config, request.config_toml)
        record = partial(
            self._ledger.create_run, request.run_id, config_toml=request.config_toml, total_steps=config.total_steps
        )
        return await self._supervised.launch(record)

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        """Return a run."""
        return pb.GetRunResponse(run=await self._message(await self._get(request.run_id)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        """Return a page of runs."""
        size, start = check_page(request.page_size, request.page_token)
        runs = await asyncio.to_thread(self._ledger.list_runs, start=start, limit=size + 1)
        token = str(start + size) if len(runs) > size else ""
        return pb.ListRunsResponse(runs=[await self._message(run) for run in runs[:size]], next_page_token=token)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        """Ask the worker to stop."""
        check_name(request.run_id, field="run_id")
        request_id = read_request_id(request.request_id)
        cancel = partial(self._ledger.request_cancel, request.run_id, request_id=request_id)
        return pb.CancelRunResponse(run=await self._message(await asyncio.to_thread(cancel)))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Any) -> pb.ResumeRunResponse:
        """Start another attempt of a run."""
        check_name(request.run_id, field="run_id")
        from_step = request.from_step if request.HasField("from_step") else None
        resume = self._resume(request.run_id, read_request_id(request.request_id), from_step)
        # Once begun it is done and remembered even if the caller leaves: the caller will ask again.
        run = await asyncio.shield(self._supervised.keep(resume))
        return pb.ResumeRunResponse(run=await self._message(run))

    async def _resume(self, run_id: str, request_id: str, from_step: int | None) -> RunRecord:
        async with self._starting:  # of two calls of the same id the second finds the answer to the first
            find = partial(self._ledger.find_answer, request_id, method="ResumeRun", run_id=run_id, argument=from_step)
            answered = await asyncio.to_thread(find)
            if answered is not None:
                return answered
            run = await self._get(run_id)
            await asyncio.to_thread(_read_config, run.config_toml)
            begin = partial(self._ledger.begin_attempt, run_id, request_id=request_id, from_step=from_step)
            resumed = await self._supervised.launch(begin)
            self._metrics.resumes.inc()
            await self._show_rollbacks(run)
            return await asyncio.to_thread(find) or resumed

    async def RollbackRun(self, request: pb.RollbackRunRequest, context: Any) -> pb.RollbackRunResponse:
        """Take back the last steps of a run, or ask its worker to make way for that."""
        check_name(request.run_id, field="run_id")
        to_step = request.to_step if request.HasField("to_step") else None
        request_id = read_request_id(request.request_id)
        before = await self._get(request.run_id)
        roll_back = partial(self._ledger.request_rollback, request.run_id, to_step=to_step, request_id=request_id)
        run = await asyncio.to_thread(roll_back)
        if run.state in FINAL_STATES:  # else it is made, and shown, once the worker has stopped
            await self._show_rollbacks(before)
            self._supervised.report(run.run_id)
        return pb.RollbackRunResponse(run=await self._message(run))

    async def _show_rollbacks(self, before: RunRecord) -> None:
        rollbacks = await asyncio.to_thread(self._ledger.list_rollbacks, before.run_id)
        self._metrics.observe_rollbacks(before.run_id, rollbacks, before=before.branch)

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        """Send committed steps and changes of state until a final state."""
        if request.first_step < 0:
            raise InvalidArgumentError(f"{request.first_step} is below 0.", field="first_step")
        run = await self._get(request.run_id)
        known = request.known_rollback_count if request.HasField("known_rollback_count") else run.branch
        check_range(known, field="known_rollback_count", low=0, high=run.branch)
        next_step = request.first_step
        sent: tuple[RunState | None, int] = (None, known)
        while True:
            if self._stopping.is_set():
                raise UnavailableError("The service is stopping; watch again.", reason="DRAINING")
            # The state is read before the steps: once it is final, the steps that follow are all there are.
            run = await self._get(run.run_id)
            next_step = await self._find_next(run, next_step, known=sent[1])
            if (run.state, run.branch) != sent and run.state not in FINAL_STATES:
                yield pb.WatchRunResponse(run=await self._message(run))
            sent = (run.state, run.branch)
            # While a run is active a step is sent once its adapter is in use: its figures are complete then.
            pushed_only = run.state not in FINAL_STATES
            steps = await asyncio.to_thread(
                self._ledger.list_steps, run.run_id, first_step=next_step, limit=_PAGE_STEPS, pushed_only=pushed_only
            )
            for record in steps:
                next_step = record.step + 1
                yield pb.WatchRunResponse(step=step_message(record))
            if len(steps) == _PAGE_STEPS:
                continue
            if run.state in FINAL_STATES:
                yield pb.WatchRunResponse(run=await self._message(run))
                return
            await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), timeout=_POLL_SECONDS)

    async def _find_next(self, run: RunRecord, next_step: int, *, known: int) -> int:
        """Return the step that a watcher needs next, who knows of so many rollbacks."""
        if run.branch == known:
            return next_step
        rollbacks = (await asyncio.to_thread(self._ledger.list_rollbacks, run.run_id))[known : run.branch]
        return min([next_step, *(rollback.to_step for rollback in rollbacks)])

    async def ListSteps(self, request: pb.ListStepsRequest, context: Any) -> pb.ListStepsResponse:
        """Return a page of committed steps with what became of their samples."""
        check_range(request.first_step, field="first_step", low=0, high=2**31 - 1)
        check_range(request.page_size, field="page_size", low=0, high=_MOST_LISTED_STEPS)
        run = await self._get(request.run_id)
        size = request.page_size or _LISTED_STEPS
        states = await asyncio.to_thread(
            self._ledger.list_states, run.run_id, first_step=request.first_step, limit=size + 1
        )
        following = states[size].step if len(states) > size else None
        return pb.ListStepsResponse(steps=[state_message(state) for state in states[:size]], next_step=following)

    @property
    def _ledger(self) -> Ledger:
        assert self._opened is not None, "the readiness guard lets no call through before start"
        return self._opened

    @property
    def _supervised(self) -> Supervisor:
        assert self._supervisor is not None, "the readiness guard lets no call through before start"
        return self._supervisor

    async def _get(self, run_id: str) -> RunRecord:
        check_name(run_id, field="run_id")
        return await asyncio.to_thread(self._ledger.get_run, run_id)

    async def _find(self, run_id: str) -> RunRecord | None:
        try:
            return await asyncio.to_thread(self._ledger.get_run, run_id)
        except NotFoundError:
            return None

    async def _message(self, run: RunRecord) -> pb.Run:
        rollbacks = (
            (await asyncio.to_thread(self._ledger.list_rollbacks, run.run_id))[: run.branch] if run.branch else []
        )
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
            rollbacks=[rollback_message(rollback) for rollback in rollbacks],
        )


def open_state(state_dir: Path) -> tuple[Ledger, IO[bytes]]:
    """Return the ledger of a state folder and the lock that keeps a second orchestrator out while it is open.

    The lock comes first: a file that another orchestrator works on is neither upgraded nor corrected.

    Raises:
        InvalidArgumentError: Another orchestrator holds the lock, or the folder cannot be written.
        TetherError: The ledger cannot be used; the message says why.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("wb")
    except OSError as error:
        raise InvalidArgumentError(f"Cannot write {state_dir}: {error.strerror}.", field="state_dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.set_inheritable(lock.fileno(), False)
        return open_ledger(state_dir), lock
    except BlockingIOError as error:
        lock.close()
        message = f"Another orchestrator uses {state_dir}; choose another folder or stop it."
        raise InvalidArgumentError(message, field="state_dir") from error
    except BaseException:
        lock.close()
        raise


def open_ledger(state_dir: Path) -> Ledger:
    """Return the ledger of a state folder, with the counts of committed steps that its steps add up to."""
    ledger = Ledger(state_dir)
    try:
        ledger.recount_steps()
    except BaseException:
        ledger.close()
        raise
    return ledger


def rollback_message(rollback: Rollback) -> pb.Rollback:
    """Return a rollback as the contract spells it."""
    return pb.Rollback(
        from_step=rollback.from_step,
        to_step=rollback.to_step,
        reason=rollback.reason,
        time=_timestamp(rollback.time),
    )


def step_message(record: StepRecord) -> pb.StepEvent:
    """Return a committed step as the contract spells it."""
    return pb.StepEvent(
        step=record.step,
        policy_version=record.policy_version,
        metrics=[pb.StepMetric(name=name, value=value) for name, value in record.metrics.items()],
        commit_time=_timestamp(record.commit_time),
        new_version=record.new_version,
    )


def state_message(state: StepState) -> pb.StepState:
    """Return a committed step and what it left behind as the contract spells it."""
    counts = state.samples
    return pb.StepState(
        step=state.step,
        policy_version=state.policy_version,
        adapter_sha256=state.adapter_sha256,
        epoch=state.epoch,
        samples=pb.SampleCounts(
            asked=counts.asked, generated=counts.generated, trained=counts.trained, dropped=counts.dropped
        ),
        checkpoint=state.checkpoint.path if state.checkpoint else "",
        checkpoint_sha256=state.checkpoint.sha256 if state.checkpoint else "",
        commit_time=_timestamp(state.commit_time),
        new_version=state.new_version,
    )


def read_request_id(value: str) -> str:
    """Return a request's UUID in its canonical form; empty if the caller sent none.

    Raises:
        InvalidArgumentError: It is no UUID.
    """
    if not value:
        return ""
    try:
        return str(uuid.UUID(value))
    except ValueError as error:
        raise InvalidArgumentError("A request_id is a UUID.", field="request_id") from error


def _read_config(text: str) -> RunConfig:
    config = parse_run_config(text)
    check_run_config(config)
    return config


def _same_or_refuse(run: RunRecord, config_toml: str) -> RunRecord:
    if run.config_toml != config_toml:
        message = f"Run {run.run_id!r} exists with another configuration; choose another id."
        raise InvalidArgumentError(message, field="run_id", reason="RUN_EXISTS")
    return run


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp
