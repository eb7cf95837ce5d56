"""The training loop: evaluate, step after step, evaluate.

prompts -> generate -> (score | reference log-probabilities) -> update -> checkpoint -> push -> activate -> commit
"""

from __future__ import annotations

import asyncio
import logging

from tether.errors import CancelledError, FailedPreconditionError
from tether_services.orchestrator.evaluation import evaluate
from tether_services.orchestrator.prompts import derive_seed, step_prompts
from tether_services.orchestrator.records import StepRecord
from tether_services.orchestrator.rollouts import Rollout
from tether_services.orchestrator.session import Session
from tether_services.orchestrator.step_record import StepClock, summarise_step
from tether_services.orchestrator.trainer import RolloutBatch, Sample, UpdateReport
from tether_services.ppo.mismatch import WARNING_LIMITS
from tether_services.runtime.logging import log_event

__all__ = ["run_step", "run_training", "to_batch"]

log = logging.getLogger(__name__)


async def run_training(session: Session) -> None:
    """Bring the run to its end from the last committed step.

    Raises:
        CancelledError: CancelRun was called.
        TetherError: A service or the trainer failed; the message says in which step and phase.
    """
    committed = session.ledger.get_run(session.attempt.run_id).num_committed_steps
    if session.config.evaluation and committed == 0:
        await evaluate(session, "before")
    for step in range(committed, session.config.total_steps):
        stop_if_cancelled(session)
        await run_step(session, step)
    stop_if_cancelled(session)
    await session.export_average()
    if session.config.evaluation:
        await evaluate(session, "after")


async def run_step(session: Session, step: int) -> StepRecord:
    """Sample, score, learn once, publish the new adapter, commit the step and return its record."""
    clock = StepClock()
    with clock.phase("rollout", step):
        rollout = await collect_step(session, step)
    batch = to_batch(rollout, max_response_tokens=session.config.max_response_tokens)
    rows = session.pretraining_rows(step)
    with clock.phase("train", step):
        update = await session.thread.run(session.trainer.update, batch, rows)
        check_update(update, step, limit=session.config.ppo.mismatch_limit)
        warn_of_mismatch(update, step, run_id=session.attempt.run_id)
    with clock.phase("checkpoint", step):
        await session.thread.run(session.trainer.save_checkpoint, session.files.checkpoint(step + 1))
    with clock.phase("push", step):
        with clock.phase("push_serialize", step):
            adapter = await session.export_adapter(step + 1)
        pushed = await session.publisher.publish(adapter)
    record = summarise_step(step, rollout, update, clock.finish(), pushed, adapter_bytes=adapter.size_bytes)
    await asyncio.to_thread(session.ledger.commit_step, session.attempt, record)
    session.files.keep_newest(step + 1, session.config.keep_checkpoints)
    log_event(log, "step committed", run_id=session.attempt.run_id, step=step, policy_version=step + 1)
    return record


async def collect_step(session: Session, step: int) -> Rollout:
    """Return the rollout of a step."""
    config = session.config
    prompts = step_prompts(session.prompts.training, step=step, count=config.prompts_per_step, seed=config.seed)
    seeds = [derive_seed(config.seed, step, index) for index in range(len(prompts))]
    return await session.collector.collect(prompts, seeds, session.plan(config.responses_per_prompt))


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


def stop_if_cancelled(session: Session) -> None:
    """Raise CancelledError if CancelRun was called."""
    if session.ledger.get_run(session.attempt.run_id).cancel_requested:
        raise CancelledError("CancelRun was called.")
