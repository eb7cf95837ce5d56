"""Configuration of the orchestrator: its own settings, and what a run, the PPO algorithm and the trainer are told."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from tether_services.runtime.client_credentials import ClientCredentials
from tether_services.runtime.model_folder import Quantization
from tether_services.runtime.settings import ServerSettings, Settings

__all__ = [
    "AlarmConfig",
    "FailureConfig",
    "GeneratorAddress",
    "OrchestratorSettings",
    "PpoConfig",
    "RunConfig",
    "TrainerConfig",
]

PROGRAM = "tether serve orchestrator"
ENV_PREFIX = "TETHER_ORCHESTRATOR__"
ALL_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-like block: attention and MLP."""
SAMPLER_RANGES = {
    "none": (0.0, math.inf),
    "token_tis": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "token_mask": (0.5, 2.0),
    "sequence_mask_geometric": (0.98, 1.02),
}
"""Accepted ratios of trainer to generator where none are set, by kind of correction."""


class PpoConfig(Settings):
    """The PPO algorithm: reward shaping, advantages, the losses and what is added to them."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_baseline"] = "gae"
    """`gae` has a critic; the others compare the responses to one prompt and have none."""
    epochs: int = Field(default=4, ge=1, le=100)
    """Passes over each rollout batch, 1 to 100."""
    minibatches: int = Field(default=1, ge=1, le=10_000)
    """Optimiser steps per pass, 1 to the number of samples of a step."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Policy ratios are clipped to 1 -+ this, above 0 and below 1."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """Upper range where it differs from the lower, above 0; unset: `clip_range`."""
    dual_clip: float | None = Field(default=None, gt=1)
    """The loss of a negative advantage A is at most this times -A, above 1; unset: no bound."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """A value may move this far from its rollout value, in units of the return, above 0."""
    aggregation: Literal["token_mean", "sequence_mean", "token_sum"] = "token_mean"
    """Of the whole optimiser step: mean of tokens, mean of responses' means, or sum over responses at full length."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus, 0 or more."""
    target_kl: float | None = Field(default=None, gt=0)
    """An update ends early when the policy has moved this far in nats per token (approx_kl); unset: never."""
    critic_warmup_steps: int = Field(default=0, ge=0)
    """PPO steps at the start in which only the critic learns, 0 or more."""
    kl_coef: float | None = Field(default=None, ge=0)
    """Weight of the KL, 0 or more, the first one where it adapts; unset: 0.05, but 0 for a fixed one of (dr_)grpo."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL acts: in the token rewards (k1), or as a loss (value of k3, gradient of k2)."""
    kl_target: float | None = Field(default=None, gt=0)
    """KL that the weight adapts to, nats summed over a response, above 0; unset: the weight is fixed."""
    kl_horizon: float = Field(default=10_000.0, gt=0)
    """Responses over which an error of 100 % doubles an adaptive weight, above 0; errors count up to 20 %."""
    score_placement: Literal["last", "n_plus"] = "last"
    """Token that carries the score: the last one of the response, or the one after it, with a value of its own."""
    missing_eos: Literal["none", "subtract", "replace"] = "none"
    """What happens to the score of a response that was cut at the limit."""
    missing_eos_value: float = 1.0
    """Subtracted from such a score, or put in its place."""
    score_clip: float | None = Field(default=None, gt=0)
    """Scores are clipped to -+ this, above 0; unset: not."""
    normalise_scores: bool = False
    """Scale scores by mean and deviation of all scores of the run so far, beyond the reward model's own constants."""
    whiten_rewards: bool = False
    """Scale token rewards to variance 1 over the rollout batch; their mean stays."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token, 0 to 1."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Decay of the advantage estimator: 0 is one step, 1 is Monte Carlo."""
    whiten_advantages: bool | None = None
    """Scale advantages to mean 0 and variance 1 over the rollout batch; unset: yes for gae and reinforce_baseline."""
    temperature: float = Field(default=1.0, ge=0.01, le=2)
    """Sampling temperature, the same for rollouts, reference and update, 0.01 to 2."""
    sampler_correction: Literal["none", "token_tis", "icepop", "token_mask", "sequence_mask_geometric"] = "token_tis"
    """Weight of the policy loss for tokens drawn by a generator that is not exactly the trainer."""
    sampler_low: float | None = Field(default=None, ge=0)
    """Smallest accepted ratio of trainer to generator, 0 or more; unset: 0, 0.5, 0.5 or 0.98 by kind of correction."""
    sampler_high: float | None = Field(default=None, gt=0)
    """Largest accepted ratio, above 0; unset: 2, 5, 2 or 1.02 by kind of correction."""
    mismatch_limit: float = Field(default=0.05, gt=0)
    """Mean |trainer - generator logprob| in nats above which a batch is refused before any update, above 0."""
    ptx_coef: float = Field(default=0.0, ge=0)
    """Weight of the language-model loss on `ptx_text` in each policy step, 0 or more (PPO-ptx)."""
    ptx_text: str = ""
    """Pretraining text, same forms as `prompts`; needed with `ptx_coef`."""
    ptx_rows: int = Field(default=8, ge=1, le=10_000)
    """Sequences of `ptx_text` per optimiser step, each as long as prompt and response may be together, 1 to 10,000."""

    @property
    def has_critic(self) -> bool:
        """Whether values are learned."""
        return self.advantage == "gae"

    @property
    def first_kl_coef(self) -> float:
        """Weight of the KL in the first step."""
        without = self.advantage in ("grpo", "dr_grpo") and self.kl_target is None
        by_kind = 0.0 if without else 0.05
        return by_kind if self.kl_coef is None else self.kl_coef

    @property
    def whitens_advantages(self) -> bool:
        """Whether advantages are whitened."""
        by_kind = self.advantage in ("gae", "reinforce_baseline")
        return by_kind if self.whiten_advantages is None else self.whiten_advantages

    @property
    def sampler_range(self) -> tuple[float, float]:
        """(low, high) of the sampler correction."""
        low, high = SAMPLER_RANGES[self.sampler_correction]
        return (
            low if self.sampler_low is None else self.sampler_low,
            high if self.sampler_high is None else self.sampler_high,
        )


class TrainerConfig(Settings):
    """The trainer: adapters, optimisers, memory and numeric type."""

    learning_rate: float = Field(gt=0, le=1)
    """Of the policy adapter, above 0 and at most 1; no default, because the right one depends on the model."""
    critic_learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Of the critic adapter and value head, above 0 and at most 1; unset: `learning_rate`."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """`linear` and `cosine` take both learning rates to 0 over the run, `constant` keeps them."""
    warmup_steps: int = Field(default=0, ge=0)
    """PPO steps over which both learning rates first rise from 0, 0 or more, below `total_steps`."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the moments of larger tensors in 8 bits (bitsandbytes)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradients of each adapter are scaled down to this norm, above 0."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay per optimiser step of an average of the policy adapter, written beside it, 0 to 1; unset: no average."""
    lora_rank: int = Field(default=8, ge=1, le=512)
    """Rank of the adapters, 1 to 512; the generator has its own limit."""
    lora_alpha: int = Field(default=16, ge=1, le=65_536)
    """The adapters are scaled by this over the rank, 1 to 65,536."""
    lora_target_modules: tuple[str, ...] = Field(default=ALL_LINEAR_LAYERS, min_length=1)
    """Names of the linear layers that get an adapter, at least one."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Padded tokens of a forward pass, 1 or more; bounds memory. A longer sample goes alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numeric type of the shared base; adapters and value head are float32 always."""
    quantization: Quantization = "none"
    """Precision of the linear layers: as stored, 8 bits or 4 bits (bitsandbytes); as generator and reference."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU where there is one."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the trainer; unset: the library's choice."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of adapter initialisation and minibatch order, 0 to 2^63 - 1."""


class FailureConfig(Settings):
    """What a step does when a service does not deliver what it was asked for. No number is ever made up."""

    on_missing: Literal["fail", "drop"] | None = None
    """`fail` ends the try of the step, `drop` leaves the sample out; unset: `drop` for what a service answers with an
    error for one item, `fail` for a call that has no answer."""
    max_dropped: float = Field(default=0.5, ge=0, lt=1)
    """Share of the samples of a step that may be left out, 0 to below 1."""
    step_retries: int = Field(default=2, ge=0, le=100)
    """Tries of a rollout after the first, with the same seeds, before the attempt ends, 0 to 100."""
    retry_budget: int = Field(default=1000, ge=0, le=1_000_000)
    """Repeats that all calls of a step may make together, 0 to 1,000,000."""


class AlarmConfig(Settings):
    """Figures of a step beyond which the policy went wrong. The step that raises an alarm is never committed."""

    kl_max: float | None = Field(default=None, gt=0)
    """Largest KL to the reference, nats summed over a response, above 0; unset: no alarm."""
    entropy_min: float | None = Field(default=None, gt=0)
    """Smallest entropy of the policy, nats per token, above 0; unset: no alarm."""
    score_drop: float | None = Field(default=None, gt=0)
    """Largest drop of the mean score below that of the last 10 steps, in standard deviations of the scores, above 0;
    unset: no alarm."""
    mismatch_max: float | None = Field(default=None, gt=0)
    """Largest mean |trainer - generator logprob|, nats, above 0, below `ppo.mismatch_limit`; unset: no alarm."""
    action: Literal["stop", "rollback"] = "stop"
    """`stop` fails the run, `rollback` takes its last steps back and goes on with other samples."""
    rollback_steps: int = Field(default=1, ge=1, le=999)
    """Committed steps that a rollback takes back, beside the one with the alarm, 1 to 999."""
    max_rollbacks: int = Field(default=3, ge=1, le=1000)
    """An alarm after so many rollbacks fails the run; ResumeRun begins to count anew, 1 to 1000. A run keeps
    `rollback_steps` checkpoints for each and one more."""

    @property
    def is_set(self) -> bool:
        """Whether there is any alarm."""
        return any(limit is not None for limit in (self.kl_max, self.entropy_min, self.score_drop, self.mismatch_max))


class RunConfig(Settings):
    """One training run. Relative paths are relative to the working directory of the orchestrator."""

    preset: Literal["", "instructgpt", "nplus", "grpo", "rloo", "small"] = ""
    """Named settings that lie under those of the run; empty: none."""
    model: str = Field(min_length=1)
    """Starting policy: a transformers model folder, or a hub name (owner/name)."""
    reward_model: str = ""
    """Folder of the reward model that the critic starts from; empty: a fresh value head."""
    score_model: str = Field(default="", max_length=160)
    """Reward model that the reward service scores with, as `name` or `name@version`; empty: its default one."""
    prompts: str = Field(min_length=1)
    """File of prompts (.txt with one a line, .jsonl with {"prompt": ...}), or a data set: a folder or a hub name."""
    evaluation_prompts: str = ""
    """Held-out prompts, same forms; empty: the last `evaluation_count` of `prompts`, then not trained on."""
    evaluation: bool = True
    """Generate and score on the held-out prompts before the first and after the last step."""
    evaluation_count: int = Field(default=32, ge=2, le=10_000)
    """Held-out prompts used, 2 to 10,000."""
    total_steps: int = Field(default=20, ge=1, le=1_000_000)
    """PPO steps, 1 to 1,000,000."""
    prompts_per_step: int = Field(default=16, ge=1, le=10_000)
    """Prompts of a step, 1 to 10,000."""
    responses_per_prompt: int = Field(default=4, ge=1, le=64)
    """Completions of each prompt, 1 to 64; all of them are trained on."""
    max_prompt_tokens: int = Field(default=256, ge=1, le=1_000_000)
    """Longer prompts are left out, counted in the report, 1 or more."""
    max_response_tokens: int = Field(default=64, ge=1, le=1_000_000)
    """New tokens of a completion at most, 1 or more."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of prompt order and sampling, and of the trainer unless `trainer.seed` is set, 0 to 2^63 - 1."""
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)
    """Newest checkpoints kept, 1 to 1000."""
    ppo: PpoConfig = PpoConfig()
    trainer: TrainerConfig
    failure: FailureConfig = FailureConfig()
    alarms: AlarmConfig = AlarmConfig()


class GeneratorAddress(Settings):
    """One of several generators."""

    address: str = Field(min_length=1)
    """host:port of the generator."""
    adapter_address: str = Field(min_length=1)
    """host:port of its admin port."""


class OrchestratorSettings(ServerSettings):
    """Starts, watches and stops PPO runs over the generator, reward and reference services."""

    address: str = "127.0.0.1:50054"
    """host:port to serve on; port 0 takes a free one and logs it."""
    metrics_address: str = "127.0.0.1:9104"
    """host:port of the Prometheus endpoint; port 0 takes a free one and logs it."""
    max_deadline_seconds: float = Field(default=86400.0, gt=0, le=86400)
    """Calls must carry a deadline of at most this; WatchRun lives as long as its caller wants."""
    drain_seconds: float = Field(default=5.0, ge=0, le=3600)
    """After SIGTERM, calls in flight get this long to finish; watchers are cut off then and can resume."""
    state_dir: str = "runs"
    """Folder of the ledger and of one folder per run."""
    generator_address: str = "127.0.0.1:50051"
    """host:port of the generator."""
    adapter_address: str = "127.0.0.1:50061"
    """host:port of the generator's admin port."""
    generators: tuple[GeneratorAddress, ...] = Field(default=(), max_length=1000)
    """Several generators of the same base that share the prompts, as tables {address, adapter_address}; they stand in
    for generator_address and adapter_address."""
    laggards: Literal["wait", "leave_out"] = "wait"
    """Of several generators, one that does not get the policy of the next step: the step waits for it, or is made
    without it until it is back."""
    laggard_seconds: float = Field(default=900.0, gt=0, le=86400)
    """Longest wait for such a generator, or with leave_out for the first of them; then the attempt fails."""
    reward_address: str = "127.0.0.1:50052"
    """host:port of the reward service."""
    reference_address: str = "127.0.0.1:50053"
    """host:port of the reference service."""
    credentials: ClientCredentials = ClientCredentials()
    """What all of them are shown, as a table {token_file, ca_file, certificate_file, key_file}."""
    generate_timeout_seconds: float = Field(default=300.0, gt=0, le=600)
    """Deadline of one Generate call, at most 600."""
    score_timeout_seconds: float = Field(default=60.0, gt=0, le=600)
    """Deadline of one Score or ComputeLogprobs call, at most 600."""
    adapter_timeout_seconds: float = Field(default=120.0, gt=0, le=600)
    """Deadline of one push or activation of an adapter, at most 600."""
    cancel_seconds: float = Field(default=300.0, gt=0, le=86400)
    """After CancelRun, a worker that gets nothing done for this long is ended; a long step that gets on is not."""
    hang_seconds: float = Field(default=900.0, ge=0, le=86400)
    """A worker that neither gets anything done nor tries anything for this long is started again; longer than loading
    the model, a micro-batch or a call takes; 0: never."""
    max_retries: int = Field(default=10, ge=0, le=1000)
    """A call that finds a service away, silent or full is repeated this often before it counts as failed."""
    retry_backoff_seconds: float = Field(default=0.5, gt=0, le=60)
    """Wait before the first repeat; doubles each time up to 8 seconds, so the defaults bridge about a minute."""
    concurrency: int = Field(default=64, ge=1, le=10_000)
    """Prompts in flight at the same time."""
    auto_resume: Literal["off", "after_crash", "always"] = "after_crash"
    """Runs that go on by themselves: none; those whose worker or orchestrator died; also those that a stop of the
    orchestrator ended."""
    max_restarts: int = Field(default=5, ge=0, le=1000)
    """A run that dies this often in a row without a new step is FAILED and waits for ResumeRun."""
    storage_wait_seconds: float = Field(default=60.0, ge=0, le=86400)
    """A step waits this long for room on a full disk, its own or a generator's, before the run is FAILED."""
    lease_seconds: float = Field(default=20.0, ge=1, le=3600)
    """A worker renews its lease four times in this time; one that has not for three times as long is ended."""
    keep_checkpoint_hours: float | None = Field(default=None, gt=0)
    """Checkpoints older than this are removed although `keep_checkpoints` would keep them, never the newest; unset: no
    limit."""

    @property
    def generator_addresses(self) -> tuple[GeneratorAddress, ...]:
        """Every generator, at least one."""
        alone = GeneratorAddress(address=self.generator_address, adapter_address=self.adapter_address)
        return self.generators or (alone,)

    @model_validator(mode="after")
    def _hangs_after_every_deadline(self) -> Self:
        """Refuse to take a call in flight for a hang."""
        for name in ("generate_timeout_seconds", "score_timeout_seconds", "adapter_timeout_seconds"):
            if 0 < self.hang_seconds <= getattr(self, name):
                longest = f"{name} = {getattr(self, name):g}"
                raise ValueError(f"hang_seconds must be above {longest}, or 0: a call in flight is no hang")
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        """Refuse what would be ignored, and a generator that is named twice."""
        fields = type(self).model_fields
        named = [address for each in self.generators for address in (each.address, each.adapter_address)]
        if len(set(named)) < len(named):
            raise ValueError("generators: an address is there twice")
        for name in ("generator_address", "adapter_address") if self.generators else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect beside generators; put it into that list")
        for name in ("laggards", "laggard_seconds") if len(self.generators) < 2 else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect with one generator; it is about several, see generators")
        return self
