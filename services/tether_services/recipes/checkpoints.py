"""Checkpoints of a stage that survive being killed at any moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tether_services.runtime.durable import flush_folder, write_text

__all__ = ["CheckpointGuard", "latest_checkpoint", "step_of"]

COMPLETE = "complete"
"""File that the guard writes last; a checkpoint without it was interrupted."""
PREFIX = "checkpoint-"


class CheckpointGuard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Marks a checkpoint once it is on the disk, and only then removes older ones.

    Figures are logged with every checkpoint: sums over an interval would otherwise be lost by a resume.
    """

    def __init__(self, keep: int) -> None:
        """Start with the number of checkpoints to keep, at least 1."""
        self._keep = keep

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Log where a checkpoint follows."""
        if control.should_save:
            control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Mark the checkpoint just written and remove what it replaces."""
        folder = Path(args.output_dir)
        newest = folder / f"{PREFIX}{state.global_step}"
        flush_folder(newest)
        write_text(newest / COMPLETE, "")
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else ""
        kept = {path.name for path in _complete(folder)[-self._keep :]} | {best}
        _remove_others(folder, kept)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint and remove interrupted ones; None where there is none."""
    complete = _complete(folder)
    _remove_others(folder, {path.name for path in complete})
    if not complete:
        return None
    _name_best_here(complete[-1])
    return complete[-1]


def step_of(path: Path) -> int:
    """Return the number of optimiser steps before a checkpoint."""
    return int(path.name.removeprefix(PREFIX))


def _name_best_here(checkpoint: Path) -> None:
    """Let the state name the best checkpoint where it is now: the trainer wrote an absolute path and would drop it."""
    path = checkpoint / TRAINER_STATE_NAME
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["best_model_checkpoint"]:
        state["best_model_checkpoint"] = str(checkpoint.parent / Path(state["best_model_checkpoint"]).name)
        write_text(path, json.dumps(state))


def _complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted((path.parent for path in folder.glob(f"{PREFIX}*/{COMPLETE}")), key=step_of)


def _remove_others(folder: Path, kept: set[str]) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        if path.name not in kept:
            shutil.rmtree(path)
