"""Any policy that the generator serves, on the held-out prompts: sampled, scored and compared by the real services."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.learning_parts.measures import repetition_rate, standard_error
from tether import GeneratorClient, ReferenceClient, RewardClient, SamplingParams, ScoreItem
from tether.errors import FailedPreconditionError
from tether.generator import Completion
from tether.reference import LogprobItem
from tether_services.local.deployment import Addresses
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.prompts import derive_seed, read_prompts, split_prompts

__all__ = ["Evaluation", "Judge", "Response", "held_out_prompts"]

REFERENCE_TOKENS = 64
"""KL is given for a response of this many tokens, so that policies of different lengths can be compared."""
CONCURRENT_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a held-out prompt."""

    token_ids: tuple[int, ...]
    """The stop token included."""
    score: float
    kl: float
    """Sum over tokens of logprob - ref_logprob, nats."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy answered."""

    groups: tuple[tuple[Response, ...], ...]
    """Per held-out prompt its responses, equally many."""

    @property
    def responses(self) -> list[Response]:
        """All responses: the first of every prompt, then the second of every prompt, and so on."""
        return [response for column in zip(*self.groups, strict=True) for response in column]

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        """The token ids of the responses, in the same order."""
        return [response.token_ids for response in self.responses]

    @property
    def score_mean(self) -> float:
        """Mean score."""
        return statistics.fmean(response.score for response in self.responses)

    @property
    def score_std(self) -> float:
        """Standard deviation of the scores of single responses."""
        return statistics.pstdev(response.score for response in self.responses)

    @property
    def score_error(self) -> float:
        """Standard error of the mean score; the prompts are the independent draws."""
        return standard_error([statistics.fmean(r.score for r in group) for group in self.groups])

    @property
    def kl_per_response(self) -> float:
        """KL to the reference in nats, summed over a response, mean over responses."""
        return statistics.fmean(response.kl for response in self.responses)

    @property
    def kl_per_64_tokens(self) -> float:
        """KL of all responses over their tokens, times 64, nats."""
        num_tokens = sum(len(response.token_ids) for response in self.responses)
        return REFERENCE_TOKENS * sum(response.kl for response in self.responses) / num_tokens

    @property
    def length_mean(self) -> float:
        """Tokens per response."""
        return statistics.fmean(len(response.token_ids) for response in self.responses)

    @property
    def repetition(self) -> float:
        """Repetition rate of the responses."""
        return repetition_rate(self.token_ids)

    def first(self, count: int) -> Evaluation:
        """Return the evaluation by the first `count` responses of each prompt."""
        return Evaluation(tuple(group[:count] for group in self.groups))

    def to_json(self) -> list[list[dict[str, Any]]]:
        """Return plain values."""
        return [[asdict(response) for response in group] for group in self.groups]

    @classmethod
    def from_json(cls, groups: Sequence[Sequence[dict[str, Any]]]) -> Self:
        """Return the evaluation that `to_json` gave."""
        return cls(
            tuple(tuple(Response(tuple(r["token_ids"]), r["score"], r["kl"]) for r in group) for group in groups)
        )


def held_out_prompts(config: RunConfig) -> list[str]:
    """Return the prompts that a run of this configuration is evaluated on and does not train on."""
    return split_prompts(config, read_prompts(Path(config.prompts), field="prompts"), None)[1]


class Judge:
    """Samples and judges with the services of one deployment. An async context manager."""

    def __init__(self, addresses: Addresses, config: RunConfig) -> None:
        self._generator = GeneratorClient(addresses.generator)
        self._reward = RewardClient(addresses.reward)
        self._reference = ReferenceClient(addresses.reference)
        self._config = config

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.gather(*(client.close() for client in (self._generator, self._reward, self._reference)))

    async def evaluate(self, *, num_responses: int, policy_version: int, run_id: str = "") -> Evaluation:
        """Return the evaluation of a served version; all versions meet the same prompts and random seeds.

        Raises:
            FailedPreconditionError: The version is not served, or a response could not be scored.
        """
        slots = asyncio.Semaphore(CONCURRENT_PROMPTS)

        async def answer(index: int, prompt: str) -> tuple[Response, ...]:
            seed = derive_seed(0, "learning", index)
            async with slots:
                return await self._answer(prompt, seed, num_responses, policy_version, run_id)

        prompts = held_out_prompts(self._config)
        return Evaluation(tuple(await asyncio.gather(*(answer(*pair) for pair in enumerate(prompts)))))

    async def _answer(
        self, prompt: str, seed: int, num_responses: int, policy_version: int, run_id: str
    ) -> tuple[Response, ...]:
        config = self._config
        sampling = SamplingParams(max_tokens=config.max_response_tokens, temperature=config.ppo.temperature, seed=seed)
        generation = await self._generator.generate(
            prompt, n=num_responses, sampling=sampling, policy_version=policy_version, run_id=run_id
        )
        completions, prompt_ids = generation.completions, generation.prompt_token_ids
        scores, kls = await asyncio.gather(self._score(prompt_ids, completions), self._kl(prompt_ids, completions))
        return tuple(Response(c.token_ids, s, kl) for c, s, kl in zip(completions, scores, kls, strict=True))

    async def _score(self, prompt_ids: Sequence[int], completions: Sequence[Completion]) -> list[float]:
        items = [ScoreItem(prompt_token_ids=prompt_ids, response_token_ids=c.token_ids) for c in completions]
        result = await self._reward.score(items, model=self._config.score_model)
        for item in result.scores:
            if item.error is not None:
                raise FailedPreconditionError(f"a held-out response could not be scored: {item.error.message}")
        return [item.score for item in result.scores]

    async def _kl(self, prompt_ids: Sequence[int], completions: Sequence[Completion]) -> list[float]:
        items = [LogprobItem(prompt_ids, completion.token_ids) for completion in completions]
        result = await self._reference.compute_logprobs(items, temperature=self._config.ppo.temperature)
        pairs = zip(completions, result.items, strict=True)
        return [sum(completion.logprobs) - sum(item.ref_logprobs) for completion, item in pairs]
