"""Rollouts: generate, and as each prompt's completions arrive score them and compute their reference log-probabilities.

Only token ids travel: what the generator sampled is what is scored and trained on. Every completion is checked; one
that is not what was asked for is left out and counted by reason, so that generated = trained + dropped at all times.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tether.errors import FailedPreconditionError, InternalError
from tether.generator import Completion, Generation, SamplingParams
from tether.reference import LogprobItem, LogprobResult
from tether.reward import ScoreItem, ScoreResult
from tether_services.orchestrator.prompts import Prompt
from tether_services.orchestrator.publishing import PolicyPublisher
from tether_services.orchestrator.remote import Services

__all__ = ["Identities", "Rollout", "RolloutCollector", "RolloutPlan", "ScoredSample", "Span", "check_generation"]

RowT = TypeVar("RowT")

_RESTORES = 3
"""Times a prompt brings a restarted generator back to the current version before it gives up."""
_GENERATOR_LOST = frozenset({"RUN_NOT_ACTIVE", "VERSION_NOT_LOADED"})
MAX_DROPPED_FRACTION = 0.5
"""A rollout that loses more than this has a cause that training on would hide."""


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """How to sample and score; the same for all prompts of a rollout."""

    run_id: str
    n: int
    """Completions per prompt."""
    temperature: float
    """Of policy and reference alike."""
    max_tokens: int
    """New tokens of a completion at most."""
    score_model: str
    """Reward model name; empty: the default one."""


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """A completion with everything that training needs."""

    prompt: Prompt
    completion: Completion
    ref_logprobs: tuple[float, ...]
    score: float
    group: int = 0
    """Number of the prompt in its rollout; a prompt that occurs twice has two."""


@dataclass(slots=True)
class Span:
    """From the start of the first of several overlapping calls to the end of the last, on the monotonic clock."""

    first_start: float | None = None
    last_end: float | None = None

    def start(self) -> None:
        """A call begins."""
        if self.first_start is None:
            self.first_start = time.monotonic()

    def end(self) -> None:
        """A call has ended."""
        self.last_end = time.monotonic()

    @property
    def seconds(self) -> float:
        """Length of the span; 0 if no call has ended."""
        if self.first_start is None or self.last_end is None:
            return 0.0
        return self.last_end - self.first_start


@dataclass(slots=True)
class Rollout:
    """The samples of a rollout in the order of the prompts, and the account of those left out."""

    samples: list[ScoredSample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """By a reason of `step_metrics.DROP_REASONS`."""
    num_generated: int = 0
    generated_tokens: int = 0
    generate: Span = field(default_factory=Span)
    score: Span = field(default_factory=Span)
    reference: Span = field(default_factory=Span)

    def check(self) -> None:
        """Refuse a rollout that does not add up or lost too much.

        Raises:
            InternalError: generated = trained + dropped does not hold: a defect of this file.
            FailedPreconditionError: More than MAX_DROPPED_FRACTION was dropped; the message counts the reasons.
        """
        lost = sum(self.dropped.values())
        if self.num_generated != len(self.samples) + lost:
            raise InternalError(f"{self.num_generated} generated, {len(self.samples)} kept and {lost} dropped samples")
        if lost > MAX_DROPPED_FRACTION * self.num_generated:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items()))
            message = f"{lost} of {self.num_generated} samples cannot be used ({reasons})"
            raise FailedPreconditionError(message, reason="SAMPLES_DROPPED")


@dataclass(slots=True)
class Identities:
    """Content hashes that must stay the same over a whole run."""

    base_sha256: str
    """Of the base model, in generator, reference and trainer."""
    reward_sha256: str = ""
    """Of the reward model; empty until it has scored something."""

    def check_reference(self, result: LogprobResult) -> None:
        """Refuse log-probabilities of another model."""
        if result.base_model_sha256 != self.base_sha256:
            message = f"the reference now serves {result.base_model_sha256}, the run began with {self.base_sha256}"
            raise FailedPreconditionError(message, reason="REFERENCE_CHANGED")

    def check_reward(self, result: ScoreResult) -> None:
        """Refuse scores of another model than the first ones."""
        self.reward_sha256 = self.reward_sha256 or result.model_sha256
        if result.model_sha256 != self.reward_sha256:
            message = f"the reward service now serves {result.model_sha256}, the run began with {self.reward_sha256}"
            raise FailedPreconditionError(message, reason="REWARD_MODEL_CHANGED")


def check_generation(
    generation: Generation, *, run_id: str, policy_version: int, adapter_sha256: str
) -> tuple[list[Completion], Counter[str]]:
    """Return (completions made by this policy with a log-probability for each token, the others counted by reason)."""
    made_by = {
        "wrong_run": generation.run_id == run_id,
        "wrong_version": generation.policy_version == policy_version,
        "wrong_adapter": generation.adapter_sha256 == adapter_sha256,
    }
    for reason, as_expected in made_by.items():
        if not as_expected:
            return [], Counter({reason: len(generation.completions)})
    good = [completion for completion in generation.completions if _is_complete(completion)]
    bad = len(generation.completions) - len(good)
    return good, Counter({"invalid_logprobs": bad} if bad else {})


def _is_complete(completion: Completion) -> bool:
    return 0 < len(completion.token_ids) == len(completion.logprobs) and all(map(math.isfinite, completion.logprobs))


class RolloutCollector:
    """Collects rollouts of the publisher's current policy."""

    def __init__(self, services: Services, publisher: PolicyPublisher, identities: Identities) -> None:
        self._services = services
        self._publisher = publisher
        self._identities = identities

    async def collect(self, prompts: Sequence[Prompt], seeds: Sequence[int], plan: RolloutPlan) -> Rollout:
        """Return the checked and scored samples of one rollout.

        Args:
            prompts: One group of completions each.
            seeds: One per prompt; the generator derives the streams of the n completions from it.
            plan: How to sample and score.

        Raises:
            TetherError: A service failed beyond its retries (the message names it), or too many samples were unusable.
        """
        rollout = Rollout()
        slots = asyncio.Semaphore(self._services.concurrency)

        async def collect_group(prompt: Prompt, seed: int) -> list[ScoredSample]:
            async with slots:
                completions = await self._sample(rollout, prompt, seed, plan)
            return await self._judge(rollout, prompt, completions, plan) if completions else []

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(collect_group(prompt, seed)) for prompt, seed in zip(prompts, seeds, strict=True)
                ]
        except BaseExceptionGroup as errors:
            # The first one tells why; the others failed the same way or were cancelled.
            raise errors.exceptions[0] from errors
        rollout.samples = [replace(s, group=number) for number, task in enumerate(tasks) for s in task.result()]
        rollout.check()
        return rollout

    async def _sample(self, rollout: Rollout, prompt: Prompt, seed: int, plan: RolloutPlan) -> list[Completion]:
        """Return the usable completions of a prompt and count all of them."""
        rollout.generate.start()
        generation = await self._generate(prompt, seed, plan)
        rollout.generate.end()
        good, dropped = check_generation(
            generation,
            run_id=plan.run_id,
            policy_version=self._publisher.policy_version,
            adapter_sha256=self._publisher.adapter_sha256,
        )
        rollout.num_generated += len(generation.completions)
        rollout.generated_tokens += sum(len(completion.token_ids) for completion in generation.completions)
        rollout.dropped += dropped
        return good

    async def _generate(self, prompt: Prompt, seed: int, plan: RolloutPlan) -> Generation:
        sampling = SamplingParams(max_tokens=plan.max_tokens, temperature=plan.temperature, seed=seed)
        restores = 0
        while True:
            try:
                return await self._services.generator.call(
                    lambda client: client.generate(
                        prompt.token_ids,
                        n=plan.n,
                        sampling=sampling,
                        policy_version=self._publisher.policy_version,
                        run_id=plan.run_id,
                    )
                )
            except FailedPreconditionError as error:
                if error.reason not in _GENERATOR_LOST or restores == _RESTORES:
                    raise
            restores += 1
            await self._publisher.restore()

    async def _judge(
        self, rollout: Rollout, prompt: Prompt, completions: Sequence[Completion], plan: RolloutPlan
    ) -> list[ScoredSample]:
        """Return the completions of a prompt with scores and reference log-probabilities, fetched at the same time."""
        scores, references = await asyncio.gather(
            self._score(rollout.score, prompt, completions, plan.score_model),
            self._compare(rollout.reference, prompt, completions, plan.temperature),
        )
        samples = []
        for completion, score, ref_logprobs in zip(completions, scores, references, strict=True):
            if math.isfinite(score):
                samples.append(ScoredSample(prompt, completion, ref_logprobs, score))
            else:
                rollout.dropped["not_scored"] += 1
        return samples

    async def _score(
        self, span: Span, prompt: Prompt, completions: Sequence[Completion], model: str
    ) -> tuple[float, ...]:
        """Return the scores; NaN where the reward service could not score."""
        span.start()
        items = [ScoreItem(prompt_token_ids=prompt.token_ids, response_token_ids=c.token_ids) for c in completions]
        result = await self._services.reward.call(lambda client: client.score(items, model=model))
        span.end()
        self._identities.check_reward(result)
        return _require_one_each(tuple(item.score for item in result.scores), completions, service="reward")

    async def _compare(
        self, span: Span, prompt: Prompt, completions: Sequence[Completion], temperature: float
    ) -> tuple[tuple[float, ...], ...]:
        """Return the reference log-probabilities of each completion."""
        span.start()
        items = [LogprobItem(prompt.token_ids, completion.token_ids) for completion in completions]
        result = await self._services.reference.call(
            lambda client: client.compute_logprobs(items, temperature=temperature)
        )
        span.end()
        self._identities.check_reference(result)
        rows = _require_one_each(tuple(item.ref_logprobs for item in result.items), completions, service="reference")
        for row, completion in zip(rows, completions, strict=True):
            if len(row) != len(completion.token_ids) or not all(map(math.isfinite, row)):
                raise InternalError("reference: a response token has no finite log-probability")
        return rows


def _require_one_each(rows: tuple[RowT, ...], completions: Sequence[Completion], *, service: str) -> tuple[RowT, ...]:
    if len(rows) != len(completions):
        raise InternalError(f"{service}: {len(rows)} answers to {len(completions)} items")
    return rows
