"""Everything that one attempt of a run works with, built in the order in which it can fail cheaply."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tether.adapter import AdapterProbe, AdapterPush
from tether.errors import TetherError
from tether_services.orchestrator.config import OrchestratorSettings, RunConfig, TrainerConfig
from tether_services.orchestrator.fleet import Fleet
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.member import CheckState
from tether_services.orchestrator.pretraining import PretrainingText
from tether_services.orchestrator.progress import note_while, note_work
from tether_services.orchestrator.prompt_sources import load_prompt_lists, load_prompts
from tether_services.orchestrator.prompts import Prompt, PromptSet, encode_prompts, hash_prompts
from tether_services.orchestrator.publishing import LocalAdapter
from tether_services.orchestrator.records import Attempt, CheckpointRow, RunIdentity
from tether_services.orchestrator.remote import BREAKERS_FILE, LAGGING_FILE, BreakerStates, Services, open_services
from tether_services.orchestrator.resume import take_up
from tether_services.orchestrator.rollouts import Identities, RolloutCollector, RolloutPlan
from tether_services.orchestrator.run_files import RunFiles
from tether_services.orchestrator.service_checks import (
    check_generator,
    check_reward_tokenizer,
    describe_services,
    find_reward_model,
)
from tether_services.orchestrator.storage_wait import wait_for_room
from tether_services.orchestrator.trainer import AdapterFiles, Sample, Trainer
from tether_services.orchestrator.trainer_thread import TrainerThread
from tether_services.runtime.content_hash import hash_model_folder
from tether_services.runtime.logging import log_event
from tether_services.runtime.model_folder import find_model_folder
from tether_services.runtime.text import HfCodec

__all__ = ["Session", "choose_probes", "open_session"]

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_PROBES = 4
_PROBE_TOKENS = 64
_FETCH_SECONDS = 6 * 3600.0
"""For how long a download counts as getting on, whatever it does: the hub's client tells of no progress."""


@dataclass(frozen=True, slots=True)
class Session:
    """What the loop works with."""

    attempt: Attempt
    config: RunConfig
    ledger: Ledger
    files: RunFiles
    trainer: Trainer
    thread: TrainerThread
    publisher: Fleet
    """Of the policy, to all generators."""
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
    storage_wait_seconds: float = 0.0

    async def with_room(self, act: Callable[[], Awaitable[T]]) -> T:
        """Return what `act` returns; while a disk is full it is tried again, see `wait_for_room`."""
        return await wait_for_room(act, seconds=self.storage_wait_seconds)

    async def write(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a method that writes to the disk returns, without blocking the event loop, see `with_room`."""
        return await self.with_room(lambda: asyncio.to_thread(method, *args, **kwargs))

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
        directory, version = self.files.new_average_directory(), self.publisher.policy_version
        export = partial(self.trainer.export_average, directory, policy_version=version)
        await self.with_room(lambda: self.thread.run(export))

    async def export_adapter(self, policy_version: int, *, committed_sha256: str = "") -> LocalAdapter:
        """Return the policy as it is now, written to disk with its proofs; a committed one that is there stays."""
        return await self.with_room(lambda: self.thread.run(self._export, policy_version, committed_sha256))

    def _export(self, policy_version: int, committed_sha256: str) -> LocalAdapter:
        self.check_lease()
        directory = self.files.make_way(
            policy_version, config=self.trainer.adapter_config, committed_sha256=committed_sha256
        )
        exported = self.trainer.export_adapter(directory, policy_version=policy_version)
        return _local_adapter(exported, self.attempt.run_id, prove(self.trainer, self.probes))

    async def save_checkpoint(self, policy_version: int) -> CheckpointRow:
        """Return the trainer as it is now, durable on the disk."""
        return await self.with_room(lambda: self.thread.run(self._save, policy_version))

    def _save(self, policy_version: int) -> CheckpointRow:
        self.check_lease()
        folder = self.files.new_checkpoint(policy_version, self.attempt.epoch)
        self.trainer.save_checkpoint(folder)
        return self.files.describe_checkpoint(folder, policy_version)

    def retained_checkpoints(self) -> list[CheckpointRow]:
        """Return the checkpoints that are to be kept; the ledger knows the others as removed from now on.

        As many rollbacks by alarms as are allowed can follow each other without a step between them.
        """
        count, hours, alarms = self.config.keep_checkpoints, self.keep_checkpoint_hours, self.config.alarms
        rolls_back = alarms.is_set and alarms.action == "rollback"
        at_least = 1 + alarms.rollback_steps * alarms.max_rollbacks if rolls_back else 1
        return self.ledger.retain_checkpoints(self.attempt, count=count, hours=hours, at_least=at_least)


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
        model = await fetch(partial(find_model_folder, config.model, field="model"))
        base_sha256 = await asyncio.to_thread(hash_model_folder, model, on_chunk=note_work)
        show, budget = partial(show_breakers, files), config.failure.retry_budget
        async with (
            open_services(settings, retry_budget=budget, on_breaker=show) as services,
            build_fleet(services, attempt, settings, check=partial(check_generator, config, base_sha256)) as fleet,
        ):
            files.write_services(await describe_services(services, fleet, config, base_sha256))
            codec = await asyncio.to_thread(HfCodec, model)
            lists = await fetch(partial(load_prompt_lists, config))
            prompts = encode_prompts(config, *lists, lambda text: codec.encode(text, add_special_tokens=True))
            pretraining = await fetch(partial(open_pretraining, config, codec))
            identity = await identify(services, config, base_sha256, prompts, pretraining)
            await asyncio.to_thread(ledger.pin_identity, attempt, identity)
            identities = Identities(identity.base_sha256, identity.reward_sha256)
            await check_reward_tokenizer(services, config, prompts.training[:_PROBES], codec)
            trainer = await thread.run(build_trainer, model, config, threads=settings.threads)
            session = Session(
                attempt,
                config,
                ledger,
                files,
                trainer,
                thread,
                fleet,
                RolloutCollector(services, fleet, identities, config.failure),
                prompts,
                choose_probes(prompts.training),
                identities,
                pretraining,
                check_lease,
                settings.keep_checkpoint_hours,
                settings.storage_wait_seconds,
            )
            await take_up(session)
            yield session
    finally:
        thread.close()


async def fetch(read: Callable[[], T]) -> T:
    """Return what a function returns that may have to download it, in a thread; that takes long and is no hang."""
    return await note_while(asyncio.to_thread(read), seconds=_FETCH_SECONDS)


def build_fleet(services: Services, attempt: Attempt, settings: OrchestratorSettings, *, check: CheckState) -> Fleet:
    """Return the generators of an attempt, each of which must pass a check before it gets a prompt."""
    return Fleet(
        services,
        attempt,
        laggards=settings.laggards,
        laggard_seconds=settings.laggard_seconds,
        check=check,
        on_lagging=partial(show_lagging, RunFiles(attempt.directory)),
    )


def show_breakers(files: RunFiles, states: BreakerStates) -> None:
    """Tell the service, which exports it, which services this attempt does not call now."""
    _show(files, BREAKERS_FILE, states)


def show_lagging(files: RunFiles, targets: Sequence[str]) -> None:
    """Tell the service, which exports it, which generators this attempt sends no prompt now."""
    _show(files, LAGGING_FILE, {"generators": list(targets)})


def _show(files: RunFiles, name: str, states: Mapping[str, Any]) -> None:
    try:
        files.write_json(name, states)
    except (OSError, TetherError) as error:  # a full disk must not add a failure to that of the service
        log_event(log, f"{name} not written", level=logging.WARNING, error=str(error), **states)


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
