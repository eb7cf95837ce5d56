"""From a stage's settings to a trainer's arguments, and the trainer's progress on the terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.recipes.checkpoints import CheckpointGuard, step_of
from tether_services.recipes.config import StageConfig
from tether_services.recipes.interruption import interruption
from tether_services.recipes.progress import Report, progress_line
from tether_services.runtime.model_folder import pick_device

__all__ = ["FINAL_SHARE", "check_trackers", "count_steps", "train", "train_in_float32", "trainer_arguments"]

FINAL_SHARE = 0.1
"""The cosine ends at this share of the peak learning rate."""
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.95}
"""A shorter memory of squared gradients than the library's default: runs of a few thousand steps."""
GROUPS = {"WANDB_PROJECT": "tether", "MLFLOW_EXPERIMENT_NAME": "tether"}
"""Environment variables under whose names trackers group runs, and what they are here where nobody has set them."""


def check_trackers(trackers: Sequence[str]) -> None:
    """Do nothing where the packages of all trackers are installed.

    Raises:
        InvalidArgumentError: One is not.
    """
    for name in trackers:
        if find_spec(name) is None:
            message = f"{name} is not installed: pip install {name}, or take it out of the trackers"
            raise InvalidArgumentError(message, field="training.trackers")


def trainer_arguments(config: StageConfig, *, num_rows: int, folder: Path) -> dict[str, Any]:
    """Return the keyword arguments of `TrainingArguments` and its subclasses.

    Args:
        config: The stage.
        num_rows: Rows of the training data; decides the length of the warm-up.
        folder: Where the checkpoints go.
    """
    training = config.training
    num_steps = count_steps(config, num_rows=num_rows)
    schedules = {"linear": "linear", "cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": pick_device(config.device) == "cpu",
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": schedules[training.schedule],
        "lr_scheduler_kwargs": {"min_lr_rate": FINAL_SHARE} if training.schedule == "cosine" else None,
        "warmup_steps": math.ceil(training.warmup_fraction * num_steps),
        "weight_decay": training.weight_decay,
        **ADAM,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch" if training.optimizer == "adamw" else "adamw_bnb_8bit",
        "num_train_epochs": training.num_epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.micro_batch_rows,
        "per_device_eval_batch_size": training.micro_batch_rows,
        "gradient_accumulation_steps": training.rows_per_step // training.micro_batch_rows,
        "gradient_checkpointing": training.gradient_checkpointing,
        "bf16": config.dtype == "bfloat16",
        "logging_steps": training.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": training.eval_every,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_every,
        "load_best_model_at_end": training.keep_best,
        "metric_for_best_model": "eval_loss" if training.keep_best else None,
        "greater_is_better": False if training.keep_best else None,
        "report_to": [name for name in training.trackers if name != "tensorboard"],
        "run_name": config.output.name,
        "disable_tqdm": True,
    }


def count_steps(config: StageConfig, *, num_rows: int) -> int:
    """Return the optimiser steps of the run, at least 1; the last one of a pass may have fewer rows."""
    training = config.training
    per_epoch = math.ceil(num_rows / training.rows_per_step)
    return training.max_steps or max(1, math.ceil(training.num_epochs * per_epoch))


def train_in_float32(model: Any) -> None:
    """Let trained weights be float32 again: TRL casts those of an adapter on a quantised base to bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train(trainer: Trainer, *, config: StageConfig, title: str, folder: Path, checkpoint: Path | None) -> None:
    """Run a trainer to its end with a progress bar, guarded checkpoints and TensorBoard in place of printed lines.

    Args:
        trainer: Built with `trainer_arguments`, not started.
        config: The stage.
        title: Of the progress bar.
        folder: The stage's output; TensorBoard's files go into `tensorboard` there.
        checkpoint: Where to go on from; None begins.

    Raises:
        FailedPreconditionError: A loss is no longer a finite number.
        KeyboardInterrupt: Ctrl-C, after the step or the batch of an evaluation that it came in.
    """
    for name, value in GROUPS.items():
        os.environ.setdefault(name, value)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(CheckpointGuard(config.training.keep_checkpoints))
    trainer.add_callback(_TokenCount(trainer))
    if "tensorboard" in config.training.trackers:
        step = step_of(checkpoint) + 1 if checkpoint else None
        trainer.add_callback(_Figures(SummaryWriter(str(folder / "tensorboard"), purge_step=step)))
    num_steps = count_steps(config, num_rows=len(trainer.train_dataset))
    with progress_line(title, total=num_steps) as report, interruption() as asked:
        trainer.add_callback(_Progress(report))
        trainer.add_callback(asked)
        trainer.add_callback(_NoStepTooMany())
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except _AllStepsTakenError:
            if config.training.keep_best:
                trainer._load_best_model()


class _Figures(TensorBoardCallback):  # type: ignore[misc]  # transformers is untyped here
    """Writes figures alone: the library would add its arguments, with the paths of this machine."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write nothing."""


class _AllStepsTakenError(Exception):
    """Raised inside the trainer, which has loaded a checkpoint after which nothing is left to train."""


class _NoStepTooMany(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Ends a training that goes on from its last checkpoint: the library looks at the limit only after a step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= state.max_steps:
            raise _AllStepsTakenError


class _TokenCount(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Lets the token count of TRL's trainers, which no checkpoint holds, go on from the last figures."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        counts = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        if counts:
            self._trainer._total_train_tokens = int(counts[-1])


class _Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Moves the bar and stops a run whose loss is no longer a number."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._figures: dict[str, float] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._show(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        for name in ("loss", "eval_loss"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                message = (
                    f"{name} is {value} at step {state.global_step}; give a lower training.learning_rate and another"
                    " output folder"
                )
                raise FailedPreconditionError(message, field="training.learning_rate", reason="NON_FINITE")
        self._figures |= logs or {}
        self._show(state)

    def _show(self, state: TrainerState) -> None:
        shown = {"loss": "loss", "eval_loss": "validation"}
        texts = [f"{text} {self._figures[name]:.4f}" for name, text in shown.items() if name in self._figures]
        self._report(state.global_step, "  ".join(texts))
