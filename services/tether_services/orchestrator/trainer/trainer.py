"""The PPO trainer: a plain class over one model in memory, usable without any service.

trainer = Trainer(Path("base"), TrainerConfig(learning_rate=1e-3), PpoConfig(), total_steps=20)
report = trainer.update(batch)
adapter = trainer.export_adapter(Path("adapters/1"), policy_version=1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.orchestrator.config import PpoConfig, TrainerConfig
from tether_services.orchestrator.trainer.batch import (
    MicroBatch,
    RolloutBatch,
    Sample,
    build_micro_batches,
    check_samples,
    response_lengths,
)
from tether_services.orchestrator.trainer.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from tether_services.orchestrator.trainer.critic_start import read_critic_start
from tether_services.orchestrator.trainer.experience import prepare_experience
from tether_services.orchestrator.trainer.export import AdapterFiles, export_adapter
from tether_services.orchestrator.trainer.forward import gather_flat, response_logprobs, response_values
from tether_services.orchestrator.trainer.model import SharedModel, copy_tensors, load_base
from tether_services.orchestrator.trainer.optimiser import AdapterOptimiser
from tether_services.orchestrator.trainer.update import Learner, Minibatch, UpdateReport, summarise
from tether_services.runtime.content_hash import hash_model_folder
from tether_services.runtime.model_folder import pick_device

__all__ = ["Trainer"]

_TRAINED: tuple[Literal["policy", "critic"], ...] = ("policy", "critic")


class Trainer:
    """Policy, critic and reference on one base model, with everything that changes them."""

    def __init__(
        self,
        base_model: Path,
        config: TrainerConfig,
        ppo: PpoConfig,
        *,
        total_steps: int,
        reward_model: Path | None = None,
    ) -> None:
        """Load the base and attach adapters.

        Args:
            base_model: Folder with config.json and safetensors weights.
            config: Adapters, optimisers and memory.
            ppo: The algorithm.
            total_steps: Updates of the whole run, at least 1; the length of the linear schedule.
            reward_model: Folder of a reward model (LoRA adapter and score head over the same base) that the critic
                starts from; without it the critic starts from the base and a random head.

        Raises:
            NotFoundError: A folder does not exist.
            InvalidArgumentError: A folder or setting does not fit.
            FailedPreconditionError: The base has dropout or a special output layer, or the reward model another base.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        self.base_sha256 = hash_model_folder(base_model)
        start = read_critic_start(reward_model, base_sha256=self.base_sha256) if reward_model else None
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            base = load_base(base_model, dtype=config.dtype)
            self._model = SharedModel(base, config, device=pick_device(config.device), critic_start=start)
        self._config, self._ppo = config, ppo
        self._generator = torch.Generator().manual_seed(config.seed)
        self._learner = Learner(
            self._model,
            policy=self._new_optimiser("policy", config.learning_rate, total_steps),
            critic=self._new_optimiser("critic", config.critic_learning_rate or config.learning_rate, total_steps),
            config=ppo,
        )
        self.num_updates = 0
        """Updates applied so far, those before a loaded checkpoint included."""

    def compute_logprobs(
        self, samples: Sequence[Sample], *, adapter: Literal["policy", "reference"], temperature: float
    ) -> list[Tensor]:
        """Return per sample the float32 log-probabilities of its response tokens, natural log, on the CPU.

        Args:
            samples: At least one.
            adapter: `policy` as trained so far, or `reference`: the base without adapters.
            temperature: Logits are divided by this, in [0.01, 2].

        Raises:
            InvalidArgumentError: A sample or the temperature is outside its range.
        """
        if not 0.01 <= temperature <= 2.0:
            raise InvalidArgumentError(f"temperature must be in [0.01, 2], got {temperature}", field="temperature")
        with self._model.using(adapter):
            return self._per_sample(samples, partial(response_logprobs, self._model, temperature=temperature))

    def compute_values(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Return per sample the float32 value of the state before each response token, on the CPU.

        Raises:
            InvalidArgumentError: A sample is outside its range.
        """
        with self._model.using("critic"):
            return self._per_sample(samples, partial(response_values, self._model))

    def probe_logprobs(self, probes: Sequence[Sample]) -> list[list[float]]:
        """Return the policy's log-probabilities of fixed sequences at temperature 1, which prove a pushed adapter."""
        return [row.tolist() for row in self.compute_logprobs(probes, adapter="policy", temperature=1.0)]

    def update(self, batch: RolloutBatch) -> UpdateReport:
        """Learn from a scored rollout batch and return the figures of the update.

        Raises:
            InvalidArgumentError: A sample is outside its range, or there are fewer samples than minibatches.
            FailedPreconditionError: Something is not finite, generator and trainer disagree, or the schedule has ended.
                The optimiser step at fault was not taken; steps before it in the same update were.
        """
        self._check(batch.samples)
        plan = [self._new_epoch(batch.samples) for _ in range(self._ppo.epochs)]
        layout = [micro for minibatch in plan[0] for micro in minibatch]
        experience = prepare_experience(self._model, batch, layout, self._ppo)
        rates = {}
        steps = []
        for minibatch in (m for epoch in plan for m in epoch):
            rates = {f"{a}_learning_rate": self._optimiser(a).learning_rate() for a in _TRAINED}
            steps.append(self._learner.learn(experience, minibatch))
        self.num_updates += 1
        counts = {"num_samples": len(batch.samples), "num_tokens": experience.returns.numel()}
        scores = {"score_mean": sum(batch.scores) / len(batch.scores)}
        return summarise(steps, {**experience.figures, **rates, **counts, **scores})

    def export_adapter(self, directory: Path, *, policy_version: int) -> AdapterFiles:
        """Write the policy adapter for the generator and return what it holds.

        Raises:
            FailedPreconditionError: A weight is not finite, or `directory` exists with other content.
        """
        return export_adapter(
            directory,
            self._model.adapter_parameters("policy"),
            self._model.shapes["policy"],
            policy_version=policy_version,
            base_sha256=self.base_sha256,
        )

    def save_checkpoint(self, directory: Path) -> None:
        """Write everything needed to continue bit for bit as a new directory.

        Raises:
            FailedPreconditionError: `directory` exists with other content.
        """
        weights: dict[str, Tensor] = {}
        optimiser = {"rng": self._generator.get_state()}
        for adapter in _TRAINED:
            parameters = self._model.trained_parameters(adapter)
            weights |= {f"{adapter}/{n}": p.detach().cpu().contiguous() for n, p in parameters.items()}
            optimiser |= {f"{adapter}/{n}": t.cpu() for n, t in self._optimiser(adapter).state_tensors().items()}
        write_checkpoint(directory, Checkpoint(weights, optimiser, state=self._identity() | self._counters()))

    def load_checkpoint(self, directory: Path) -> None:
        """Continue from a checkpoint of a trainer with the same base and adapter shapes.

        Raises:
            NotFoundError: There is no checkpoint.
            FailedPreconditionError: It is damaged, of another format, or belongs to another base or shape.
        """
        checkpoint = read_checkpoint(directory)
        for name, expected in self._identity().items():
            if checkpoint.state.get(name) != expected:
                message = f"the checkpoint has other {name} than this trainer; continue with the settings that wrote it"
                raise FailedPreconditionError(message, field="checkpoint", reason="CHECKPOINT_MISMATCH")
        for adapter in _TRAINED:
            weights = _with_prefix(checkpoint.weights, f"{adapter}/")
            copy_tensors(self._model.trained_parameters(adapter), weights, field="checkpoint")
            num_steps = checkpoint.state["optimiser_steps"][adapter]
            self._optimiser(adapter).load_state(_with_prefix(checkpoint.optimiser, f"{adapter}/"), num_steps=num_steps)
        self._generator.set_state(checkpoint.optimiser["rng"])
        self.num_updates = checkpoint.state["num_updates"]

    def _identity(self) -> dict[str, object]:
        """Return what a checkpoint must agree on before its tensors mean anything here."""
        shapes = {
            name: [shape.rank, shape.alpha, list(shape.target_modules), shape.use_rslora]
            for name, shape in self._model.shapes.items()
        }
        return {"base_sha256": self.base_sha256, "adapters": shapes}

    def _counters(self) -> dict[str, object]:
        steps = {adapter: self._optimiser(adapter).num_steps for adapter in _TRAINED}
        return {"num_updates": self.num_updates, "optimiser_steps": steps}

    def _optimiser(self, adapter: Literal["policy", "critic"]) -> AdapterOptimiser:
        return self._learner.policy if adapter == "policy" else self._learner.critic

    def _new_optimiser(
        self, adapter: Literal["policy", "critic"], learning_rate: float, total_steps: int
    ) -> AdapterOptimiser:
        return AdapterOptimiser(
            self._model.trained_parameters(adapter),
            learning_rate=learning_rate,
            schedule=self._config.schedule,
            total_steps=total_steps * self._ppo.epochs * self._ppo.minibatches,
            max_grad_norm=self._config.max_grad_norm,
        )

    def _new_epoch(self, samples: Sequence[Sample]) -> list[Minibatch]:
        """Return the samples in a new random partition into minibatches, each laid out in micro-batches."""
        if len(samples) < self._ppo.minibatches:
            message = f"{len(samples)} samples cannot make {self._ppo.minibatches} minibatches"
            raise InvalidArgumentError(message, field="ppo.minibatches")
        order = torch.randperm(len(samples), generator=self._generator)
        return [
            build_micro_batches(samples, part.tolist(), max_tokens=self._config.micro_batch_tokens)
            for part in order.tensor_split(self._ppo.minibatches)
        ]

    def _check(self, samples: Sequence[Sample]) -> None:
        check_samples(samples, vocab_size=self._model.vocab_size, max_length=self._model.max_length)

    def _per_sample(self, samples: Sequence[Sample], forward: Callable[[MicroBatch], Tensor]) -> list[Tensor]:
        """Return the [N] results of a forward pass split by sample."""
        self._check(samples)
        layout = build_micro_batches(samples, range(len(samples)), max_tokens=self._config.micro_batch_tokens)
        lengths = response_lengths(samples)
        return list(torch.split(gather_flat(layout, forward, num_tokens=sum(lengths)), lengths))


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
