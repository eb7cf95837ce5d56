"""Takes a run up where the ledger says it is: files, trainer and generator, before a prompt is sent.

A step is committed before its adapter is pushed. So whatever was interrupted, the state is one of two: the step is not
committed, and is made again from the one before; or it is, and its adapter is pushed now if the generator lacks it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from tether.errors import FailedPreconditionError, NotFoundError, TetherError
from tether_services.orchestrator.publishing import LocalAdapter
from tether_services.orchestrator.records import StepState
from tether_services.runtime.logging import log_event

if TYPE_CHECKING:
    from tether_services.orchestrator.session import Session

__all__ = ["restore_policy", "take_up"]

log = logging.getLogger(__name__)


async def take_up(session: Session) -> None:
    """Bring files, trainer and generator to the last committed step.

    Raises:
        TetherError: The checkpoint cannot be used, or the generator refused or could not be reached.
    """
    adapter = await restore_policy(session)
    session.check_lease()
    await session.publisher.take_over(adapter)
    run = session.ledger.get_run(session.attempt.run_id)
    version = adapter.push.policy_version if adapter is not None else 0
    if run.policy_version != version or session.ledger.has_open_push(run.run_id):
        await asyncio.to_thread(session.ledger.record_push, session.attempt, version, {})


async def restore_policy(session: Session) -> LocalAdapter | None:
    """Bring the trainer to the last committed step and return its adapter; None at step 0.

    What earlier attempts left half-done or uncommitted is removed, the committed adapter stays as it is.

    Raises:
        NotFoundError: The committed checkpoint is not there.
        FailedPreconditionError: It is damaged, or its adapter is not the committed one.
    """
    committed = session.ledger.last_commit(session.attempt.run_id)
    await asyncio.to_thread(sweep, session, committed)
    if committed is None:
        return None
    version = committed.new_version
    try:
        await load_checkpoint(session, committed)
    except (FailedPreconditionError, NotFoundError) as error:
        raise _with_ways_back(error, session, committed) from error
    log_event(log, "checkpoint loaded", run_id=session.attempt.run_id, policy_version=version)
    adapter = await session.export_adapter(version, committed_sha256=committed.adapter_sha256)
    _check_adapter(adapter, committed)
    return adapter


async def load_checkpoint(session: Session, committed: StepState) -> None:
    """Bring the trainer to a committed step."""
    if committed.checkpoint is None:
        message = f"The ledger has no checkpoint of step {committed.step}."
        raise NotFoundError(message, field="checkpoint", reason="CHECKPOINT_NOT_FOUND")
    folder = await asyncio.to_thread(session.files.find_checkpoint, committed.checkpoint)
    await session.thread.run(session.trainer.load_checkpoint, folder)


def _with_ways_back(error: TetherError, session: Session, committed: StepState) -> TetherError:
    """Return an error of a checkpoint that also says from which earlier ones the run can go on."""
    run_id = session.attempt.run_id
    earlier = [way for way in session.ledger.list_ways_back(run_id) if way <= committed.step]
    steps = ", ".join(map(str, earlier))
    message = f"{error.message} Or go on from an earlier step: tether run resume {run_id} --from-step N, N of {steps}."
    return type(error)(message, reason=error.reason, violations=error.violations)


def sweep(session: Session, committed: StepState | None) -> None:
    """Remove what no committed step needs."""
    kept = session.retained_checkpoints()
    session.files.sweep(kept, committed=committed.new_version if committed else 0)


def _check_adapter(adapter: LocalAdapter, committed: StepState) -> None:
    """Refuse an adapter that is not the committed one: one version must never stand for two contents."""
    if committed.adapter_sha256 in ("", adapter.sha256):
        return
    message = (
        f"the checkpoint of step {committed.step} gives an adapter of hash {adapter.sha256}, committed was"
        f" {committed.adapter_sha256}: resume with the library versions that the run began with, or start a new run"
    )
    raise FailedPreconditionError(message, field="checkpoint", reason="ADAPTER_CHANGED")
