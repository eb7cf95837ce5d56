"""What a run checks about its services before it loads a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether.generator import GeneratorClient, GeneratorState
from tether.reference import ReferenceClient, ReferenceState
from tether.reward import RewardModel, ScoreItem
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.fleet import Fleet
from tether_services.orchestrator.prompts import Prompt
from tether_services.orchestrator.remote import Remote, Services
from tether_services.runtime.text import TextCodec

__all__ = ["check_generator", "check_reference", "check_reward_tokenizer", "describe_services", "find_reward_model"]

COMPARED_CHARACTERS = 32
"""Of a prompt, to compare tokenizers by: so few that no reward model has to cut them."""


async def describe_services(services: Services, fleet: Fleet, config: RunConfig, base_sha256: str) -> dict[str, object]:
    """Return what the services serve, after checking that it fits the run; of several generators each by its address.

    Raises:
        TetherError: A service cannot be reached, serves another base, or its limits are too low.
    """
    generators = {target: asdict(state) for target, state in (await fleet.describe()).items()}
    reference = await services.reference.call(lambda client: client.get_reference())
    reward = await find_reward_model(services, config)
    check_reference(config, base_sha256, services.reference, reference)
    _check_limit("responses_per_prompt", config.responses_per_prompt, services.reward, reward.max_items)
    several = {"generators": generators} if len(services.generators) > 1 else {}
    first = next(iter(generators.values()))
    return {"generator": first, **several, "reference": asdict(reference), "reward": asdict(reward)}


async def find_reward_model(services: Services, config: RunConfig) -> RewardModel:
    """Return what the reward service says of the model that the run scores with.

    Raises:
        InvalidArgumentError: It has no such model.
    """
    models = await services.reward.call(lambda client: client.list_reward_models())
    wanted = [model for model in models if _is_selected(model, config.score_model)]
    if not wanted:
        known = ", ".join(f"{model.name}@{model.version}" for model in models)
        message = f"reward at {services.reward.client.target} has no model {config.score_model!r}; it has {known}"
        raise InvalidArgumentError(message, field="score_model")
    return wanted[0]


def _is_selected(model: RewardModel, selector: str) -> bool:
    """Return whether a call with this model selects that version."""
    if not selector:
        return model.default_model
    return selector == f"{model.name}@{model.version}" or (selector == model.name and model.default_version)


async def check_reward_tokenizer(
    services: Services, config: RunConfig, prompts: Sequence[Prompt], codec: TextCodec
) -> None:
    """Refuse a reward model that reads the policy's token ids as another text: its scores would be of nonsense.

    The beginnings of a few prompts are scored as text and as the policy's ids; the policy's own tokenizer gives as many
    tokens for both, or one more for each text.
    Engines that read no tokens of a model (rules, fake) are not asked.

    Raises:
        FailedPreconditionError: TOKENIZER_MISMATCH.
    """
    model = await find_reward_model(services, config)
    if "transformers" not in model.engine:
        return

    async def count_tokens(items: Sequence[ScoreItem]) -> list[int]:
        result = await services.reward.call(lambda client: client.score(items, model=config.score_model))
        return [item.token_count for item in result.scores]

    asked = [prompt.text[:COMPARED_CHARACTERS] for prompt in prompts[: model.max_items]]
    texts = [ScoreItem(text, text) for text in asked]
    ids = [
        ScoreItem(
            prompt_token_ids=codec.encode(text, add_special_tokens=True),
            response_token_ids=codec.encode(text, add_special_tokens=False),
        )
        for text in asked
    ]
    longer = {t - i for t, i in zip(await count_tokens(texts), await count_tokens(ids), strict=True)}
    if longer not in ({0}, {1}):  # 1: a model that learned from finished texts puts its end token behind a text
        message = (
            f"reward at {services.reward.client.target} reads the policy's token ids with another tokenizer;"
            " serve a reward model that was trained on this policy's base"
        )
        raise FailedPreconditionError(message, field="score_model", reason="TOKENIZER_MISMATCH")


def check_generator(
    config: RunConfig, base_sha256: str, remote: Remote[GeneratorClient], state: GeneratorState
) -> None:
    """Refuse a generator that serves another base model than the trainer's, or whose limits the run exceeds.

    Raises:
        FailedPreconditionError: BASE_MISMATCH, with both hashes.
        InvalidArgumentError: Names the setting that is beyond a limit.
    """
    _check_base(remote, state.base_model_sha256, base_sha256)
    tokens = config.max_prompt_tokens + config.max_response_tokens
    _check_limit("max_prompt_tokens + max_response_tokens", tokens, remote, state.max_model_len)
    _check_limit("responses_per_prompt", config.responses_per_prompt, remote, state.max_n)
    _check_limit("trainer.lora_rank", config.trainer.lora_rank, remote, state.max_lora_rank)


def check_reference(
    config: RunConfig, base_sha256: str, remote: Remote[ReferenceClient], state: ReferenceState
) -> None:
    """Refuse a reference that serves another base model than the trainer's, or whose limits the run exceeds.

    Raises:
        FailedPreconditionError: BASE_MISMATCH, with both hashes.
        InvalidArgumentError: Names the setting that is beyond a limit.
    """
    _check_base(remote, state.base_model_sha256, base_sha256)
    tokens = config.max_prompt_tokens + config.max_response_tokens
    _check_limit("max_prompt_tokens + max_response_tokens", tokens, remote, state.max_model_len)
    _check_limit("responses_per_prompt", config.responses_per_prompt, remote, state.max_items)


def _check_base(remote: Remote[Any], served: str, trained: str) -> None:
    if served != trained:
        message = (
            f"{remote.name} at {remote.client.target} serves the base model {served},"
            f" the trainer has {trained}: point both at the same folder"
        )
        raise FailedPreconditionError(message, reason="BASE_MISMATCH")


def _check_limit(setting: str, value: int, remote: Remote[Any], limit: int) -> None:
    if value > limit:
        message = f"{setting} is {value}; {remote.name} at {remote.client.target} accepts at most {limit}"
        raise InvalidArgumentError(message, field=setting)
