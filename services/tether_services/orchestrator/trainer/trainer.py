"""The PPO trainer: a plain class over one model in memory, usable without any service.

trainer = Trainer(Path("base"), TrainerConfig(learning_rate=1e-3), PpoConfig(), total_steps=20)
report = trainer.update(batch)
adapter = trainer.export_adapter(Path("adapters/1"), policy_version=1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.orchestrator.config import PpoConfig, TrainerConfig
from tether_services.orchestrator.progress import note_work
from tether_services.orchestrator.trainer.average import AdapterAverage
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
from tether_services.orchestrator.trainer.experience import Experience, Layout, prepare_experience
from tether_services.orchestrator.trainer.export import AdapterFiles, config_json, export_adapter
from tether_services.orchestrator.trainer.forward import gather_flat, response_logprobs, response_values
from tether_services.orchestrator.trainer.model import SharedModel, copy_tensors, load_base
from tether_services.orchestrator.trainer.optimiser import AdapterOptimiser
from tether_services.orchestrator.trainer.plan import loss_denominator, plan_epoch, plan_pretraining
from tether_services.orchestrator.trainer.report import UpdateReport, summarise
from tether_services.orchestrator.trainer.update import Figures, Learner, PolicyStep
from tether_services.ppo.kl import AdaptiveKl, FixedKl, KlController
from tether_services.ppo.rewards import Normaliser
from tether_services.ppo.schedules import learning_rate_factor
from tether_services.runtime.content_hash import hash_model_folder
from tether_services.runtime.fault_points import reach
from tether_services.runtime.model_folder import pick_device

__all__ = ["Trainer"]


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
            total_steps: Updates of the whole run, at least 1; the length of the schedule.
            reward_model: Folder of a reward model (LoRA adapter and score head over the same base) that the critic
                starts from; without it the critic starts from the base and a random head.

        Raises:
            NotFoundError: A folder does not exist.
            InvalidArgumentError: A folder or setting does not fit.
            FailedPreconditionError: The base has dropout or a special output layer, or the reward model another base.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        self.base_sha256 = hash_model_folder(base_model, on_chunk=note_work)
        start = read_critic_start(reward_model, base_sha256=self.base_sha256) if reward_model else None
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            device = pick_device(config.device)
            base = load_base(base_model, dtype=config.dtype, quantization=config.quantization, device=device)
            note_work()
            self._model = SharedModel(base, config, device=device, has_critic=ppo.has_critic, critic_start=start)
        self._config, self._ppo, self._total_steps = config, ppo, total_steps
        self._generator = torch.Generator().manual_seed(config.seed)
        self._trained: tuple[Literal["policy", "critic"], ...] = ("policy", "critic") if ppo.has_critic else ("policy",)
        self._optimisers = {name: self._new_optimiser(name) for name in self._trained}
        self._learner = Learner(self._model, self._optimisers["policy"], self._optimisers.get("critic"), ppo)
        self._kl = new_kl_controller(ppo)
        self._normaliser = Normaliser() if ppo.normalise_scores else None
        decay, weights = config.ema_decay, self._model.adapter_parameters("policy")
        self._average = None if decay is None else AdapterAverage(weights, decay=decay)
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

    def base_logprobs(self, probes: Sequence[Sample]) -> list[list[float]]:
        """Return the same without adapters, from which a pushed one must differ as much where it is served."""
        return [row.tolist() for row in self.compute_logprobs(probes, adapter="reference", temperature=1.0)]

    def update(self, batch: RolloutBatch, pretraining: Sequence[Sequence[int]] = ()) -> UpdateReport:
        """Learn from a scored rollout batch and return the figures of the update.

        Args:
            batch: The samples.
            pretraining: Token ids of pretraining text, spread over the optimiser steps; not looked at while `ptx_coef`
                is 0.

        Raises:
            InvalidArgumentError: A sample or the pretraining text is outside its range, or there is too little text.
            FailedPreconditionError: Something is not finite, generator and trainer disagree, or the schedule has ended.
                The optimiser step at fault was not taken; steps before it in the same update were.
        """
        self._check(batch.samples)
        epochs = [self._new_epoch(batch) for _ in range(self._ppo.epochs)]
        layouts = [layout for epoch in epochs for layout in epoch]
        steps = self._policy_steps(batch, layouts, pretraining)
        rates = [self._learning_rates(index) for index in range(len(layouts))]
        experience = prepare_experience(
            self._model, batch, epochs[0], self._ppo, kl_coef=self._kl.kl_coef, normaliser=self._normaliser
        )
        taken: list[Figures] = []
        for layout, step, rate in zip(layouts, steps, rates, strict=True):
            figures = self._take_step(experience, layout, step, rate, may_stop=bool(taken))
            if figures is None:
                break
            if not taken:
                reach("update.first_optimiser_step")
            taken.append(figures)
        self.num_updates += 1
        moved = {"policy": any(steps), "critic": self._ppo.has_critic}
        if moved["policy"]:  # the weight does not follow a policy that may not move
            self._kl.update(experience.figures["kl_per_sequence"], len(batch.samples))
        counts = {"num_samples": len(batch.samples), "num_tokens": experience.advantages.numel()}
        last_rates = rates[len(taken) - 1]
        last = {f"{name}_learning_rate": last_rates[name] if moved[name] else math.nan for name in moved}
        scores = {"score_mean": sum(batch.scores) / len(batch.scores)}
        return summarise(taken, {**experience.figures, **last, **counts, **scores})

    def _policy_steps(
        self, batch: RolloutBatch, layouts: Sequence[Layout], pretraining: Sequence[Sequence[int]]
    ) -> list[PolicyStep | None]:
        """Return what each optimiser step of the policy is made of; None while only the critic learns."""
        if self._ppo.has_critic and self.num_updates < self._ppo.critic_warmup_steps:
            return [None] * len(layouts)
        texts: list[Sequence[MicroBatch]] = [()] * len(layouts)
        if self._ppo.ptx_coef:
            rows = [Sample(row[:1], row[1:]) for row in pretraining]
            self._check(rows, field="pretraining")
            texts = plan_pretraining(rows, num_steps=len(layouts), max_tokens=self._config.micro_batch_tokens)
        limit = batch.response_limit
        return [
            PolicyStep(self._kl.kl_coef, loss_denominator(layout, self._ppo, response_limit=limit), text)
            for layout, text in zip(layouts, texts, strict=True)
        ]

    def _learning_rates(self, index: int) -> dict[str, float]:
        """Return the learning rate of each adapter at an optimiser step of the next update.

        Raises:
            FailedPreconditionError: The schedule has ended; a further step would change nothing.
        """
        schedule, per_update = self._config.schedule, self._ppo.epochs * self._ppo.minibatches
        if schedule != "constant" and self.num_updates >= self._total_steps:
            message = f"the {schedule} schedule ended after {self._total_steps} updates; raise the number of steps"
            raise FailedPreconditionError(message, field="trainer.schedule", reason="SCHEDULE_ENDED")
        factor = learning_rate_factor(
            self.num_updates * per_update + index,
            kind=schedule,
            total_steps=self._total_steps * per_update,
            warmup_steps=self._config.warmup_steps * per_update,
        )
        policy = self._config.learning_rate
        rates = {"policy": policy, "critic": self._config.critic_learning_rate or policy}
        return {name: factor * rates[name] for name in self._trained}

    def _take_step(
        self,
        experience: Experience,
        layout: Layout,
        step: PolicyStep | None,
        rates: dict[str, float],
        *,
        may_stop: bool,
    ) -> Figures | None:
        """Take one optimiser step and return its figures; None, and no step, once the policy has moved by `target_kl`.

        Args:
            experience: What is learned.
            layout: The micro-batches of the step.
            step: What the policy learns besides; None: only the critic learns.
            rates: Learning rate of each adapter.
            may_stop: False for the first step of an update, whose policy has not moved.

        Raises:
            FailedPreconditionError: A loss or gradient is not finite; no optimiser has stepped then.
        """
        for optimiser in self._optimisers.values():
            optimiser.clear()
        figures = self._learner.accumulate(experience, layout, step)
        limit = self._ppo.target_kl
        if limit is not None and may_stop and figures.get("approx_kl", 0.0) > limit:
            return None
        stepping = {n: o for n, o in self._optimisers.items() if n != "policy" or step is not None}
        figures |= {f"{name}_grad_norm": optimiser.clip() for name, optimiser in stepping.items()}
        for name, optimiser in stepping.items():
            optimiser.step(rates[name])
        if self._average is not None:
            self._average.update()
        return figures

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

    @property
    def adapter_config(self) -> bytes:
        """What `export_adapter` writes beside the weights."""
        return config_json(self._model.shapes["policy"])

    def export_average(self, directory: Path, *, policy_version: int) -> AdapterFiles:
        """Write the moving average of the policy adapter, as `export_adapter` writes the adapter itself.

        Raises:
            FailedPreconditionError: There is none, or `directory` exists with other content.
        """
        if self._average is None:
            raise FailedPreconditionError("no average is kept; set trainer.ema_decay", field="trainer.ema_decay")
        shape = self._model.shapes["policy"]
        return export_adapter(
            directory, self._average.tensors, shape, policy_version=policy_version, base_sha256=self.base_sha256
        )

    def save_checkpoint(self, directory: Path) -> None:
        """Write everything needed to continue bit for bit as a new directory.

        Raises:
            FailedPreconditionError: `directory` exists with other content.
        """
        weights: dict[str, Tensor] = {}
        optimiser = {"rng": self._generator.get_state()}
        for adapter in self._trained:
            parameters = self._model.trained_parameters(adapter)
            weights |= {f"{adapter}/{n}": p.detach().cpu().contiguous() for n, p in parameters.items()}
            optimiser |= {f"{adapter}/{n}": t.cpu() for n, t in self._optimisers[adapter].state_tensors().items()}
        if self._average is not None:
            weights |= {f"average/{n}": t.cpu().contiguous() for n, t in self._average.tensors.items()}
        write_checkpoint(directory, Checkpoint(weights, optimiser, state=self._identity() | self._counters()))

    def load_checkpoint(self, directory: Path) -> None:
        """Continue from a checkpoint of a trainer with the same base, adapter shapes and optional parts.

        Raises:
            NotFoundError: There is no checkpoint.
            FailedPreconditionError: It is damaged, of another format, or belongs to another base or shape.
        """
        checkpoint = read_checkpoint(directory)
        state = checkpoint.state
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                message = f"the checkpoint has other {name} than this trainer; continue with the settings that wrote it"
                raise FailedPreconditionError(message, field="checkpoint", reason="CHECKPOINT_MISMATCH")
        for adapter in self._trained:
            weights = _with_prefix(checkpoint.weights, f"{adapter}/")
            copy_tensors(self._model.trained_parameters(adapter), weights, field="checkpoint")
            num_steps = state["optimiser_steps"][adapter]
            self._optimisers[adapter].load_state(_with_prefix(checkpoint.optimiser, f"{adapter}/"), num_steps=num_steps)
        if self._average is not None:
            self._average.load(_with_prefix(checkpoint.weights, "average/"))
        if self._normaliser is not None:
            self._normaliser = Normaliser(*state["score_moments"])
        if self._ppo.kl_target is not None:
            self._kl.kl_coef = state["kl_coef"]
        self._generator.set_state(checkpoint.optimiser["rng"])
        self.num_updates = state["num_updates"]

    def _identity(self) -> dict[str, object]:
        """Return what a checkpoint must agree on before its tensors mean anything here."""
        shapes = {
            name: [shape.rank, shape.alpha, list(shape.target_modules), shape.use_rslora]
            for name, shape in self._model.shapes.items()
        }
        optional = {"average": self._average is not None, "normaliser": self._normaliser is not None}
        parts = [name for name, present in optional.items() if present]
        optimizer = self._config.optimizer
        return {"base_sha256": self.base_sha256, "adapters": shapes, "parts": parts, "optimizer": optimizer}

    def _counters(self) -> dict[str, object]:
        moments = self._normaliser and [self._normaliser.count, self._normaliser.mean, self._normaliser.var]
        return {
            "num_updates": self.num_updates,
            "optimiser_steps": {name: optimiser.num_steps for name, optimiser in self._optimisers.items()},
            "kl_coef": self._kl.kl_coef,
            "score_moments": moments,
        }

    def _new_optimiser(self, adapter: Literal["policy", "critic"]) -> AdapterOptimiser:
        return AdapterOptimiser(
            self._model.trained_parameters(adapter),
            max_grad_norm=self._config.max_grad_norm,
            kind=self._config.optimizer,
        )

    def _new_epoch(self, batch: RolloutBatch) -> list[Layout]:
        """Return the samples in a new random partition into minibatches, each laid out in micro-batches."""
        order = torch.randperm(len(batch.samples), generator=self._generator)
        return plan_epoch(batch, order, self._ppo, max_tokens=self._config.micro_batch_tokens)

    def _check(self, samples: Sequence[Sample], *, field: str = "samples") -> None:
        check_samples(samples, vocab_size=self._model.vocab_size, max_length=self._model.max_length, field=field)

    def _per_sample(self, samples: Sequence[Sample], forward: Callable[[MicroBatch], Tensor]) -> list[Tensor]:
        """Return the [N] results of a forward pass split by sample."""
        self._check(samples)
        layout = build_micro_batches(samples, range(len(samples)), max_tokens=self._config.micro_batch_tokens)
        lengths = response_lengths(samples)
        return list(torch.split(gather_flat(layout, forward, num_tokens=sum(lengths)), lengths))


def new_kl_controller(config: PpoConfig) -> KlController:
    """Return the controller of the KL's weight."""
    if config.kl_target is None:
        return FixedKl(config.first_kl_coef)
    return AdaptiveKl(config.first_kl_coef, config.kl_target, config.kl_horizon)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
