"""Everything that one attempt of a run works with, built in the order in which it can fail cheaply."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tether.adapter import AdapterProbe, AdapterPush
from tether.errors import FailedPreconditionError, InvalidArgumentError, TetherError
from tether.generator import GeneratorState
from tether.reference import ReferenceState
from tether.reward import RewardModel, ScoreItem
from tether_services.orchestrator.config import OrchestratorSettings, RunConfig, TrainerConfig
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.pretraining import PretrainingText
from tether_services.orchestrator.prompt_sources import load_prompt_lists, load_prompts
from tether_services.orchestrator.prompts import Prompt, PromptSet, encode_prompts, hash_prompts
from tether_services.orchestrator.publishing import LocalAdapter, PolicyPublisher
from tether_services.orchestrator.records import Attempt, CheckpointRow, RunIdentity
from tether_services.orchestrator.remote import BREAKERS_FILE, BreakerStates, Remote, Services, open_services
from tether_services.orchestrator.resume import take_up
from tether_services.orchestrator.rollouts import Identities, RolloutCollector, RolloutPlan
from tether_services.orchestrator.run_files import RunFiles
from tether_services.orchestrator.trainer import AdapterFiles, Sample, Trainer
from tether_services.orchestrator.trainer_thread import TrainerThread
from tether_services.runtime.content_hash import hash_model_folder
from tether_services.runtime.logging import log_event
from tether_services.runtime.model_folder import find_model_folder
from tether_services.runtime.text import HfCodec, TextCodec

__all__ = ["Session", "check_services", "choose_probes", "open_session"]

log = logging.getLogger(__name__)

_PROBES = 4
_PROBE_TOKENS = 64

COMPARED_CHARACTERS = 32
"""Of a prompt, to compare tokenizers by: so few that no reward model has to cut them."""


@dataclass(frozen=True, slots=True)
class Session:
    """What the loop works with."""

    attempt: Attempt
    config: RunConfig
    ledger: Ledger
    files: RunFiles
    trainer: Trainer
    thread: TrainerThread
    publisher: PolicyPublisher
    collector: RolloutCollector
    prompts: PromptSet
    probes: tuple[Sample, ...]
    """Fixed token sequences that prove each pushed adapter."""
    identities: Identities
    pretraining: PretrainingText | None
    """Of PPO-ptx; None without it."""
    check_lease: Callable[[], None]
    """Raises AbortedError if this process is not the one writer of the run any more."""
    keep_checkpoint_hours: float | None

    def pretraining_rows(self, step: int) -> list[list[int]]:
        """Return the pretraining text of a step, for all of its optimiser steps; empty without PPO-ptx."""
        if self.pretraining is None:
            return []
        ppo = self.config.ppo
        return self.pretraining.rows(step=step, count=ppo.ptx_rows * ppo.epochs * ppo.minibatches)

    def plan(self, n: int) -> RolloutPlan:
        """Return how to sample and score n completions a prompt."""
        return RolloutPlan(
            run_id=self.attempt.run_id,
            n=n,
            temperature=self.config.ppo.temperature,
            max_tokens=self.config.max_response_tokens,
            score_model=self.config.score_model,
        )

    async def export_average(self) -> None:
        """Write the moving average of the policy adapter to the run's folder, if one is kept."""
        if self.config.trainer.ema_decay is None:
            return
        directory, version = self.files.new_average_directory(), self.config.total_steps
        await self.thread.run(self.trainer.export_average, directory, policy_version=version)

    async def export_adapter(self, policy_version: int, *, committed_sha256: str = "") -> LocalAdapter:
        """Return the policy as it is now, written to disk with its proofs; a committed one that is there stays."""
        self.check_lease()
        return await self.thread.run(self._export, policy_version, committed_sha256)

    def _export(self, policy_version: int, committed_sha256: str) -> LocalAdapter:
        directory = self.files.make_way(policy_version, committed_sha256=committed_sha256)
        exported = self.trainer.export_adapter(directory, policy_version=policy_version)
        return _local_adapter(exported, self.attempt.run_id, prove(self.trainer, self.probes))

    async def save_checkpoint(self, policy_version: int) -> CheckpointRow:
        """Return the trainer as it is now, durable on the disk."""
        self.check_lease()
        return await self.thread.run(self._save, policy_version)

    def _save(self, policy_version: int) -> CheckpointRow:
        folder = self.files.new_checkpoint(policy_version, self.attempt.epoch)
        self.trainer.save_checkpoint(folder)
        return self.files.describe_checkpoint(folder, policy_version)

    def retained_checkpoints(self) -> list[CheckpointRow]:
        """Return the checkpoints that are to be kept; the ledger knows the others as removed from now on."""
        count, hours = self.config.keep_checkpoints, self.keep_checkpoint_hours
        return self.ledger.retain_checkpoints(self.attempt, count=count, hours=hours)


def _always_held() -> None:
    """Stand for the lease of a caller that took none and works alone."""


@asynccontextmanager
async def open_session(
    settings: OrchestratorSettings,
    config: RunConfig,
    ledger: Ledger,
    attempt: Attempt,
    *,
    check_lease: Callable[[], None] = _always_held,
) -> AsyncIterator[Session]:
    """Yield the session of an attempt: services checked, trainer at the last committed step, generator serving it.

    Raises:
        TetherError: A service cannot be reached or does not fit the run, or a file is missing or damaged.
    """
    files = RunFiles(attempt.directory)
    thread = TrainerThread()
    try:
        show = partial(show_breakers, files)
        async with open_services(settings, retry_budget=config.failure.retry_budget, on_breaker=show) as services:
            model = await asyncio.to_thread(find_model_folder, config.model, field="model")
            base_sha256 = await asyncio.to_thread(hash_model_folder, model)
            files.write_services(await describe_services(services, config, base_sha256))
            codec = await asyncio.to_thread(HfCodec, model)
            lists = await asyncio.to_thread(load_prompt_lists, config)
            prompts = encode_prompts(config, *lists, lambda text: codec.encode(text, add_special_tokens=True))
            pretraining = await asyncio.to_thread(open_pretraining, config, codec)
            identity = await identify(services, config, base_sha256, prompts, pretraining)
            await asyncio.to_thread(ledger.pin_identity, attempt, identity)
            identities = Identities(identity.base_sha256, identity.reward_sha256)
            await check_reward_tokenizer(services, config, prompts.training[:_PROBES], codec)
            trainer = await thread.run(build_trainer, model, config, threads=settings.threads)
            publisher = PolicyPublisher(services.adapter, attempt)
            session = Session(
                attempt,
                config,
                ledger,
                files,
                trainer,
                thread,
                publisher,
                RolloutCollector(services, publisher, identities, config.failure),
                prompts,
                choose_probes(prompts.training),
                identities,
                pretraining,
                check_lease,
                settings.keep_checkpoint_hours,
            )
            await take_up(session)
            yield session
    finally:
        thread.close()


def show_breakers(files: RunFiles, states: BreakerStates) -> None:
    """Tell the service, which exports it, which services this attempt does not call now."""
    try:
        files.write_json(BREAKERS_FILE, states)
    except (OSError, TetherError) as error:  # a full disk must not add a failure to that of the service
        log_event(log, "breakers not written", level=logging.WARNING, error=str(error), **states)


def open_pretraining(config: RunConfig, codec: HfCodec) -> PretrainingText | None:
    """Return the pretraining text of the run; None without PPO-ptx.

    Raises:
        InvalidArgumentError: The text cannot be read.
    """
    if not config.ppo.ptx_coef:
        return None
    documents = load_prompts(config.ppo.ptx_text, field="ppo.ptx_text")
    length = config.max_prompt_tokens + config.max_response_tokens
    return PretrainingText(documents, codec.encode_document, max(2, length), config.seed)


async def identify(
    services: Services, config: RunConfig, base_sha256: str, prompts: PromptSet, pretraining: PretrainingText | None
) -> RunIdentity:
    """Return the hashes of all that decides the numbers of a run beside its configuration."""
    reward = await find_reward_model(services, config)
    documents = pretraining.documents if pretraining else ()
    return RunIdentity(base_sha256, reward.model_sha256, await asyncio.to_thread(hash_prompts, prompts, documents))


def build_trainer(model: Path, config: RunConfig, *, threads: int) -> Trainer:
    """Return the trainer at version 0."""
    return Trainer(
        model,
        trainer_config(config, threads=threads),
        config.ppo,
        total_steps=config.total_steps,
        reward_model=Path(config.reward_model) if config.reward_model else None,
    )


def trainer_config(config: RunConfig, *, threads: int) -> TrainerConfig:
    """Return the trainer's settings with the run's seed and the service's threads where it has none of its own."""
    own = config.trainer.model_fields_set
    defaults = {"seed": config.seed, "threads": threads}
    return config.trainer.model_copy(update={name: value for name, value in defaults.items() if name not in own})


async def describe_services(services: Services, config: RunConfig, base_sha256: str) -> dict[str, object]:
    """Return what the services serve, after checking that it fits the run.

    Raises:
        TetherError: A service cannot be reached, serves another base, or its limits are too low.
    """
    generator = await services.generator.call(lambda client: client.get_generator())
    reference = await services.reference.call(lambda client: client.get_reference())
    reward = await find_reward_model(services, config)
    check_services(config, base_sha256, services, generator, reference)
    _check_limit("responses_per_prompt", config.responses_per_prompt, services.reward, reward.max_items)
    return {"generator": asdict(generator), "reference": asdict(reference), "reward": asdict(reward)}


async def find_reward_model(services: Services, config: RunConfig) -> RewardModel:
    """Return what the reward service says of the model that the run scores with.

    Raises:
        InvalidArgumentError: It has no such model.
    """
    models = await services.reward.call(lambda client: client.list_reward_models())
    wanted = [m for m in models if m.name == config.score_model or (m.default_model and not config.score_model)]
    if not wanted:
        known = ", ".join(model.name for model in models)
        message = f"reward at {services.reward.client.target} has no model {config.score_model!r}; it has {known}"
        raise InvalidArgumentError(message, field="score_model")
    return wanted[0]


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


def check_services(
    config: RunConfig, base_sha256: str, services: Services, generator: GeneratorState, reference: ReferenceState
) -> None:
    """Refuse services that serve another base model than the trainer's, or whose limits the run exceeds.

    Raises:
        FailedPreconditionError: BASE_MISMATCH, with both hashes.
        InvalidArgumentError: Names the setting that is beyond a limit.
    """
    _check_base(services.generator, generator.base_model_sha256, base_sha256)
    _check_base(services.reference, reference.base_model_sha256, base_sha256)
    tokens, n = config.max_prompt_tokens + config.max_response_tokens, config.responses_per_prompt
    _check_limit("max_prompt_tokens + max_response_tokens", tokens, services.generator, generator.max_model_len)
    _check_limit("max_prompt_tokens + max_response_tokens", tokens, services.reference, reference.max_model_len)
    _check_limit("responses_per_prompt", n, services.generator, generator.max_n)
    _check_limit("responses_per_prompt", n, services.reference, reference.max_items)
    _check_limit("trainer.lora_rank", config.trainer.lora_rank, services.generator, generator.max_lora_rank)


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


def choose_probes(prompts: Sequence[Prompt]) -> tuple[Sample, ...]:
    """Return a few fixed sequences, taken from the first prompts, each cut in a prompt of one token and a response."""
    sequences = [prompt.token_ids * 2 for prompt in prompts[:_PROBES]]  # twice: a prompt can be a single token
    return tuple(Sample(ids[:1], ids[1:_PROBE_TOKENS]) for ids in sequences)


def prove(trainer: Trainer, probes: Sequence[Sample]) -> tuple[AdapterProbe, ...]:
    """Return what the policy says of fixed sequences, with its adapter and without."""
    rows = zip(probes, trainer.probe_logprobs(probes), trainer.base_logprobs(probes), strict=True)
    return tuple(AdapterProbe((*p.prompt_token_ids, *p.response_token_ids), own, base) for p, own, base in rows)


def _local_adapter(exported: AdapterFiles, run_id: str, proofs: Sequence[AdapterProbe]) -> LocalAdapter:
    weights = next(file for file in exported.files if file.name.endswith(".safetensors"))
    push = AdapterPush(
        run_id=run_id,
        policy_version=exported.policy_version,
        base_model_sha256=exported.base_sha256,
        rank=exported.rank,
        target_modules=exported.target_modules,
        probes=proofs,
        differs_from_base=not exported.is_identity,
    )
    size_bytes = sum(file.size_bytes for file in exported.files)
    return LocalAdapter(exported.directory, weights.sha256, size_bytes, push)
