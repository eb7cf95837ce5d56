"""The training loop: evaluate, step after step, evaluate.

prompts -> generate -> (score | reference log-probabilities) -> update -> checkpoint -> commit -> push -> activate
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from tether.errors import CancelledError, FailedPreconditionError
from tether_services.orchestrator.alarms import RECENT_STEPS, RollbackDueError, find_alarm
from tether_services.orchestrator.evaluation import evaluate
from tether_services.orchestrator.prompts import derive_seed, step_prompts
from tether_services.orchestrator.publishing import LocalAdapter
from tether_services.orchestrator.records import SampleRow, StepNumbers, StepOutcome, StepRecord
from tether_services.orchestrator.rollouts import Rollout
from tether_services.orchestrator.session import Session
from tether_services.orchestrator.step_record import (
    StepClock,
    name_phase,
    summarise_push,
    summarise_samples,
    summarise_step,
)
from tether_services.orchestrator.trainer import RolloutBatch, Sample, UpdateReport
from tether_services.ppo.mismatch import WARNING_LIMITS
from tether_services.runtime.fault_points import reach
from tether_services.runtime.history import record as record_history
from tether_services.runtime.logging import log_event

__all__ = ["run_step", "run_training", "to_batch"]

log = logging.getLogger(__name__)

ALARM_WAY_OUT = (
    "the step is not committed: go on from an earlier one (tether run resume RUN --from-step N), or start a new run"
    " with other settings"
)


async def run_training(session: Session) -> None:
    """Bring the run to its end from the last committed step.

    Raises:
        CancelledError: CancelRun was called.
        RollbackDueError: RollbackRun was called, or an alarm rolls the run back.
        TetherError: A service or the trainer failed; the message says in which step and phase.
    """
    committed = session.ledger.get_run(session.attempt.run_id).num_committed_steps
    if session.config.evaluation and committed == 0:
        await evaluate(session, "before")
    for step in range(committed, session.config.total_steps):
        stop_if_asked(session)
        await run_step(session, step)
    stop_if_asked(session)
    await session.export_average()
    if session.config.evaluation:
        await evaluate(session, "after")
    stop_if_asked(session)


async def run_step(session: Session, step: int) -> StepRecord:
    """Sample, score, learn once, commit the step, publish the new adapter and return the record of the step."""
    clock = StepClock()
    numbers = await asyncio.to_thread(session.ledger.next_step, session.attempt.run_id)
    version = numbers.new_version
    rollout, update = await learn(session, step, clock)
    await stop_at_alarm(session, step, rollout, update)
    with clock.phase("push_serialize", step):
        adapter = await session.export_adapter(version)
        reach("adapter.exported")
    with clock.phase("checkpoint", step):
        checkpoint = await session.save_checkpoint(version)
    record = summarise_step(numbers, rollout, update, clock.finish(), adapter_bytes=adapter.size_bytes)
    outcome = StepOutcome(adapter.sha256, checkpoint, rollout.counts)
    with name_phase(f"step {step}, commit"):
        await session.write(session.ledger.commit_step, session.attempt, record, outcome)
    note_commit(session, numbers, outcome)
    reach("commit.done")
    await publish(session, step, adapter, clock)
    with name_phase(f"step {step}, retention"):
        await session.write(retain, session, version)
    log_event(log, "step committed", run_id=session.attempt.run_id, step=step, policy_version=version)
    return session.ledger.list_steps(session.attempt.run_id, first_step=step, limit=1)[0]


async def learn(session: Session, step: int, clock: StepClock) -> tuple[Rollout, UpdateReport]:
    """Sample, score and learn once; return the rollout and what the update did."""
    await session.write(session.check_lease)
    note(session, "begun", step=step, policy_version=session.publisher.policy_version)
    reach("step.begun")
    with clock.phase("rollout", step):
        rollout = await collect_step(session, step)
    with name_phase(f"step {step}, samples"):
        await session.write(session.ledger.record_samples, session.attempt, step, rollout.rows)
    note_samples(session, step, rollout)
    reach("rollout.recorded")
    batch = to_batch(rollout, max_response_tokens=session.config.max_response_tokens)
    rows = session.pretraining_rows(step)
    with clock.phase("train", step):
        update = await session.thread.run(session.trainer.update, batch, rows)
        check_update(update, step, limit=session.config.ppo.mismatch_limit)
        warn_of_mismatch(update, step, run_id=session.attempt.run_id)
    trained = [row.sample for row in rollout.rows if not row.dropped]
    note(session, "trained", step=step, samples=trained)
    reach("update.done")
    return rollout, update


async def publish(session: Session, step: int, adapter: LocalAdapter, clock: StepClock) -> None:
    """Have the generator serve the version that a committed step has made, and record what that took."""
    await session.write(session.check_lease)
    reach("push.begun")
    with clock.phase("push", step):
        pushed = await session.with_room(lambda: session.publisher.publish(adapter))
        reach("push.activated")
    figures = summarise_push(pushed, clock.finish())
    with name_phase(f"step {step}, push"):
        version = adapter.push.policy_version
        await session.write(session.ledger.record_push, session.attempt, version, figures)
    reach("push.recorded")


def retain(session: Session, policy_version: int) -> None:
    """Remove the checkpoints and adapters that are not to be kept any more."""
    kept = session.retained_checkpoints()
    reach("retention.half")
    session.files.retain(kept, committed=policy_version)


def note_samples(session: Session, step: int, rollout: Rollout) -> None:
    """Put the samples of a step in the history, if one is kept."""
    for row in rollout.rows:
        made_by = {"policy_version": row.policy_version, "sha256": row.adapter_sha256}
        note(session, "generated", step=step, sample=row.sample, **made_by)
        if row.dropped:
            note(session, "dropped", step=step, sample=row.sample, reason=row.dropped)


def note_commit(session: Session, numbers: StepNumbers, outcome: StepOutcome) -> None:
    """Put a committed step in the history, if one is kept."""
    counts = outcome.samples
    made = {"policy_version": numbers.new_version, "sha256": outcome.adapter_sha256}
    note(session, "exported", step=numbers.step, **made)
    figures = {"generated": counts.generated, "trained": counts.trained, "dropped": dict(counts.dropped)}
    note(session, "committed", step=numbers.step, branch=numbers.branch, **figures)


def note(session: Session, kind: str, **fields: object) -> None:
    """Put something that this attempt did in the history, if one is kept."""
    record_history(kind, run=session.attempt.run_id, epoch=session.attempt.epoch, **fields)


async def collect_step(session: Session, step: int) -> Rollout:
    """Return the rollout of a step; after a rollback, the same prompts get other responses."""
    config = session.config
    prompts = step_prompts(session.prompts.training, step=step, count=config.prompts_per_step, seed=config.seed)
    branch = session.ledger.get_run(session.attempt.run_id).branch
    parts = ("branch", branch, step) if branch else (step,)
    seeds = [derive_seed(config.seed, *parts, index) for index in range(len(prompts))]
    plan = session.plan(config.responses_per_prompt)

    async def abandon(rows: Sequence[SampleRow]) -> None:
        if rows:
            await session.write(session.ledger.record_abandoned, session.attempt, step, rows)

    return await session.collector.collect(prompts, seeds, plan, abandon=abandon)


def to_batch(rollout: Rollout, *, max_response_tokens: int) -> RolloutBatch:
    """Return the samples as the trainer takes them, in the order of the prompts; one group per prompt."""
    samples = rollout.samples
    return RolloutBatch(
        samples=[Sample(sample.prompt.token_ids, sample.completion.token_ids) for sample in samples],
        logprobs=[sample.completion.logprobs for sample in samples],
        ref_logprobs=[sample.ref_logprobs for sample in samples],
        scores=[sample.score for sample in samples],
        groups=[sample.group for sample in samples],
        stopped=[sample.completion.finish_reason == "stop" for sample in samples],
        max_response_tokens=max_response_tokens,
    )


def check_update(update: UpdateReport, step: int, *, limit: float) -> None:
    """Refuse a first step whose policy, still the reference itself, differs from the reference.

    Raises:
        FailedPreconditionError: REFERENCE_MISMATCH.

    Source: D1.
    """
    if step == 0 and max(abs(update.kl_per_token), update.kl_k3_per_token) > limit:
        message = (
            f"at step 0 the KL to the reference is {update.kl_per_token:.4g} nats per token instead of 0:"
            " the reference service computes other log-probabilities than the trainer; compare temperature and model"
        )
        raise FailedPreconditionError(message, reason="REFERENCE_MISMATCH")


def warn_of_mismatch(update: UpdateReport, step: int, *, run_id: str) -> None:
    """Log the figures by which generator and trainer differ more than is usual; `mismatch_limit` stops a run."""
    figures = update.as_dict()
    above = {name: figures[name] for name, limit in WARNING_LIMITS.items() if figures[name] > limit}
    if above:
        log_event(log, "generator and trainer differ", level=logging.WARNING, run_id=run_id, step=step, **above)


async def stop_at_alarm(session: Session, step: int, rollout: Rollout, update: UpdateReport) -> None:
    """Stop before a step is committed that raises an alarm.

    Raises:
        RollbackDueError: The run is rolled back, as its configuration says.
        FailedPreconditionError: ALARM, with the figure, why the run is not rolled back if it should be, and the way
            out.
    """
    limits, attempt = session.config.alarms, session.attempt
    recent: list[StepRecord] = []
    if limits.score_drop is not None:  # the others look at this step alone
        first = max(0, step - RECENT_STEPS)
        read = partial(session.ledger.list_steps, attempt.run_id, first_step=first, limit=RECENT_STEPS)
        recent = await asyncio.to_thread(read)
    now = {**update.as_dict(), **summarise_samples(rollout)}
    alarm = find_alarm(limits, [record.metrics for record in recent], now)
    if alarm is None:
        return
    reason = f"step {step}, {alarm}"
    log_event(log, "alarm", level=logging.ERROR, run_id=attempt.run_id, step=step, alarm=alarm.name, text=alarm.text)
    note(session, "alarm", step=step, alarm=alarm.name)
    if limits.action == "stop":
        raise FailedPreconditionError(f"{reason}; {ALARM_WAY_OUT}", reason="ALARM")
    to_step, most = max(0, step - limits.rollback_steps), limits.max_rollbacks
    ask = partial(session.ledger.ask_rollback, attempt, to_step=to_step, reason=reason, most=most)
    try:
        await session.write(ask)
    except FailedPreconditionError as error:
        message = f"{reason}; not rolled back: {error.message.rstrip('.')}; {ALARM_WAY_OUT}"
        raise FailedPreconditionError(message, reason="ALARM") from error
    raise RollbackDueError(reason)


def stop_if_asked(session: Session) -> None:
    """Raise CancelledError if CancelRun was called, RollbackDueError if RollbackRun was."""
    run = session.ledger.get_run(session.attempt.run_id)
    if run.cancel_requested:
        raise CancelledError("CancelRun was called.")
    if run.rollback_to is not None:
        raise RollbackDueError("RollbackRun was called")
