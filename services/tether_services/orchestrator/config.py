"""Configuration of the orchestrator: its own settings, and what a run, the PPO algorithm and the trainer are told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tether_services.runtime.settings import ServerSettings, Settings

__all__ = ["OrchestratorSettings", "PpoConfig", "RunConfig", "TrainerConfig"]

PROGRAM = "tether serve orchestrator"
ENV_PREFIX = "TETHER_ORCHESTRATOR__"
ALL_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-like block: attention and MLP."""


class PpoConfig(Settings):
    """The PPO algorithm: reward shaping, advantages and the two clipped losses."""

    epochs: int = Field(default=4, ge=1, le=100)
    """Passes over each rollout batch, 1 to 100."""
    minibatches: int = Field(default=1, ge=1, le=10_000)
    """Optimiser steps per pass, 1 to the number of samples of a step."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Policy ratios are clipped to 1 -+ this, above 0 and below 1."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """A value may move this far from its rollout value, in units of the return, above 0."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Weight of the KL to the reference in the reward, 0 or more."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token, 0 to 1."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Decay of the advantage estimator: 0 is one step, 1 is Monte Carlo."""
    temperature: float = Field(default=1.0, ge=0.01, le=2)
    """Sampling temperature, the same for rollouts, reference and update, 0.01 to 2."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout batch."""
    tis_cap: float = Field(default=2.0, ge=1)
    """Largest importance weight of a token, trainer over generator, 1 or more."""
    mismatch_limit: float = Field(default=0.05, gt=0)
    """Mean |trainer - generator logprob| in nats above which a batch is refused before any update, above 0."""


class TrainerConfig(Settings):
    """The trainer: adapters, optimisers, memory and numeric type."""

    learning_rate: float = Field(gt=0, le=1)
    """Of the policy adapter, above 0 and at most 1; no default, because the right one depends on the model."""
    critic_learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Of the critic adapter and value head, above 0 and at most 1; unset: `learning_rate`."""
    schedule: Literal["linear", "constant"] = "linear"
    """`linear` decays both learning rates to 0 over the run, `constant` keeps them."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradients of each adapter are scaled down to this norm, above 0."""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU where there is one."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the trainer; unset: the library's choice."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of adapter initialisation and minibatch order, 0 to 2^63 - 1."""


class RunConfig(Settings):
    """One training run. Relative paths are relative to the working directory of the orchestrator."""

    model: str = Field(min_length=1)
    """Starting policy: a transformers model folder, or a hub name (owner/name)."""
    reward_model: str = ""
    """Folder of the reward model that the critic starts from; empty: a fresh value head."""
    score_model: str = Field(default="", max_length=64)
    """Name of the reward model that the reward service scores with; empty: its default one."""
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
    reward_address: str = "127.0.0.1:50052"
    """host:port of the reward service."""
    reference_address: str = "127.0.0.1:50053"
    """host:port of the reference service."""
    generate_timeout_seconds: float = Field(default=300.0, gt=0, le=600)
    """Deadline of one Generate call, at most 600."""
    score_timeout_seconds: float = Field(default=60.0, gt=0, le=600)
    """Deadline of one Score or ComputeLogprobs call, at most 600."""
    adapter_timeout_seconds: float = Field(default=120.0, gt=0, le=600)
    """Deadline of one push or activation of an adapter, at most 600."""
    cancel_seconds: float = Field(default=300.0, gt=0, le=86400)
    """A worker that is still at work this long after CancelRun is ended; longer than a step takes."""
    max_retries: int = Field(default=10, ge=0, le=1000)
    """A call that finds a service unavailable or full is repeated this often before the run fails."""
    retry_backoff_seconds: float = Field(default=0.5, gt=0, le=60)
    """Wait before the first repeat; doubles each time up to 8 seconds, so the defaults bridge about a minute."""
    concurrency: int = Field(default=64, ge=1, le=10_000)
    """Prompts in flight at the same time."""
