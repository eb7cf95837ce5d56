"""Client of the PPO orchestrator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal
from uuid import uuid4

from google.protobuf.timestamp_pb2 import Timestamp

from tether.channel import ServiceClient
from tether.errors import DeadlineExceededError, UnavailableError
from tether.status import request_field
from tether.v1 import orchestrator_pb2, orchestrator_pb2_grpc

if TYPE_CHECKING:
    from tether.v1.orchestrator_pb2_grpc import OrchestratorServiceAsyncStub

__all__ = [
    "FINAL_STATES",
    "OrchestratorClient",
    "Rollback",
    "Run",
    "RunState",
    "SampleCounts",
    "StepEvent",
    "StepState",
]

RunState = Literal["pending", "running", "succeeded", "failed", "cancelled"]
FINAL_STATES: Final[frozenset[RunState]] = frozenset({"succeeded", "failed", "cancelled"})
"""States that a run does not leave on its own."""

WATCH_ATTEMPTS: Final = 5
"""Streams in a row that may break without bringing an event before watching gives up."""

_STATES: dict[int, RunState] = {
    orchestrator_pb2.RUN_STATE_PENDING: "pending",
    orchestrator_pb2.RUN_STATE_RUNNING: "running",
    orchestrator_pb2.RUN_STATE_SUCCEEDED: "succeeded",
    orchestrator_pb2.RUN_STATE_FAILED: "failed",
    orchestrator_pb2.RUN_STATE_CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class Rollback:
    """Committed steps that were taken back."""

    from_step: int
    """Steps that were committed before it."""
    to_step: int
    """Steps that stayed."""
    reason: str
    """What it was made for."""
    time: datetime
    """When it was made, in UTC."""

    def __str__(self) -> str:
        """Return it in one line."""
        moment = self.time.strftime("%Y-%m-%d %H:%M:%S")
        return f"{moment} UTC: from {self.from_step} to {self.to_step} steps ({self.reason})"


@dataclass(frozen=True, slots=True)
class Run:
    """A training run."""

    run_id: str
    """Its name."""
    state: RunState
    """Its state."""
    committed_step_count: int
    """Steps committed and not rolled back."""
    total_step_count: int
    """Steps planned."""
    policy_version: int
    """Version that the generator serves for it."""
    error: str
    """Why it failed; empty otherwise."""
    create_time: datetime
    """When it was accepted, in UTC."""
    end_time: datetime | None
    """When it ended, in UTC; None while it runs."""
    directory: str
    """Its folder on the orchestrator's machine."""
    rollbacks: tuple[Rollback, ...] = ()
    """Oldest first."""

    @property
    def ended(self) -> bool:
        """Whether the run has stopped."""
        return self.state in FINAL_STATES


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One committed step."""

    step: int
    """Step number, from 0."""
    policy_version: int
    """Version that sampled the step."""
    metrics: Mapping[str, float]
    """What was measured; the orchestrator's README lists the names."""
    commit_time: datetime
    """When it was committed, in UTC."""
    new_version: int
    """Version that it made."""


@dataclass(frozen=True, slots=True)
class SampleCounts:
    """What became of the samples of a step: generated = trained + the sum of dropped."""

    asked: int
    """Completions asked for."""
    generated: int
    """Completions that arrived."""
    trained: int
    """Completions that were trained on."""
    dropped: Mapping[str, int]
    """Completions that were not, by reason."""


@dataclass(frozen=True, slots=True)
class StepState:
    """One committed step as the ledger has it."""

    step: int
    """Step number, from 0."""
    policy_version: int
    """Version that sampled it."""
    adapter_sha256: str
    """SHA-256 (hex) of the adapter that it made."""
    epoch: int
    """Attempt that committed it."""
    samples: SampleCounts
    """Its samples."""
    checkpoint: str
    """Folder of its checkpoint below the run's, empty once removed."""
    checkpoint_sha256: str
    """Content hash (hex SHA-256) of that checkpoint."""
    commit_time: datetime
    """When it was committed, in UTC."""
    new_version: int
    """Version that it made."""


class OrchestratorClient(ServiceClient):
    """Starts, watches and stops training runs."""

    @cached_property
    def _stub(self) -> OrchestratorServiceAsyncStub:
        return orchestrator_pb2_grpc.OrchestratorServiceStub(self._channel)

    async def start_run(self, run_id: str, config_toml: str, *, timeout_seconds: float | None = None) -> Run:
        """Return the started run; a repeat with the same configuration returns the same run.

        Raises:
            InvalidArgumentError: The configuration is invalid (one violation per field), or the name has another one.
            FailedPreconditionError: Another run uses the trainer.
        """
        with request_field("config_toml"):
            request = orchestrator_pb2.StartRunRequest(run_id=run_id, config_toml=config_toml)
        return _run((await self._call(self._stub.StartRun, request, timeout_seconds)).run)

    async def get_run(self, run_id: str, *, timeout_seconds: float | None = None) -> Run:
        """Return a run. NotFoundError if there is none of that name."""
        request = orchestrator_pb2.GetRunRequest(run_id=run_id)
        return _run((await self._read(self._stub.GetRun, request, timeout_seconds)).run)

    async def list_runs(self, *, timeout_seconds: float | None = None) -> tuple[Run, ...]:
        """Return all runs, newest first."""
        pages = self._pages(self._stub.ListRuns, orchestrator_pb2.ListRunsRequest(), timeout_seconds)
        return tuple([_run(run) async for page in pages for run in page.runs])

    async def cancel_run(self, run_id: str, *, request_id: str = "", timeout_seconds: float | None = None) -> Run:
        """Stop a run after its current step at the latest, and return it.

        Args:
            run_id: Its name.
            request_id: UUID of the request; repeat a call whose answer was lost with the same one. Empty: a new one.
            timeout_seconds: Deadline of the call.
        """
        request = orchestrator_pb2.CancelRunRequest(run_id=run_id, request_id=request_id or str(uuid4()))
        return _run((await self._call(self._stub.CancelRun, request, timeout_seconds)).run)

    async def resume_run(
        self,
        run_id: str,
        *,
        from_step: int | None = None,
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> Run:
        """Continue a failed or cancelled run from its last committed step or an earlier one, and return it.

        Args:
            run_id: Its name.
            from_step: Committed steps that stay, the others are rolled back first; None: all stay.
            request_id: UUID of the request; repeat a call whose answer was lost with the same one. Empty: a new one.
            timeout_seconds: Deadline of the call.

        Raises:
            FailedPreconditionError: It runs or has succeeded, or the checkpoint of that step is gone.
        """
        with request_field("from_step"):
            request = orchestrator_pb2.ResumeRunRequest(
                run_id=run_id, request_id=request_id or str(uuid4()), from_step=from_step
            )
        return _run((await self._call(self._stub.ResumeRun, request, timeout_seconds)).run)

    async def roll_back_run(
        self, run_id: str, *, to_step: int | None = None, request_id: str = "", timeout_seconds: float | None = None
    ) -> Run:
        """Take back the last committed steps of a run, and return it.

        A run that has ended stays so until it is resumed; an active one is rolled back after its current step and goes
        on.

        Args:
            run_id: Its name.
            to_step: Committed steps that stay; None: all but the last one.
            request_id: UUID of the request; repeat a call whose answer was lost with the same one. Empty: a new one.
            timeout_seconds: Deadline of the call.

        Raises:
            FailedPreconditionError: It has succeeded, or the checkpoint of that step is gone.
        """
        with request_field("to_step"):
            request = orchestrator_pb2.RollbackRunRequest(
                run_id=run_id, to_step=to_step, request_id=request_id or str(uuid4())
            )
        return _run((await self._call(self._stub.RollbackRun, request, timeout_seconds)).run)

    async def list_steps(
        self, run_id: str, *, first_step: int = 0, timeout_seconds: float | None = None
    ) -> tuple[StepState, ...]:
        """Return the committed steps from `first_step` on, in order. NotFoundError if there is no such run."""
        steps: list[StepState] = []
        following: int | None = first_step
        while following is not None:
            with request_field("first_step"):
                request = orchestrator_pb2.ListStepsRequest(run_id=run_id, first_step=following, page_size=1000)
            page = await self._read(self._stub.ListSteps, request, timeout_seconds)
            steps += [_step_state(step) for step in page.steps]
            following = page.next_step if page.HasField("next_step") else None
        return tuple(steps)

    async def watch_run(
        self, run_id: str, *, first_step: int = 0, stream_seconds: float = 300.0
    ) -> AsyncGenerator[StepEvent | Run, None]:
        """Yield every committed step from `first_step` on, once each and in order, and every change of the run.

        After a rollback the run is yielded, then the steps that are made again.
        Ends after a final state. However long the run, no call is without a deadline: a stream that reached its own, or
        broke, is opened again at the next step.

        Args:
            run_id: Name of the run.
            first_step: First step wanted.
            stream_seconds: Deadline of one stream.

        Raises:
            NotFoundError: There is no such run.
            UnavailableError: The orchestrator could not be reached several times in a row.
        """
        next_step, failures = first_step, 0
        state: Run | None = None
        while True:
            with request_field("first_step"):
                known = None if state is None else len(state.rollbacks)
                request = orchestrator_pb2.WatchRunRequest(
                    run_id=run_id, first_step=next_step, known_rollback_count=known
                )
            try:
                async for response in self._stream(self._stub.WatchRun, request, self._timeout(stream_seconds)):
                    failures = 0
                    event = _event(response)
                    if isinstance(event, StepEvent):
                        next_step = event.step + 1
                        yield event
                    elif event != state:
                        next_step, state = _next_after(event, next_step, known=state), event
                        yield event
                return
            except DeadlineExceededError:
                continue
            except UnavailableError:
                failures += 1
                if failures == WATCH_ATTEMPTS:
                    raise
                await asyncio.sleep(0.2 * 2**failures)


def _next_after(run: Run, next_step: int, *, known: Run | None) -> int:
    """Return the step that a watcher needs next: one that was taken back is made again."""
    rollbacks = () if known is None else run.rollbacks[len(known.rollbacks) :]
    return min([next_step, *(rollback.to_step for rollback in rollbacks)])


def _event(response: orchestrator_pb2.WatchRunResponse) -> StepEvent | Run:
    if response.WhichOneof("event") == "run":
        return _run(response.run)
    step = response.step
    metrics = {metric.name: metric.value for metric in step.metrics}
    return StepEvent(step.step, step.policy_version, metrics, _time(step.commit_time), step.new_version)


def _step_state(step: orchestrator_pb2.StepState) -> StepState:
    counts = step.samples
    return StepState(
        step=step.step,
        policy_version=step.policy_version,
        adapter_sha256=step.adapter_sha256,
        epoch=step.epoch,
        samples=SampleCounts(counts.asked, counts.generated, counts.trained, dict(counts.dropped)),
        checkpoint=step.checkpoint,
        checkpoint_sha256=step.checkpoint_sha256,
        commit_time=_time(step.commit_time),
        new_version=step.new_version,
    )


def _run(run: orchestrator_pb2.Run) -> Run:
    return Run(
        run_id=run.run_id,
        state=_STATES[run.state],
        committed_step_count=run.committed_step_count,
        total_step_count=run.total_step_count,
        policy_version=run.policy_version,
        error=run.error,
        create_time=_time(run.create_time),
        end_time=_time(run.end_time) if run.HasField("end_time") else None,
        directory=run.directory,
        rollbacks=tuple(Rollback(r.from_step, r.to_step, r.reason, _time(r.time)) for r in run.rollbacks),
    )


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
