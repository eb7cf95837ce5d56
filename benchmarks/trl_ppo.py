"""The demo's task in the PPO trainer of TRL 1.12.0, the last release that has one: score against KL, run by run.

    scripts/install_trl.sh                      # once: .venv-trl, 1.5 GB
    .venv-trl/bin/python benchmarks/trl_ppo.py --seeds 0 1 2 --kl-coefs 0.1

Policy, reference, reward model, prompts and settings are those of demo.toml; policy_evaluation.py judges. Nothing of
tether is imported. A finished run in the output folder is shown and not run again. One takes two minutes on one thread.

Made equal where TRL's defaults differ:
- value model = the reward model's LoRA layers and head (gain and bias in the head), which learn, over the frozen base;
- Adam's epsilon 1e-5, no weight decay, vf_coef 1 on half the squared error, no bfloat16, no gradient checkpointing;
- gradient_accumulation_steps 1: with more, accelerate steps the optimiser once per that many micro-batches, and as TRL
  counts micro-batches over the whole batch, its minibatches would become one optimiser step per epoch;
- gradients: TRL ignores max_grad_norm. A hook on its optimiser clips those of policy and value model, each apart, to
  norm 1; `--max-grad-norm 0` removes it;
- numpy's random numbers, which order TRL's minibatches, are seeded here.

What stays different:
- one response to each of 64 prompts a step, where the demo takes 4 responses to each of 16 prompts;
- the score of a response that ended early lands one position after its last token: with gamma = lam = 1 the advantages
  are the same, and the value model learns one position more;
- whitening with the unbiased variance, temperature + 1e-7, old log-probabilities from generation, which need no
  importance weights;
- a sampled pad token counts as an end;
- the learning rate decays per PPO step, not per optimiser step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, only its own folder is on the path

from benchmarks.policy_evaluation import (
    BASE,
    LOCAL,
    MAX_RESPONSE_TOKENS,
    TEMPERATURE,
    Evaluation,
    Judge,
    encode,
    evaluate,
    load_classifier,
    load_judge,
    load_policy,
    silence_loading,
    split_prompts,
)

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADER = (
    f"{'seed':>4} {'kl_coef':>7} {'before':>7} {'after':>7} {'+-':>5} {'KL/64':>7} {'+-':>5} {'KL/resp':>8} "
    f"{'length':>7} {'train s':>8}"
)


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: what varies, and the settings of demo.toml."""

    seed: int
    kl_coef: float
    max_grad_norm: float
    """0 for no clipping, as TRL has it."""
    total_steps: int
    samples_per_step: int = 64
    epochs: int = 2
    minibatches: int = 2
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    lam: float = 1.0
    learning_rate: float = 1e-3
    lora_rank: int = 8
    lora_alpha: int = 16

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        suffix = "" if self.max_grad_norm else "-unclipped"
        return f"seed-{self.seed}-kl-{self.kl_coef:g}-steps-{self.total_steps}{suffix}"


class Progress(TrainerCallback):
    """Prints one line per PPO step and keeps the figures."""

    def __init__(self, run: Run) -> None:
        self.run, self.started = run, time.monotonic()
        self.steps: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Take the figures of a step."""
        del args, control
        figures = dict(logs or {})
        self.steps.append(figures)
        print(
            f"{self.run.name} step {state.global_step}/{self.run.total_steps} "
            f"score {figures['objective/scores']:.3f} KL {figures['objective/kl']:.2f} "
            f"value loss {figures['loss/value_avg']:.3f} {time.monotonic() - self.started:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def main() -> int:
    """Train and evaluate every combination and print the table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    silence_loading()
    judge = load_judge()
    before = evaluate(load_policy(None), judge, num_responses=arguments.responses, seed=0)
    print(HEADER, flush=True)
    for kl_coef in arguments.kl_coefs:
        for seed in arguments.seeds:
            run = Run(seed, kl_coef, max_grad_norm=arguments.max_grad_norm, total_steps=arguments.steps)
            folder = arguments.output / run.name
            seconds = ensure_trained(run, folder, judge)
            after = evaluate(load_policy(folder / "adapter"), judge, num_responses=arguments.responses, seed=0)
            write_json(folder / "evaluation.json", {"before": asdict(before), "after": asdict(after)})
            print(format_row(run, before, after, seconds), flush=True)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.1])
    parser.add_argument("--steps", type=int, default=24, help="PPO steps of 64 samples (default 24)")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="0: no clipping, as TRL has it (default 1)")
    parser.add_argument("--responses", type=int, default=8, help="answers per held-out prompt (default 8)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/trl"))
    return parser.parse_args()


def ensure_trained(run: Run, folder: Path, judge: Judge) -> float:
    """Leave the adapter of a run in its folder, training it unless it is there; return the seconds of the training."""
    report = folder / "run.json"
    if report.is_file():
        return float(json.loads(report.read_text(encoding="utf-8"))["train_seconds"])
    progress = Progress(run)
    trainer = build_trainer(run, judge, progress, folder)
    if run.max_grad_norm:
        clip_gradients(trainer, run.max_grad_norm)
    started = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):  # TRL prints a banner into the table
        trainer.train()
    seconds = time.monotonic() - started
    trainer.policy_model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    write_json(report, {"train_seconds": seconds, "run": asdict(run), "steps": progress.steps})
    return seconds


def build_trainer(run: Run, judge: Judge, progress: Progress, folder: Path) -> PPOTrainer:
    """Return TRL's trainer of a run; its reference is the policy with the adapter off."""
    set_seed(run.seed)  # before the adapters are drawn; the trainer itself never seeds numpy, which orders minibatches
    policy = AutoModelForCausalLM.from_pretrained(BASE, **LOCAL)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=run.lora_rank,
        lora_alpha=run.lora_alpha,
        target_modules=LORA_TARGETS,
        lora_dropout=0.0,
    )
    trainer = PPOTrainer(
        args=training_arguments(run, folder),
        processing_class=judge.tokenizer,
        model=policy,
        ref_model=None,
        reward_model=load_classifier().requires_grad_(False),
        value_model=load_classifier(is_trainable=True),
        train_dataset=Dataset.from_dict({"input_ids": encode(judge.tokenizer, split_prompts()[0])}),
        callbacks=[progress],
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(run: Run, folder: Path) -> PPOConfig:
    """Return TRL's configuration of a run."""
    return PPOConfig(
        output_dir=str(folder),
        seed=run.seed,
        total_episodes=run.total_steps * run.samples_per_step,
        per_device_train_batch_size=run.samples_per_step,
        gradient_accumulation_steps=1,
        num_mini_batches=run.minibatches,
        num_ppo_epochs=run.epochs,
        local_rollout_forward_batch_size=run.samples_per_step,
        response_length=MAX_RESPONSE_TOKENS,
        stop_token="eos",
        temperature=TEMPERATURE,
        kl_coef=run.kl_coef,
        kl_estimator="k1",
        cliprange=run.clip_range,
        cliprange_value=run.value_clip_range,
        vf_coef=1.0,
        gamma=1.0,
        lam=run.lam,
        whiten_rewards=False,
        learning_rate=run.learning_rate,
        lr_scheduler_type="linear",
        adam_epsilon=1e-5,
        weight_decay=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def clip_gradients(trainer: PPOTrainer, max_norm: float) -> None:
    """Have the optimiser scale the gradients of policy and value model to `max_norm`, each apart, before every step."""
    parts = [trainable(trainer.policy_model), trainable(trainer.value_model)]

    def clip(*_: Any) -> None:
        for parameters in parts:
            nn.utils.clip_grad_norm_(parameters, max_norm)

    trainer.optimizer.optimizer.register_step_pre_hook(clip)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def format_row(run: Run, before: Evaluation, after: Evaluation, seconds: float) -> str:
    """Return the figures of a run as a table row."""
    return (
        f"{run.seed:>4} {run.kl_coef:>7g} {before.score_mean:>7.3f} {after.score_mean:>7.3f} {after.score_error:>5.2f} "
        f"{after.kl_per_64_tokens:>7.2f} {after.kl_error:>5.2f} {after.kl_per_response:>8.2f} "
        f"{after.response_length_mean:>7.1f} {seconds:>8.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
