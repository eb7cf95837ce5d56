"""Held-out prompts before and after: what the policy writes, how it scores, and how far it went from the reference."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from tether.errors import FailedPreconditionError
from tether_services.orchestrator.prompts import derive_seed
from tether_services.orchestrator.rollouts import Rollout, ScoredSample
from tether_services.orchestrator.session import Session
from tether_services.orchestrator.step_record import name_phase
from tether_services.runtime.logging import log_event

__all__ = ["Evaluation", "EvaluationSample", "evaluate", "summarise_evaluation"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """One held-out prompt and the response to it."""

    prompt: str
    response: str
    score: float
    kl: float
    """Of the response, nats: the sum over its tokens of logprob - ref_logprob (k1)."""
    num_tokens: int
    truncated: bool
    """True if it reached the length limit."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One policy version on the held-out prompts."""

    policy_version: int
    score_mean: float
    score_std: float
    """Population standard deviation."""
    kl_per_response: float
    """Mean over responses of their summed k1 KL to the reference, nats."""
    kl_per_64_tokens: float
    """The same for a response of 64 tokens: 64 times the KL of all responses over their tokens."""
    response_length_mean: float
    truncated_ratio: float
    samples_generated: int
    samples_dropped: int
    samples: tuple[EvaluationSample, ...]


async def evaluate(session: Session, moment: Literal["before", "after"]) -> Evaluation:
    """Evaluate the policy that the generator serves, keep the result in the run's folder and return it.

    The seeds are the same at both moments, so the same prompts meet the same random numbers.

    Raises:
        TetherError: A service failed; the message says at which moment.
    """
    prompts = session.prompts.held_out
    seeds = [derive_seed(session.config.seed, "evaluation", index) for index in range(len(prompts))]
    with name_phase(f"evaluation {moment}"):
        rollout = await session.collector.collect(prompts, seeds, session.plan(1))
        result = summarise_evaluation(rollout, policy_version=session.publisher.policy_version)
        await session.write(session.files.write_json, f"evaluation_{moment}.json", asdict(result))
    log_event(
        log,
        f"evaluated {moment}",
        run_id=session.attempt.run_id,
        policy_version=result.policy_version,
        score_mean=round(result.score_mean, 4),
        kl_per_response=round(result.kl_per_response, 4),
    )
    return result


def summarise_evaluation(rollout: Rollout, *, policy_version: int) -> Evaluation:
    """Return the evaluation of scored samples.

    Raises:
        FailedPreconditionError: Fewer than two samples are left: a spread needs two.
    """
    if len(rollout.samples) < 2:
        raise FailedPreconditionError(f"{len(rollout.samples)} samples could be scored; at least 2 are needed")
    samples = tuple(_sample(sample) for sample in rollout.samples)
    scores = [sample.score for sample in samples]
    num_tokens = sum(sample.num_tokens for sample in samples)
    return Evaluation(
        policy_version=policy_version,
        score_mean=statistics.fmean(scores),
        score_std=statistics.pstdev(scores),
        kl_per_response=statistics.fmean(sample.kl for sample in samples),
        kl_per_64_tokens=64 * sum(sample.kl for sample in samples) / num_tokens,
        response_length_mean=num_tokens / len(samples),
        truncated_ratio=sum(sample.truncated for sample in samples) / len(samples),
        samples_generated=rollout.num_generated,
        samples_dropped=sum(rollout.dropped.values()),
        samples=samples,
    )


def _sample(sample: ScoredSample) -> EvaluationSample:
    completion = sample.completion
    return EvaluationSample(
        prompt=sample.prompt.text,
        response=completion.text,
        score=sample.score,
        kl=_kl(completion.logprobs, sample.ref_logprobs),
        num_tokens=len(completion.token_ids),
        truncated=completion.finish_reason == "length",
    )


def _kl(logprobs: Sequence[float], ref_logprobs: Sequence[float]) -> float:
    return sum(a - b for a, b in zip(logprobs, ref_logprobs, strict=True))
