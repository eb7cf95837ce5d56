"""The names of the figures of a step: what WatchRun sends, report.json holds and the README lists."""

from __future__ import annotations

__all__ = ["DROP_REASONS", "OPTIONAL_METRICS", "PUSH_STAGES", "STEP_METRICS"]

DROP_REASONS = ("wrong_run", "wrong_version", "wrong_adapter", "invalid_logprobs", "not_scored", "no_reference")
"""Why a generated sample is not trained on."""
PUSH_STAGES = ("serialize", "transfer", "verify", "load", "activate")
"""The way of an adapter from the trainer into use."""

STEP_METRICS: dict[str, str] = {
    "samples_asked": "completions that the step asked for; asked = generated + not generated",
    "samples_generated": "completions that the generator returned",
    "samples_not_generated": "completions that it did not",
    "samples_trained": "completions that the update learned from",
    "samples_dropped": "completions left out; generated = trained + dropped",
    **{f"dropped_{reason}": f"of these, {reason.replace('_', ' ')}" for reason in DROP_REASONS},
    "samples_abandoned": "completions of earlier tries and attempts of the step; in none of the counts above",
    "generated_tokens": "response tokens generated",
    "effective_tokens": "response tokens learned from",
    "tokens_per_second": "generated tokens over the time from the first request to the last completion",
    "score_mean": "mean score",
    "score_std": "standard deviation of the scores",
    "reward_per_sequence": "shaped score minus kl_coef times KL where that is in the reward, mean over samples",
    "response_length_mean": "tokens per response",
    "truncated_ratio": "share of responses that reached max_response_tokens",
    "kl_per_token": "KL to the reference by k1, nats, mean over tokens; may be negative",
    "kl_k3_per_token": "the same by k3; never negative",
    "kl_per_sequence": "KL to the reference by k1, nats, summed over a response, mean over samples",
    "entropy": "of the policy, nats, mean over tokens",
    "kl_coef": "weight of the KL in this step",
    "policy_loss": "clipped surrogate, mean over optimiser steps; absent while only the critic learns",
    "kl_loss": "KL to the reference as a loss, unweighted; only with kl_in = loss",
    "entropy_bonus": "entropy during the update, nats, reduced as the loss is; only with entropy_coef",
    "ptx_loss": "language-model loss on the pretraining text, nats per token; only with ptx_coef",
    "value_loss": "clipped squared error, mean over optimiser steps; only with a critic, as all of its figures",
    "policy_grad_norm": "before clipping, mean over optimiser steps",
    "ppo_grad_norm": "the same of all but the pretraining text; only with ptx_coef",
    "ptx_grad_norm": "the same of the weighted loss on the pretraining text; only with ptx_coef",
    "critic_grad_norm": "before clipping, mean over optimiser steps",
    "policy_learning_rate": "of the last optimiser step; absent while only the critic learns",
    "critic_learning_rate": "of the last optimiser step",
    "approx_kl": "between the policy before and during the update, nats per token",
    "clip_fraction": "share of tokens whose clipped side counts",
    "dual_clip_fraction": "share of tokens at the bound of the dual clip",
    "value_clip_fraction": "share of values whose clipped side counts",
    "ratio_max": "largest policy ratio",
    "first_ratio_deviation": "largest |ratio - 1| before the first optimiser step; 0 if the trainer agrees with itself",
    "explained_variance": "of the returns by the values; absent where all returns are equal",
    "value_mean": "mean value before the update",
    "advantage_mean": "before whitening",
    "advantage_std": "before whitening",
    "mean_abs_dlogp": "mean |trainer - generator log-probability|, nats; the canary of a wrong or stale policy",
    "mult_prob_error": "mean exp |trainer - generator log-probability|; 1 is perfect",
    "gen_kl": "KL of the generator to the trainer by k3, nats per token",
    "outlier_ratio": "share of samples with a token of a ratio of trainer to generator above 100 or below 1e-4",
    "sampler_corrected_ratio": "share of tokens that the sampler correction truncated or left out",
    "num_optimizer_steps": "optimiser steps of the update",
    "adapter_bytes": "size of the pushed adapter",
    "probe_mean_abs_dlogp": "trainer against generator on the probe tokens of the pushed adapter, nats",
    "step_seconds": "whole step",
    "rollout_seconds": "first request to last completion",
    "score_seconds": "first Score call to last answer; overlaps with the rollout",
    "ref_seconds": "first ComputeLogprobs call to last answer; overlaps with the rollout",
    "score_wait_seconds": "from the start of the step to the first Score call",
    "train_wait_seconds": "from the last completion to the start of the update",
    "train_seconds": "old log-probabilities, values, advantages and all optimiser steps",
    "checkpoint_seconds": "writing the checkpoint",
    "push_seconds": "bringing the adapter into use, all stages",
    **{f"push_{stage}_seconds": f"of these, {stage}" for stage in PUSH_STAGES},
    "process_memory_bytes": "resident memory of the worker",
    "torch_allocated_bytes": "device memory in use by tensors; only with a GPU",
    "torch_reserved_bytes": "device memory held by the allocator; only with a GPU",
    "torch_peak_allocated_bytes": "largest torch_allocated_bytes so far; only with a GPU",
}
"""Name and meaning of each figure."""

OPTIONAL_METRICS = frozenset(
    {
        *("policy_loss", "policy_grad_norm", "approx_kl", "clip_fraction", "dual_clip_fraction", "ratio_max"),
        *("first_ratio_deviation", "kl_loss", "entropy_bonus", "ptx_loss", "ppo_grad_norm", "ptx_grad_norm"),
        *("value_loss", "critic_grad_norm", "value_clip_fraction", "value_mean", "explained_variance"),
        *(
            "policy_learning_rate",
            "critic_learning_rate",
            "torch_allocated_bytes",
            "torch_reserved_bytes",
            "torch_peak_allocated_bytes",
        ),
        # Of an adapter that the generator has already.
        *("push_transfer_seconds", "push_verify_seconds", "push_load_seconds", "probe_mean_abs_dlogp"),
    }
)
"""Those that a step may lack."""
